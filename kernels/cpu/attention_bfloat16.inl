// Attention in bfloat16: queries, keys, weights and values of a part are bfloat16, their products and sums are float.
//
// For pages and inputs of bfloat16. Parts, masks and how parts are combined are those of attention.inl. Both products
// (product_tiles.inl, product_dots.inl) take keys and values as they lie in pages: scores are queries x keys, sums are
// weights x values. Keys are multiplied in their pages. Values are copied first (take_values) where what is seen ends
// within a run, for what nobody sees must be 0, and where a product wants them side by side: a tile takes more
// positions than a page may have. A product adds along K in one order whatever the rows, so a decode has the bits of a
// prefill. Weights are summed as they were rounded: what rounding adds to one side of the quotient it adds to the
// other.

namespace {

constexpr uint32_t kScoredRows = 32;  // rows that are scored before their values are summed

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

// --- products ---

template <class Kv>
inline void score_block(const Kv* queries, const Part<Kv>& part, Ahead<Kv>& ahead, uint32_t depth, float* scores,
                        uint32_t rows, uint32_t count) {
  const auto at = [&](uint32_t i, uint32_t j) { return part.keys[i / kRun] + size_t{j} * part.stride; };
  product<true>(queries, depth, part.stride, at, ahead, scores, kPart, rows, count, depth);
}

// values: of each run [kRun / E][width] words.
template <class Kv>
inline void weigh_block(const Kv* weights, const Kv* const* values, Ahead<Kv>& ahead, uint32_t width, float* sums,
                        uint32_t sums_stride, uint32_t rows, uint32_t count) {
  const auto at = [&](uint32_t i, uint32_t j) { return values[j / kRun] + i * kWord<Kv>; };
  product<false>(weights, kPart, width, at, ahead, sums, sums_stride, rows, width, count);
}

// --- from pages into blocks ---

inline void store_words(void* to, vu words) { *static_cast<vu_unaligned*>(to) = words; }
inline void copy_words(void* to, const void* from, uint32_t count) {
  uint8_t* bytes = static_cast<uint8_t*>(to);
  const uint8_t* others = static_cast<const uint8_t*>(from);
  uint32_t i = 0;
  for (; i + W <= count; i += W) store_words(bytes + i * 4, load_words(others + i * 4));
  if (i < count) memcpy(bytes + i * 4, others + i * 4, (count - i) * 4);
}

// A part whose keys have `depth` dimensions, with zeros behind those that there are: itself where there are as many.
template <class Kv>
inline Part<Kv> deepened(const Part<Kv>& part, uint32_t d, uint32_t depth, Kv* memory) {
  constexpr uint32_t E = kWord<Kv>;
  Part<Kv> deep = part;
  if (d == depth) return deep;
  deep.stride = kPart;
  for (uint32_t run = part.first; run < part.last; ++run) {
    Kv* to = memory + size_t{run} * kRun * E;
    deep.keys[run] = to;
    for (uint32_t i = 0; i < depth; i += E, to += size_t{kPart} * E) {
      if (i < d) {
        copy_words(to, part.keys[run] + size_t{i} * part.stride, kRun);
      } else {
        memset(to, 0, kRun * 4);
      }
    }
  }
  deep.fill();
  return deep;
}

// Where the words of values of `count` positions lie, a whole number of runs: [kRun / E][width] of each. In pages, or
// in memory [count / E][width], padded with zeros as positions are that nobody sees. rows: of the job, all that are
// multiplied by them.
template <class Kv>
inline void take_values(const Part<Kv>& part, Ahead<Kv>& ahead, uint32_t rows, uint32_t count, uint32_t d,
                        uint32_t width, Kv* memory, const Kv** values) {
  constexpr uint32_t E = kWord<Kv>;
  const uint32_t words = kRun / E * d;  // of a run
  for (uint32_t t = 0; t < count; t += kRun) {
    Kv* to = memory + size_t{t} * width;
    const Kv* from = part.values[t / kRun];
    const Seen& seen = part.seen;
    const bool whole = t >= seen.begin && t + kRun <= seen.end && d == width;
    const bool stays = whole && rows <= kRowsFromPages;
    values[t / kRun] = stays ? from : to;
    if (stays) continue;
    if (t % (kRun * E / 2) == 0) ahead.fetch(kFetched);  // half as much as is copied
    stay_awake();
    if (whole) {
      for (uint32_t i = 0; i < words; i += W) store_words(to + i * E, load_words(from + i * E));
      continue;
    }
    for (uint32_t row = t; row < t + kRun; row += E, to += size_t{width} * E, from += size_t{part.width} * E) {
      memset(to, 0, width * 4);
      if (row + E <= seen.begin || row >= seen.end) continue;
      copy_words(to, from, d);
      for (uint32_t e = 0; e < E; ++e)
        if (row + e < seen.begin || row + e >= seen.end)
          for (uint32_t i = 0; i < d; ++i) to[i * E + e] = 0;
    }
  }
}

// --- softmax of one part ---

// W positions after W positions of a part, of which a row may not see all.
template <bool All>
class Visible {
 public:
  explicit Visible(const Seen& seen) {
    for (uint32_t i = 0; i < W; ++i) position_[i] = i;
    position_ -= seen.begin;
    seen_ += seen.end > seen.begin ? seen.end - seen.begin : 0;
  }
  // x for the next ones, or else `unseen`.
  vf next(vf x, float unseen) {
    if (All) return x;
    const vf visible = position_ < seen_ ? x : splat(unseen);
    position_ += W;
    return visible;
  }

