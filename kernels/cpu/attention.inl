// Attention over paged keys and values.
//
// A sequence's positions are reduced in parts of 128 counted from 0, each part alone: a score sums its products in W
// lanes, then the lanes in one fixed tree; a weighted sum adds position after position, in a single accumulator. Then
// parts are combined from the left. So the pieces of work that a step is cut into change no bit: nor does it matter
// which rows (a query of one head) share the loads, and a position that a row does not see has weight 0, which adds
// nothing.
//
// v2: three rows share the loads, pages are read where they lie, lanes are added up for many scores at once, the next
// part is fetched early. 2.7 to 3.0 times as fast as v1, decode and prefill (AVX2; `python -m tests.kernels.bench`).
// v3: parts stand alone, so that a long context is work for all threads.

namespace {

// --- sums of lanes for many vectors at once ---

struct Sum {
  static vf of(vf x, vf y) { return x + y; }
};
struct Largest {
  static vf of(vf x, vf y) { return x > y ? x : y; }
};

// Vectors of segments of G lanes, each segment a partial result: joins the halves of every segment; those of x and y
// alternate in the result, in segments of half the size.
template <class Join, uint32_t G, int... I>
inline vf fold(vf x, vf y, std::integer_sequence<int, I...>) {
  constexpr int half = G / 2;
  const vf low = SHUFFLE(x, y, (I / int(G) * int(G) + I % half + (I % int(G) < half ? 0 : W))...);
  const vf high = SHUFFLE(x, y, (I / int(G) * int(G) + I % half + half + (I % int(G) < half ? 0 : W))...);
  return Join::of(low, high);
}

// v[0..N) into v[0]: lanes of segment i, of G / N lanes, belong to vector i.
template <class Join, uint32_t G, int N>
inline void fold_all(vf* v) {
  if constexpr (N > 1) {
    for (int i = 0; i < N / 2; ++i) v[i] = fold<Join, G>(v[i], v[i + N / 2], std::make_integer_sequence<int, W>{});
    fold_all<Join, G / 2, N / 2>(v);
  }
}

// --- partial results ---

// Rows of a piece, as [rows] of Partial, and what they are made of.
struct Rows {
  const Attention* job;
  uint32_t group, count, stride;
  float* sums;  // [count][stride]

