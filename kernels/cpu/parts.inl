// Parts of a context: what queries see of them, where their keys and values lie, and how those are fetched ahead.

namespace {

// --- what is seen ---

// Positions [begin, end), counted from the start of a part.
struct Seen {
  uint32_t begin, end;
};

// The part of [start, start + kPart) that a query sees.
inline Seen seen_by(const PhModel* m, uint32_t position, uint32_t start) {
  const uint32_t window = m->sliding_window;
  const uint32_t lowest = window != 0 && position + 1 > window ? position + 1 - window : 0;
  const uint32_t end = position < start ? 0 : position + 1 - start;
  return {lowest > start ? lowest - start : 0, end < kPart ? end : kPart};
}

inline Seen seen_by_any(const Attention* job, uint32_t start) {
  Seen all = {kPart, 0};
  for (uint32_t q = 0; q < job->count; ++q) {
    const Seen seen = seen_by(job->model, job->queries[q].position, start);
    if (seen.begin >= seen.end) continue;
    all.begin = seen.begin < all.begin ? seen.begin : all.begin;
    all.end = seen.end > all.end ? seen.end : all.end;
  }
  return all;
}

// --- where it lies ---

constexpr uint32_t kRun = 16;  // positions whose keys lie side by side
constexpr uint32_t kRuns = kPart / kRun;

// The keys and values of a part, by runs: in pages, or copied from there. A run that nobody sees is some other one.
template <class Kv>
struct Part {
  Seen seen;
  uint32_t first, last;                                  // runs that are seen
  uint32_t stride, width;                                // words to the next words of keys, and of values
  const Kv* keys[kRuns];                                 // [head_dim / E][stride] words
  const Kv* values[kRuns];                               // [kRun / E][width] words
  const float *key_scales[kRuns], *value_scales[kRuns];  // [kRun], of codes

  void place(uint32_t run, const Kv* key, const Kv* value, const float* key_scale, const float* value_scale) {
    keys[run] = key;
    values[run] = value;
    key_scales[run] = key_scale;
    value_scales[run] = value_scale;
  }
  // To be called when all that are seen have their place.
  void fill() {
    for (uint32_t run = 0; run < kRuns; ++run)
      if (run < first || run >= last) place(run, keys[first], values[first], key_scales[first], value_scales[first]);
  }
};

constexpr uint32_t kFetched = 16;  // lines that are fetched at once

// A part that comes next, fetched some lines at a time between steps of the work on another. A core has few lines under
// way (16 in a Xeon): many that are asked for at once hold up what follows, and memory idles after that.
template <class Kv>
class Ahead {
 public:
  Ahead(const Part<Kv>& part, uint32_t d) : part_(part), lines_(d / kWord<Kv>) { begin(0, part.first); }

  // At most so many lines.
  void fetch(uint32_t lines) {
    if (half_ == 2) return;
    const uint32_t count = left_ < lines ? left_ : lines;
    for (uint32_t i = 0; i < count; ++i) __builtin_prefetch(at_ + i * stride_, 0, 2);
    at_ += count * stride_;
    left_ -= count;
    if (left_ > 0) return;
    if (run_ + 1 < part_.last) return begin(half_, run_ + 1);
    begin(half_ + 1, part_.first);
  }
  void fetch_rest() {
    while (half_ != 2) fetch(kFetched);
  }

 private:
  // half: 0 keys, 1 values, 2 nothing more.
  void begin(uint32_t half, uint32_t run) {
    half_ = half;
    run_ = run;
    left_ = lines_;
    if (half == 2) return;
    at_ = reinterpret_cast<const char*>((half == 0 ? part_.keys : part_.values)[run]);
    stride_ = half == 0 ? size_t{part_.stride} * 4 : 64;
    if (sizeof(Kv) == 1) __builtin_prefetch((half == 0 ? part_.key_scales : part_.value_scales)[run], 0, 2);
  }