 private:
  vu position_, seen_ = {};
};

constexpr uint32_t kSoftenedRows = W;  // lanes of their largest scores and of their sums

// Scores [rows][kPart] of at most kSoftenedRows rows into weights [rows][kPart], up to `count`, a multiple of 32; and
// into their largest and sum, of kSoftenedRows. Positions that a row does not see have weight 0, whatever their score.
// All: there is none.
template <bool All>
inline void soften_block(const float* scores, const Seen* seen, uint32_t rows, uint32_t count, float scale,
                         Ahead<uint16_t>& ahead, uint16_t* weights, float* largest, float* sums) {
  vf joined[kSoftenedRows];
  for (uint32_t row = rows; row < kSoftenedRows; ++row) joined[row] = vf{};
  for (uint32_t row = 0; row < rows; ++row) {
    const float* from = scores + row * kPart;
    Visible<All> visible(seen[row]);
    vf low = splat(-INFINITY), high = low;
    for (uint32_t t = 0; t < count; t += 2 * W) {
      low = Largest::of(low, visible.next(load(from + t), -INFINITY));
      high = Largest::of(high, visible.next(load(from + t + W), -INFINITY));
    }
    joined[row] = Largest::of(low, high);
    ahead.fetch(kFetched);
  }
  fold_all<Largest, W, kSoftenedRows>(joined);
  const float factor = scale * kLog2E;
  const vf most = joined[0] * scale, offsets = most * kLog2E;
  for (uint32_t row = 0; row < rows; ++row) {
    const float* from = scores + row * kPart;
    uint16_t* to = weights + row * kPart;
    Visible<All> visible(seen[row]);
    if (row % 4 == 0) stay_awake();
    dot_f total = {};
    for (uint32_t t = 0; t < count; t += 2 * W) {
      const vf low = visible.next(exponential2(load(from + t) * factor - offsets[row]), 0.0f);
      const vf high = visible.next(exponential2(load(from + t + W) * factor - offsets[row]), 0.0f);
      const dot_u pairs = to_bfloat16_pairs(low, high);
      total = bfloat16_dot(total, kBfloat16Ones, pairs);
      store_words(to + t, pairs);
    }
    joined[row] = total;
    ahead.fetch(kFetched);
  }
  fold_all<Sum, W, kSoftenedRows>(joined);
  store(largest, most);
  store(sums, joined[0]);
}

__attribute__((noinline)) void soften_block(const PhModel* m, float* scores, const Seen* seen, uint32_t rows,
                                            uint32_t count, float scale, Ahead<uint16_t>& ahead, uint16_t* weights,
                                            float* largest, float* sums) {
  if (m->logit_softcap != 0.0f) {
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t t = seen[row].begin; t < seen[row].end; ++t)
        scores[row * kPart + t] = m->logit_softcap * tanhf(scores[row * kPart + t] * scale / m->logit_softcap);
    scale = 1.0f;
  }
  bool all = true;
  for (uint32_t row = 0; row < rows; ++row) all = all && seen[row].begin == 0 && seen[row].end == kPart;
  if (all) return soften_block<true>(scores, seen, rows, kPart, scale, ahead, weights, largest, sums);
  soften_block<false>(scores, seen, rows, count, scale, ahead, weights, largest, sums);
}

// Where the partials of rows from `row` on are put for combine_rows(): a first part is the row itself.
inline float* place_partials(const Rows& rows, uint32_t row, float* memory) {
  return rows.empty ? rows.at(row) : memory;
}

// What rows from `row` on have, and these partials.
inline void combine_rows(Rows& rows, uint32_t row, const Seen* seen, uint32_t count, const float* partials) {
  if (rows.empty) {
    for (uint32_t r = 0; r < count; ++r)
      if (seen[r].begin >= seen[r].end) rows.clear(row + r);
    return;
  }
  alignas(64) float more[kSoftenedRows] = {}, share[kSoftenedRows];
  for (uint32_t r = 0; r < count; ++r) more[r] = more_of(rows.at(row + r), partials + r * rows.stride);
  store(share, share_of(load(more)));
  stay_awake();
  for (uint32_t r = 0; r < count; ++r)
    if (seen[r].begin < seen[r].end)
      combine(rows.at(row + r), partials + r * rows.stride, more[r], share[r], rows.stride);
}