  Rows(const Attention* j, float* at)
      : job(j),
        group(j->model->heads / j->model->kv_heads),
        count(j->count * group),
        stride(partial_size(j->model->head_dim)),
        sums(at) {
    clear();
  }
  float* end() const { return sums + size_t{count} * stride; }
  float* at(uint32_t row) const { return sums + size_t{row} * stride; }
  const Query& query(uint32_t row) const { return job->queries[row / group]; }
  uint32_t head(uint32_t row) const { return job->kv_head * group + row % group; }
  void clear() {
    memset(sums, 0, size_t{count} * stride * sizeof(float));
    for (uint32_t row = 0; row < count; ++row) at(row)[0] = -INFINITY;
  }
  float* place(uint32_t slot, uint32_t row) const {
    float* slots = query(row).partials;
    return slots == nullptr ? nullptr : slots + (size_t{slot} * job->model->heads + head(row)) * stride;
  }
  void keep(uint32_t slot) const {
    for (uint32_t row = 0; row < count; ++row)
      if (float* to = place(slot, row)) memcpy(to, at(row), stride * sizeof(float));
  }
  void keep_nothing(uint32_t slot) const {
    for (uint32_t row = 0; row < count; ++row)
      if (float* to = place(slot, row)) to[0] = -INFINITY;
  }
};

// sums = sums * ours + part * theirs, but for the largest score. Not inlined: one way to round, wherever it is called.
__attribute__((noinline)) void add_scaled(float* sums, float ours, const float* part, float theirs, uint32_t stride) {
  sums[1] = sums[1] * ours + part[1] * theirs;
  for (uint32_t i = kPartialValues; i < stride; i += W)
    store(sums + i, load(sums + i) * ours + load(part + i) * theirs);
}

// By how much the part's largest score is above that of the sums; and what the one with the smaller counts for then.
inline float more_of(const float* sums, const float* part) { return part[0] - sums[0]; }
inline vf share_of(vf more) { return exponential(more > vf{} ? -more : more); }

// sums = sums and part.
inline void combine(float* sums, const float* part, float more, float share, uint32_t stride) {
  add_scaled(sums, more > 0 ? share : 1.0f, part, more > 0 ? 1.0f : share, stride);
  if (more > 0) sums[0] = part[0];
}
inline void combine(float* sums, const float* part, uint32_t stride) {
  const float more = more_of(sums, part);
  combine(sums, part, more, share_of(splat(more))[0], stride);
}

template <class Input>
inline void finish(const PhModel* m, const Query& query, uint32_t head, const float* sums) {
  typename Input::type* out = static_cast<typename Input::type*>(query.output) + size_t{head} * m->head_dim;
  const float share = 1.0f / sums[1];
  // Adding 0 makes a -0 a 0: an unseen position can turn one into the other, and another chunking have none.
  over(m->head_dim,
       [&](uint32_t i, auto as) { store(out + i, load_as(as, sums + kPartialValues + i) * share + 0.0f); });
}

template <class Input>
void merge(const PhModel* m, const Query* query, const float* partials, uint32_t slots, float* sums) {
  const uint32_t stride = partial_size(m->head_dim);
  for (uint32_t head = 0; head < m->heads; ++head) {
    memcpy(sums, partials + size_t{head} * stride, stride * sizeof(float));
    for (uint32_t slot = 1; slot < slots; ++slot) {
      const float* part = partials + (size_t{slot} * m->heads + head) * stride;
      if (part[0] != -INFINITY) combine(sums, part, stride);
    }
    finish<Input>(m, *query, head, sums);
  }
}

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

// Where the keys and values of a part lie: in pages, or converted to float; zeros where nobody looks.
template <class Kv>
struct Part {
  Seen seen;
  const Kv* keys[kPart];
  const Kv* values[kPart];
};

// From a slot of a page to the next.
template <class Kv>
inline size_t slot_elements(const PhModel* m) {
  return slot_size(m) / sizeof(Kv);
}

constexpr uint32_t kFirstLines = 4;  // of a page's keys: the hardware then fetches on by itself

template <class Kv>
inline void find_part(const Attention* job, uint32_t part, const void* zeros, Part<Kv>* found) {
  const uint32_t page_size = job->pool->page_size, start = part * kPart;
  const size_t slot = slot_elements<Kv>(job->model);
  found->seen = seen_by_any(job, start);
  const auto nothing = [&](uint32_t from, uint32_t to) {
    for (uint32_t t = from; t < to; ++t) found->keys[t] = found->values[t] = static_cast<const Kv*>(zeros);
  };
  nothing(0, found->seen.begin);
  nothing(found->seen.end, kPart);
  for (uint32_t t = found->seen.begin; t < found->seen.end;) {
    const uint32_t in_page = (start + t) % page_size;
    const uint32_t left = found->seen.end - t, count = left < page_size - in_page ? left : page_size - in_page;
    const uint64_t entry = job->row[(start + t) / page_size];
    const Kv* keys = reinterpret_cast<const Kv*>(slots(job, entry, 0)) + in_page * slot;
    const Kv* values = reinterpret_cast<const Kv*>(slots(job, entry, 1)) + in_page * slot;
    for (uint32_t line = 0; line < kFirstLines; ++line) {
      __builtin_prefetch(keys + line * 64 / sizeof(Kv), 0, 2);
      __builtin_prefetch(values + line * 64 / sizeof(Kv), 0, 2);
    }
    for (const uint32_t stop = t + count; t < stop; ++t, keys += slot, values += slot) {
      found->keys[t] = keys;
      found->values[t] = values;
    }
  }
}

// Of the codes of a part; 0 where nobody looks.
struct Scales {
  alignas(64) float keys[kPart];
  alignas(64) float values[kPart];
};

inline void take_scales(const Part<int8_t>& part, uint32_t d, Scales* scales) {
  for (uint32_t t = 0; t < kPart; ++t) {
    scales->keys[t] = scale_of(part.keys[t], d);
    scales->values[t] = scale_of(part.values[t], d);
  }
}

// f(part, next): parts of the job as they lie in pages, with the one to fetch meanwhile.
template <class Kv, class F>
inline void over_parts(const Attention* job, const void* zeros, Rows* rows, F&& f) {
  Part<Kv> parts[2];
  find_part(job, job->first, zeros, parts + job->first % 2);
  for (uint32_t p = job->first; p < job->last; ++p) {
    const Attention* from = p + 1 < job->last ? job : job->following;
    if (from != nullptr) find_part(from, from == job ? p + 1 : from->first, zeros, parts + (p + 1) % 2);
    const Part<Kv>&part = parts[p % 2], &next = parts[(p + (from != nullptr)) % 2];
    if (part.seen.begin < part.seen.end) f(p * kPart, part, next);
    if (job->leading) continue;
    rows->keep(p - job->first);
    rows->clear();
  }
  if (!job->leading) return;
  rows->keep(0);
  for (uint32_t slot = 1; slot < job->last - job->first; ++slot) rows->keep_nothing(slot);
}

// --- one part in float ---

constexpr int kAttentionRows = W == 16 ? 6 : 3;  // rows that share loads: with 4 vectors each, 24 or 12 accumulators
constexpr uint32_t kTogether = 4;                // positions scored at once

// Scores of W positions from `first` on for R rows, times the scales of codes. queries: [R][padded].
template <int R, class Kv>
inline void score(const Part<Kv>& part, const Part<Kv>& next, uint32_t first, const float* queries, uint32_t d,
                  uint32_t padded, const Scales* scales, float (*scores)[kPart]) {
  constexpr uint32_t groups = W / kTogether;
  vf sums[R][groups];
  for (uint32_t group = 0; group < groups; ++group) {
    vf acc[R][kTogether];
    for (int r = 0; r < R; ++r)
      for (uint32_t t = 0; t < kTogether; ++t) acc[r][t] = vf{};
    const Kv* const* keys = part.keys + first + group;  // every `groups`-th position: so the lanes end in order
    for (uint32_t t = 0; t < kTogether; ++t)
      for (uint32_t i = 0; i < d; i += 64 / sizeof(Kv)) __builtin_prefetch(next.keys[first + group + t * groups] + i);
    for (uint32_t i = 0; i < d; i += W) {
      vf q[R];
      for (int r = 0; r < R; ++r) q[r] = load(queries + r * padded + i);
      for (uint32_t t = 0; t < kTogether; ++t) {
        const vf k = load(keys[t * groups] + i);
        for (int r = 0; r < R; ++r) acc[r][t] += q[r] * k;
      }
    }
    for (int r = 0; r < R; ++r) {
      fold_all<Sum, W, kTogether>(acc[r]);
      sums[r][group] = acc[r][0];
    }
  }
  for (int r = 0; r < R; ++r) {
    fold_all<Sum, groups, groups>(sums[r]);
    store(scores[r] + first, scales != nullptr ? sums[r][0] * load(scales->keys + first) : sums[r][0]);
  }
}

// Scores into weights, in place, and their largest and sum; 0 for positions that the row does not see.
inline void soften(const PhModel* m, float* scores, Seen seen, float* partial) {
  if (m->logit_softcap != 0.0f)
    for (uint32_t t = seen.begin; t < seen.end; ++t) scores[t] = m->logit_softcap * tanhf(scores[t] / m->logit_softcap);
  vf peak = splat(-INFINITY);
  for (uint32_t t = 0; t < kPart; t += W) {
    vi position;
    for (uint32_t i = 0; i < W; ++i) position[i] = static_cast<int32_t>(t + i);
    const vi visible = (position >= static_cast<int32_t>(seen.begin)) & (position < static_cast<int32_t>(seen.end));
    const vf s = visible ? load(scores + t) : splat(-INFINITY);
    store(scores + t, s);
    peak = s > peak ? s : peak;
  }
  partial[0] = largest(peak);
  vf total = vf{};
  for (uint32_t t = 0; t < kPart; t += W) {
    const vf p = exponential(load(scores + t) - partial[0]);
    store(scores + t, p);
    total += p;
  }
  partial[1] = sum(total);
}

// partials [R][stride]: weights * values over positions [begin, end) of a part, for V vectors from i on.
template <int R, int V, class Kv>
inline void weigh(const Part<Kv>& part, const Part<Kv>& next, Seen seen, const float (*weights)[kPart], uint32_t i,
                  uint32_t stride, float* partials) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = vf{};
  for (uint32_t t = seen.begin; t < seen.end; ++t) {
    const Kv* from = part.values[t] + i;
    for (int line = 0; line < V * W; line += 64 / sizeof(Kv)) __builtin_prefetch(next.values[t] + i + line);
    float p[R];
    for (int r = 0; r < R; ++r) p[r] = weights[r][t];
    for (int v = 0; v < V; ++v) {
      const vf value = load(from + v * W);
      for (int r = 0; r < R; ++r) sums[r][v] += p[r] * value;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(partials + r * stride + kPartialValues + i + v * W, sums[r][v]);
}

// R rows from `row` on. scales: of codes, else null. queries: [R][padded].
template <int R, class Kv>
inline void attend_rows(const Rows& rows, uint32_t row, uint32_t start, const Part<Kv>& part, const Part<Kv>& next,
                        const Scales* scales, const float* queries, uint32_t d, uint32_t padded, float* partials) {
  alignas(64) float scores[R][kPart];
  const PhModel* m = rows.job->model;
  Seen seen[R], any = {kPart, 0};
  for (int r = 0; r < R; ++r) {
    seen[r] = seen_by(m, rows.query(row + r).position, start);
    if (seen[r].begin >= seen[r].end) continue;
    any.begin = seen[r].begin < any.begin ? seen[r].begin : any.begin;
    any.end = seen[r].end > any.end ? seen[r].end : any.end;
  }
  if (any.begin >= any.end) return;
  for (uint32_t t = 0; t < kPart; t += W)
    if (t + W > any.begin && t < any.end) score<R>(part, next, t, queries, d, padded, scales, scores);
  for (int r = 0; r < R; ++r) {
    soften(m, scores[r], seen[r], partials + r * rows.stride);
    if (scales == nullptr) continue;
    for (uint32_t t = 0; t < kPart; t += W) store(scores[r] + t, load(scores[r] + t) * load(scales->values + t));
  }
  uint32_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) weigh<R, 4>(part, next, any, scores, i, rows.stride, partials);
  for (; i + 2 * W <= d; i += 2 * W) weigh<R, 2>(part, next, any, scores, i, rows.stride, partials);
  for (; i < d; i += W) weigh<R, 1>(part, next, any, scores, i, rows.stride, partials);
  for (int r = 0; r < R; ++r)
    if (seen[r].begin < seen[r].end) combine(rows.at(row + r), partials + r * rows.stride, rows.stride);
}

// The seen positions of a part as floats, each padded with zeros; codes without their scales.
template <class Kv>
inline void convert_part(const Part<Kv>& part, const float* zeros, uint32_t d, uint32_t padded, float* memory,
                         Part<float>* converted) {
  for (uint32_t t = 0; t < kPart; ++t) {
    converted->keys[t] = converted->values[t] = zeros;
    if (t < part.seen.begin || t >= part.seen.end) continue;
    for (uint32_t which = 0; which < 2; ++which) {
      const Kv* from = which ? part.values[t] : part.keys[t];
      float* to = memory + (size_t{which} * kPart + t) * padded;
      uint32_t i = 0;
      for (; i + W <= d; i += W) store(to + i, load(from + i));
      for (; i < padded; ++i) to[i] = i < d ? to_float(from[i]) : 0.0f;
      (which ? converted->values[t] : converted->keys[t]) = to;
    }
  }
}

template <class Kv>
inline void attend_in_float(const Attention* job, Rows* rows, float* memory) {
  const uint32_t d = job->model->head_dim, padded = pad16(d);
  float* zeros = memory;
  float* queries = zeros + padded;
  float* partials = queries + size_t{rows->count} * padded;
  float* floats = partials + kAttentionRows * rows->stride;
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  memset(zeros, 0, padded * sizeof(float));
  for (uint32_t row = 0; row < rows->count; ++row) {
    const float* from = rows->query(row).projected + size_t{rows->head(row)} * d;
    for (uint32_t i = 0; i < padded; ++i) queries[row * padded + i] = i < d ? from[i] * scale : 0.0f;
  }
  // Few rows read pages as they are; many rows are worth one conversion, as are heads that are no whole vectors.
  const bool convert = d % W != 0 || (sizeof(Kv) < 4 && rows->count > 2 * kAttentionRows);
  Part<float> converted;
  Scales taken;
  const Scales* scales = sizeof(Kv) == 1 ? &taken : nullptr;
  over_parts<Kv>(job, zeros, rows, [&](uint32_t start, const Part<Kv>& part, const Part<Kv>& next) {
    if constexpr (sizeof(Kv) == 1) take_scales(part, d, &taken);
    if (convert) convert_part(part, zeros, d, padded, floats, &converted);
    in_blocks<kAttentionRows>(rows->count, [&](uint32_t row, auto count) {
      constexpr int R = decltype(count)::value;
      const float* from = queries + size_t{row} * padded;
      if (convert) {
        attend_rows<R>(*rows, row, start, converted, converted, scales, from, padded, padded, partials);
      } else {
        attend_rows<R>(*rows, row, start, part, next, scales, from, d, padded, partials);
      }
    });
  });
}

}  // namespace
