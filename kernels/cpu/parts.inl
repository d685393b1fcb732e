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
  // The same of a head whose planes lie so many bytes behind.
  Part behind(size_t bytes) const {
    Part part = *this;
    const auto move = [&](auto& at) {
      at = reinterpret_cast<std::remove_reference_t<decltype(at)>>(reinterpret_cast<const uint8_t*>(at) + bytes);
    };
    for (uint32_t run = 0; run < kRuns; ++run) {
      move(part.keys[run]);
      move(part.values[run]);
      if (sizeof(Kv) > 1) continue;
      move(part.key_scales[run]);
      move(part.value_scales[run]);
    }
    return part;
  }
  // To be called when all that are seen have their place.
  void fill() {
    for (uint32_t run = 0; run < kRuns; ++run)
      if (run < first || run >= last) place(run, keys[first], values[first], key_scales[first], value_scales[first]);
  }
};

constexpr uint32_t kFetched = 16;  // lines that are fetched at once

// A part that comes next, fetched some lines at a time between steps of the work on another. A core has few lines under
// way (16 in a Xeon): many that are asked for at once hold up what follows, and memory idles after that. All heads of a
// run together, as they lie: short pieces from here and there come at half the rate.
template <class Kv>
class Ahead {
 public:
  // part: of the first of `heads`, whose planes lie `plane` bytes apart; of none nothing is fetched.
  Ahead(const Part<Kv>& part, uint32_t heads, size_t plane, uint32_t d)
      : part_(part), heads_(heads), plane_(plane), lines_(d / kWord<Kv>), run_(heads > 0 ? part.first : part.last) {
    begin();
  }

  // At most so many lines.
  void fetch(uint32_t lines) {
    const uint32_t count = left_ < lines ? left_ : lines;
    for (uint32_t i = 0; i < count; ++i) __builtin_prefetch(at_ + i * stride_, 0, 2);
    at_ += count * stride_;
    left_ -= count;
    if (left_ > 0 || run_ == part_.last) return;
    if (++head_ == heads_) {
      head_ = 0;
      half_ = 1 - half_;
      run_ += half_ == 0;
    }
    begin();
  }
  void fetch_rest() {
    while (left_ > 0) fetch(kFetched);
  }
  // What the head does next.
  Part<Kv> part_of(uint32_t head) const { return part_.behind(head * plane_); }

 private:
  void begin() {
    if (run_ == part_.last) return;
    left_ = lines_;
    at_ = reinterpret_cast<const char*>((half_ == 0 ? part_.keys : part_.values)[run_]) + head_ * plane_;
    stride_ = half_ == 0 ? size_t{part_.stride} * 4 : 64;
    if (sizeof(Kv) > 1) return;
    const float* scales = (half_ == 0 ? part_.key_scales : part_.value_scales)[run_];
    __builtin_prefetch(reinterpret_cast<const char*>(scales) + head_ * plane_, 0, 2);
  }

  const Part<Kv>& part_;
  const uint32_t heads_;
  const size_t plane_;
  const uint32_t lines_;                           // of a run's keys, and of its values
  uint32_t run_, half_ = 0, head_ = 0, left_ = 0;  // half: 0 keys, 1 values
  const char* at_ = nullptr;
  size_t stride_ = 0;
};

// A run may lie in two pages.
inline bool runs_are_cut(const Attention* job) { return job->pool->page_size % kRun != 0; }

// Of the first head.
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
    uint8_t *key = plane(job, entry, 0, job->kv_head), *value = plane(job, entry, 1, job->kv_head);
    const float *key_scales = scales_of(key, page_size, d), *value_scales = scales_of(value, page_size, d);
    for (uint32_t slot = position % page_size; slot < page_size && run < found->last; slot += kRun, ++run)
      found->place(run, reinterpret_cast<Kv*>(key) + slot * kWord<Kv>, reinterpret_cast<Kv*>(value) + size_t{slot} * d,
                   key_scales + slot, value_scales + slot);
  }
  found->fill();
}

// Copies a head's part whose runs may be cut, as if it were one page of kPart positions: 2 kPart (d + 1) floats at
// most.
template <class Kv>
inline void gather(const Attention* job, uint32_t kv_head, uint32_t start, Part<Kv>* part, float* memory) {
  constexpr uint32_t E = kWord<Kv>;
  const uint32_t page_size = job->pool->page_size, d = job->model->head_dim;
  Kv* keys = reinterpret_cast<Kv*>(memory);
  Kv* values = keys + size_t{kPart} * d;
  float *key_scales = reinterpret_cast<float*>(values + size_t{kPart} * d), *value_scales = key_scales + kPart;
  for (uint32_t t = part->seen.begin / E * E; t < part->seen.end;) {
    const uint32_t slot = (start + t) % page_size, left = (part->seen.end - t + E - 1) / E * E;
    const uint32_t count = left < page_size - slot ? left : page_size - slot;
    const uint64_t entry = job->row[(start + t) / page_size];
    uint8_t *key = plane(job, entry, 0, kv_head), *value = plane(job, entry, 1, kv_head);
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