// --- a piece of work ---

inline void attend_in_bfloat16(const Attention* job, Heads* heads, float* memory) {
  const uint32_t d = job->model->head_dim, depth = pad32(d);
  const uint32_t rows_of_head = heads->rows[0].count, stride = heads->rows[0].stride, padded = pad16(rows_of_head);
  const auto take = [&](size_t floats) {
    float* from = memory;
    memory += floats;
    return from;
  };
  const auto take_halves = [&](size_t count) { return reinterpret_cast<uint16_t*>(take(count / 2)); };
  uint16_t* queries = take_halves(size_t{heads->count} * rows_of_head * depth);  // [heads][rows][depth]
  uint16_t* keys = take_halves(size_t{depth} * kPart);
  uint16_t* taken = take_halves(size_t{depth} * kPart);
  float* scores = take(kScoredRows * kPart);
  uint16_t* weights = take_halves(size_t{rows_of_head} * kPart);
  float *largest = take(padded), *sums = take(padded);
  float* partials = take(size_t{kScoredRows} * stride);
  uint32_t* positions = reinterpret_cast<uint32_t*>(take(padded));
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  for (uint32_t head = 0; head < heads->count; ++head)
    heads->rows[head].over([&](uint32_t row, const Query& query, uint32_t query_head) {
      const float* from = query.projected + size_t{query_head} * d;
      uint16_t* to = queries + (size_t{head} * rows_of_head + row) * depth;
      over(d, [&](uint32_t i, auto as) { store_input(to + i, load_as(as, from + i)); });
      memset(to + d, 0, (depth - d) * sizeof *to);
      positions[row] = query.position;
    });
  // f(first row, rows, what they see, until where): blocks of rows that see any of a part.
  const auto over_rows = [&](uint32_t start, auto&& f) {
    for (uint32_t row = 0; row < rows_of_head; row += kScoredRows) {
      const uint32_t size = rows_of_head - row < kScoredRows ? rows_of_head - row : kScoredRows;
      Seen seen[kScoredRows];
      uint32_t count = 0;
      for (uint32_t r = 0; r < size; ++r) {
        seen[r] = seen_by(job->model, positions[row + r], start);
        if (seen[r].begin < seen[r].end && seen[r].end > count) count = seen[r].end;
      }
      if (count == 0) continue;
      shape_tiles(size);
      f(row, size, seen, pad32(count));
    }
  };
  const auto by_softened = [&](uint32_t size, auto&& f) {
    for (uint32_t r = 0; r < size; r += kSoftenedRows) f(r, size - r < kSoftenedRows ? size - r : kSoftenedRows);
  };
  shape_tiles(rows_of_head < kScoredRows ? rows_of_head : kScoredRows);
  // All weights before any value: keys, then values stay in the first-level cache while rows go by.
  over_parts<uint16_t>(
      job, memory, heads, [&](uint32_t head, uint32_t start, const Part<uint16_t>& part, Ahead<uint16_t>& ahead) {
        Rows& rows = heads->rows[head];
        const uint16_t* its_queries = queries + size_t{head} * rows_of_head * depth;
        const Part<uint16_t> deep = deepened(part, d, depth, keys);
        over_rows(start, [&](uint32_t row, uint32_t size, const Seen* seen, uint32_t count) {
          score_block(its_queries + size_t{row} * depth, deep, ahead, depth, scores, size, count);
          by_softened(size, [&](uint32_t r, uint32_t some) {
            soften_block(job->model, scores + r * kPart, seen + r, some, count, scale, ahead,
                         weights + size_t{row + r} * kPart, largest + row + r, sums + row + r);
          });
        });
        const uint16_t* values[kRuns];
        take_values(part, ahead, rows_of_head, pad32(part.seen.end), d, depth, taken, values);
        over_rows(start, [&](uint32_t row, uint32_t size, const Seen* seen, uint32_t count) {
          float* to = place_partials(rows, row, partials);
          weigh_block(weights + size_t{row} * kPart, values, ahead, depth, to + kPartialValues, stride, size, count);
          for (uint32_t r = 0; r < size; ++r) {
            to[r * stride] = largest[row + r];
            to[r * stride + 1] = sums[row + r];
          }
          by_softened(size,
                      [&](uint32_t r, uint32_t some) { combine_rows(rows, row + r, seen + r, some, to + r * stride); });
        });
        if (head + 1 == heads->count) ahead.fetch_rest();
      });
}

}  // namespace
