// Attention over paged keys and values.
//
// A sequence's positions are reduced in parts of 128 counted from 0, each part alone: a score adds dimension after
// dimension and a weighted sum position after position, each in a single accumulator. Then parts are combined from the
// left. So the pieces of work that a step is cut into change no bit: nor does it matter which rows (a query of one
// head) share the loads, and a position that a row does not see has weight 0, which adds nothing.

namespace {

// --- partial results ---

// Rows of a piece and a kv head, as [rows] of Partial, and what they are made of.
struct Rows {
  const Attention* job = nullptr;
  uint32_t kv_head = 0, group = 0, count = 0, stride = 0;
  float* sums = nullptr;  // [count][stride]
  bool empty = true;      // nothing was added to any

  Rows() = default;
  Rows(const Attention* j, uint32_t head, float* at)
      : job(j),
        kv_head(head),
        group(j->model->heads / j->model->kv_heads),
        count(j->count * group),
        stride(partial_size(j->model->head_dim)),
        sums(at) {
    clear();
  }
  // f(row, its query, its head).
  template <class F>
  void over(F&& f) const {
    for (uint32_t q = 0, row = 0; q < job->count; ++q)
      for (uint32_t g = 0; g < group; ++g, ++row) f(row, job->queries[q], kv_head * group + g);
  }
  float* end() const { return sums + size_t{count} * stride; }
  float* at(uint32_t row) const { return sums + size_t{row} * stride; }
  const Query& query(uint32_t row) const { return job->queries[row / group]; }
  uint32_t head(uint32_t row) const { return kv_head * group + row % group; }
  void clear() {
    empty = true;
    memset(sums, 0, size_t{count} * stride * sizeof(float));
    for (uint32_t row = 0; row < count; ++row) at(row)[0] = -INFINITY;
  }
  void clear(uint32_t row) {
    memset(at(row), 0, stride * sizeof(float));
    at(row)[0] = -INFINITY;
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

// Rows of each kv head of a piece.
struct Heads {
  uint32_t count;
  Rows rows[kMostHeads];

  Heads(const Attention* job, float* at) : count(job->kv_heads) {
    for (uint32_t head = 0; head < count; ++head) {
      rows[head] = Rows(job, job->kv_head + head, at);
      at = rows[head].end();
    }
  }
  float* end() const { return rows[count - 1].end(); }
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
       [&](uint32_t i, auto as) { store_input(out + i, load_as(as, sums + kPartialValues + i) * share + 0.0f); });
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

// --- parts one after the other ---

// f(head, start, part, ahead): parts of the job, each for all heads in turn, and what to fetch meanwhile. memory: of
// gather().
template <class Kv, class F>
inline void over_parts(const Attention* job, float* memory, Heads* heads, F&& f) {
  const size_t plane = plane_size(job);
  Part<Kv> parts[2];
  find_part(job, job->first, parts + job->first % 2);
  for (uint32_t p = job->first; p < job->last; ++p) {
    const Attention* from = p + 1 < job->last ? job : job->following;
    if (from != nullptr) find_part(from, from == job ? p + 1 : from->first, parts + (p + 1) % 2);
    Part<Kv>&part = parts[p % 2], &next = parts[(p + (from != nullptr)) % 2];
    Ahead<Kv> ahead(next, from != nullptr ? from->kv_heads : 0, plane, job->model->head_dim);
    for (uint32_t head = 0; head < heads->count; ++head) {
      Rows& rows = heads->rows[head];
      if (part.seen.begin < part.seen.end) {
        Part<Kv> its = part.behind(head * plane);
        if (runs_are_cut(job)) gather(job, rows.kv_head, p * kPart, &its, memory);
        f(head, p * kPart, its, ahead);
        rows.empty = false;
      }
      if (job->leading) continue;
      rows.keep(p - job->first);
      rows.clear();
    }
  }
  if (!job->leading) return;
  for (uint32_t head = 0; head < heads->count; ++head) {
    heads->rows[head].keep(0);
    for (uint32_t slot = 1; slot < job->last - job->first; ++slot) heads->rows[head].keep_nothing(slot);
  }
}

// --- one part in float ---

constexpr int kAttentionRows = W == 16 ? 6 : 3;  // rows that share loads: with 4 vectors each, 24 or 12 accumulators
constexpr uint32_t kScored = W == 16 ? 2 : 4;    // vectors of positions that are scored at once

// Scores of kScored vectors of positions from `first` on for R rows, times the scales of codes. queries: [R][padded].
template <int R, class Kv>
inline void score(const Part<Kv>& part, const Part<Kv>& next, uint32_t first, const float* queries, uint32_t d,
                  uint32_t padded, const Scales* scales, float (*scores)[kPart]) {
  constexpr uint32_t E = kWord<Kv>;
  const Kv* from[kScored];
  for (uint32_t v = 0; v < kScored; ++v) from[v] = part.keys[(first + v * W) / kRun] + (first + v * W) % kRun * E;
  vf acc[R][kScored];
  for (int r = 0; r < R; ++r)
    for (uint32_t v = 0; v < kScored; ++v) acc[r][v] = vf{};
  for (uint32_t i = 0; i < d; i += E) {
    vu words[kScored];
    for (uint32_t v = 0; v < kScored; ++v) words[v] = load_words(from[v] + size_t{i} * part.stride);
    for (uint32_t t = 0; t < kScored * W; t += kRun)
      __builtin_prefetch(next.keys[(first + t) / kRun] + size_t{i} * next.stride);
    for (uint32_t e = 0; e < E; ++e) {
      for (int r = 0; r < R; ++r) {
        const vf q = splat(queries[r * padded + i + e]);
        for (uint32_t v = 0; v < kScored; ++v) acc[r][v] += q * element(from[0], words[v], e);
      }
    }
  }
  for (uint32_t v = 0; v < kScored; ++v) {
    const uint32_t at = first + v * W;
    for (int r = 0; r < R; ++r)
      store(scores[r] + at, scales != nullptr ? acc[r][v] * load(scales->keys + at) : acc[r][v]);
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
  constexpr uint32_t E = kWord<Kv>;
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = vf{};
  const auto add = [&](const vu* words, uint32_t t, uint32_t e) {
    float p[R];
    for (int r = 0; r < R; ++r) p[r] = weights[r][t + e];
    for (int v = 0; v < V; ++v) {
      const vf value = element(part.values[0], words[v], e);
      for (int r = 0; r < R; ++r) sums[r][v] += p[r] * value;
    }
  };
  for (uint32_t t = seen.begin / E * E; t < seen.end; t += E) {
    const Kv* from = part.values[t / kRun] + (size_t{t % kRun / E} * part.width + i) * E;
    const Kv* after = next.values[t / kRun] + (size_t{t % kRun / E} * next.width + i) * E;
    vu words[V];
    for (int v = 0; v < V; ++v) words[v] = load_words(from + v * W * E);
    for (uint32_t line = 0; line < V * W; line += 16) __builtin_prefetch(after + line * E);
    if (t >= seen.begin && t + E <= seen.end) {
      for (uint32_t e = 0; e < E; ++e) add(words, t, e);
    } else {  // what nobody sees may be anything
      for (uint32_t e = 0; e < E; ++e)
        if (t + e >= seen.begin && t + e < seen.end) add(words, t, e);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(partials + r * stride + kPartialValues + i + v * W, sums[r][v]);
}

// R rows from `row` on. scales: of codes, else null. queries: [R][padded]. width: of values, whole vectors.
template <int R, class Kv>
inline void attend_rows(const Rows& rows, uint32_t row, uint32_t start, const Part<Kv>& part, const Part<Kv>& next,
                        const Scales* scales, const float* queries, uint32_t padded, uint32_t width, float* partials) {
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
  for (uint32_t t = 0; t < kPart; t += kScored * W)
    if (t + kScored * W > any.begin && t < any.end)
      score<R>(part, next, t, queries, m->head_dim, padded, scales, scores);
  for (int r = 0; r < R; ++r) {
    soften(m, scores[r], seen[r], partials + r * rows.stride);
    if (scales == nullptr) continue;
    for (uint32_t t = 0; t < kPart; t += W) store(scores[r] + t, load(scores[r] + t) * load(scales->values + t));
  }
  uint32_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W) weigh<R, 4>(part, next, any, scores, i, rows.stride, partials);
  for (; i + 2 * W <= width; i += 2 * W) weigh<R, 2>(part, next, any, scores, i, rows.stride, partials);
  for (; i < width; i += W) weigh<R, 1>(part, next, any, scores, i, rows.stride, partials);
  for (int r = 0; r < R; ++r)
    if (seen[r].begin < seen[r].end) combine(rows.at(row + r), partials + r * rows.stride, rows.stride);
}

// The seen runs of a part as floats, values padded with zeros; codes without their scales.
template <class Kv>
inline void convert_part(const Part<Kv>& part, uint32_t d, uint32_t padded, float* memory, Part<float>* converted) {
  constexpr uint32_t E = kWord<Kv>;
  float *keys = memory, *values = memory + size_t{kPart} * padded;
  converted->seen = part.seen;
  converted->first = part.first;
  converted->last = part.last;
  converted->stride = kPart;
  converted->width = padded;
  for (uint32_t run = part.first; run < part.last; ++run) {
    float *to = keys + run * kRun, *rows = values + size_t{run} * kRun * padded;
    for (uint32_t i = 0; i < d; i += E)
      for (uint32_t t = 0; t < kRun; t += W) {
        const vu words = load_words(part.keys[run] + size_t{i} * part.stride + t * E);
        for (uint32_t e = 0; e < E; ++e) store(to + (i + e) * kPart + t, element(part.keys[0], words, e));
      }
    for (uint32_t t = 0; t < kRun; t += E)
      for (uint32_t i = 0; i < padded; i += W) {
        alignas(64) Kv some[W * E] = {};
        const uint32_t left = i >= d ? 0 : d - i < W ? d - i : W;
        memcpy(some, part.values[run] + (size_t{t} / E * part.width + i) * E, left * 4);
        for (uint32_t e = 0; e < E; ++e) store(rows + (t + e) * padded + i, element(some, load_words(some), e));
      }
    converted->place(run, to, rows, nullptr, nullptr);
  }
  converted->fill();
}

template <class Kv>
inline void attend_in_float(const Attention* job, Heads* heads, float* memory) {
  const uint32_t d = job->model->head_dim, padded = pad16(d), rows_of_head = heads->rows[0].count;
  float* queries = memory;  // [heads][rows][padded]
  float* partials = queries + size_t{heads->count} * rows_of_head * padded;
  float* floats = partials + kAttentionRows * heads->rows[0].stride;
  float* gathered = floats + 2 * kPart * size_t{padded};
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  for (uint32_t head = 0; head < heads->count; ++head)
    heads->rows[head].over([&](uint32_t row, const Query& query, uint32_t query_head) {
      const float* from = query.projected + size_t{query_head} * d;
      float* to = queries + (size_t{head} * rows_of_head + row) * padded;
      for (uint32_t i = 0; i < padded; ++i) to[i] = i < d ? from[i] * scale : 0.0f;
    });
  // Few rows read pages as they are; many rows are worth one conversion, as are heads that are no whole vectors.
  const bool convert = d % W != 0 || (sizeof(Kv) < 4 && rows_of_head > 2 * kAttentionRows);
  Part<float> converted;
  Scales taken;
  const Scales* scales = sizeof(Kv) == 1 ? &taken : nullptr;
  over_parts<Kv>(job, gathered, heads, [&](uint32_t head, uint32_t start, const Part<Kv>& part, Ahead<Kv>& ahead) {
    const Rows& rows = heads->rows[head];
    const Part<Kv> next = ahead.part_of(head);
    if constexpr (sizeof(Kv) == 1) take_scales(part, &taken);
    if (convert) convert_part(part, d, padded, floats, &converted);
    in_blocks<kAttentionRows>(rows_of_head, [&](uint32_t row, auto count) {
      constexpr int R = decltype(count)::value;
      const float* from = queries + (size_t{head} * rows_of_head + row) * padded;
      if (convert) {
        attend_rows<R>(rows, row, start, converted, converted, scales, from, padded, padded, partials);
      } else {
        attend_rows<R>(rows, row, start, part, next, scales, from, padded, d, partials);
      }
    });
  });
}

}  // namespace