  const Part<Kv>& part_;
  const uint32_t lines_;  // of a run's keys, and of its values
  uint32_t half_, run_, left_;
  const char* at_;
  size_t stride_;
};

// A run may lie in two pages.
inline bool runs_are_cut(const Attention* job) { return job->pool->page_size % kRun != 0; }

template <class Kv>
inline void find_part(const Attention* job, uint32_t part, Part<Kv>* found) {
  const uint32_t page_size = job->pool->page_size, d = job->model->head_dim, start = part * kPart;
  found->seen = seen_by_any(job, start);
  found->first = found->seen.begin / kRun;
  found->last = found->seen.begin < found->seen.end ? (found->seen.end + kRun - 1) / kRun : found->first;
  found->stride = page_size;
  found->width = d;
  if (found->first == kRuns) found->first = found->last = 0;
  if (found->first == found->last || runs_are_cut(job)) {
    const Kv* any = reinterpret_cast<const Kv*>(job->pool->base);
    found->place(found->first, any, any, nullptr, nullptr);
    found->last = found->first + 1;
    found->fill();
    return;
  }
  for (uint32_t run = found->first; run < found->last;) {
    const uint32_t position = start + run * kRun;
    const uint64_t entry = job->row[position / page_size];
    uint8_t *key = plane(job, entry, 0), *value = plane(job, entry, 1);
    const float *key_scales = scales_of(key, page_size, d), *value_scales = scales_of(value, page_size, d);
    for (uint32_t slot = position % page_size; slot < page_size && run < found->last; slot += kRun, ++run)
      found->place(run, reinterpret_cast<Kv*>(key) + slot * kWord<Kv>, reinterpret_cast<Kv*>(value) + size_t{slot} * d,
                   key_scales + slot, value_scales + slot);
  }
  found->fill();
}

// Copies a part whose runs may be cut, as if it were one page of kPart positions: 2 kPart (d + 1) floats at most.
template <class Kv>
inline void gather(const Attention* job, uint32_t start, Part<Kv>* part, float* memory) {
  constexpr uint32_t E = kWord<Kv>;
  const uint32_t page_size = job->pool->page_size, d = job->model->head_dim;
  Kv* keys = reinterpret_cast<Kv*>(memory);
  Kv* values = keys + size_t{kPart} * d;
  float *key_scales = reinterpret_cast<float*>(values + size_t{kPart} * d), *value_scales = key_scales + kPart;
  for (uint32_t t = part->seen.begin / E * E; t < part->seen.end;) {
    const uint32_t slot = (start + t) % page_size, left = (part->seen.end - t + E - 1) / E * E;
    const uint32_t count = left < page_size - slot ? left : page_size - slot;
    const uint64_t entry = job->row[(start + t) / page_size];
    uint8_t *key = plane(job, entry, 0), *value = plane(job, entry, 1);
    for (uint32_t i = 0; i < d; i += E)
      memcpy(keys + size_t{i} * kPart + t * E, reinterpret_cast<Kv*>(key) + size_t{i} * page_size + slot * E,
             size_t{count} * 4);
    memcpy(values + size_t{t} * d, reinterpret_cast<Kv*>(value) + size_t{slot} * d, size_t{count} * d * sizeof(Kv));
    if (sizeof(Kv) == 1) {
      memcpy(key_scales + t, scales_of(key, page_size, d) + slot, size_t{count} * 4);
      memcpy(value_scales + t, scales_of(value, page_size, d) + slot, size_t{count} * 4);
    }
    t += count;
  }
  part->first = 0;
  part->last = kRuns;
  part->stride = kPart;
  for (uint32_t run = 0; run < kRuns; ++run)
    part->place(run, keys + run * kRun * E, values + size_t{run} * kRun * d, key_scales + run * kRun,
                value_scales + run * kRun);
}

// Of the codes of a part; anything where nobody looks.
struct Scales {
  alignas(64) float keys[kPart];
  alignas(64) float values[kPart];
};

inline void take_scales(const Part<int8_t>& part, Scales* scales) {
  for (uint32_t run = part.first; run < part.last; ++run) {
    memcpy(scales->keys + run * kRun, part.key_scales[run], kRun * sizeof(float));
    memcpy(scales->values + run * kRun, part.value_scales[run], kRun * sizeof(float));
  }
}

}  // namespace
