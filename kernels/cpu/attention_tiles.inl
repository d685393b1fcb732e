// Attention by tiles: queries, keys, weights and values of a part are bfloat16, their products and sums are float.
//
// For pages and inputs of bfloat16. Parts, masks and how parts are combined are those of attention.inl. Both products
// are C[rows][N] = A[rows][K] B[K/2][N][2]: scores are queries x keys, with keys transposed on the way out of their
// pages; sums are weights x values, with values paired up. A product adds along K in one order whatever the rows, so a
// decode has the bits of a prefill. Weights are summed as they were rounded: what rounding adds to one side of the
// quotient it adds to the other.
//
// The same with vdpbf16ps in place of tiles was no faster than floats: a prompt of 512 took as long, a decode longer.

namespace {

constexpr uint32_t kScoredRows = 32;  // rows that are scored before their values are summed
constexpr uint32_t kPairs = kPart / 2;

// --- products ---
//
// c [rows][c_stride] = a [rows][a_stride] b [k / 2][columns][2], columns [0, n); n and k are multiples of 32, rows at
// most 32. Of int8 a word holds four elements, k is a multiple of 64, and c holds the bits of int32.

inline void dot_0(uint16_t) { dot_bfloat16_0(); }
inline void dot_1(uint16_t) { dot_bfloat16_1(); }
inline void dot_2(uint16_t) { dot_bfloat16_2(); }
inline void dot_3(uint16_t) { dot_bfloat16_3(); }
inline void dot_0(int8_t) { dot_int8_0(); }
inline void dot_1(int8_t) { dot_int8_1(); }
inline void dot_2(int8_t) { dot_int8_2(); }
inline void dot_3(int8_t) { dot_int8_3(); }

template <class Element>
inline void product(const Element* a, uint32_t a_stride, const Element* b, uint32_t columns, float* c,
                    uint32_t c_stride, uint32_t rows, uint32_t n, uint32_t k) {
  constexpr uint32_t word = 4 / sizeof(Element), row = kTileRow / sizeof(Element);
  const bool both = rows > 16;
  for (uint32_t i = 0; i < n; i += 32) {
    clear_tile0();
    clear_tile1();
    clear_tile2();
    clear_tile3();
    for (uint32_t j = 0; j < k; j += row) {
      const Element* from = b + (size_t{j} / word * columns + i) * word;
      load_tile6(from, size_t{columns} * 4);
      load_tile7(from + row, size_t{columns} * 4);
      load_tile4(a + j, a_stride * sizeof(Element));
      dot_0(Element{});
      dot_1(Element{});
      if (!both) continue;
      load_tile5(a + size_t{16} * a_stride + j, a_stride * sizeof(Element));
      dot_2(Element{});
      dot_3(Element{});
    }
    store_tile0(c + i, c_stride);
    store_tile1(c + i + 16, c_stride);
    if (!both) continue;
    store_tile2(c + size_t{16} * c_stride + i, c_stride);
    store_tile3(c + size_t{16} * c_stride + i + 16, c_stride);
  }
}

// --- from pages into blocks ---

typedef uint16_t vh2 __attribute__((vector_size(W * 4)));  // pairs of bfloat16

#ifdef __clang__
#define SHUFFLE_WORDS(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE_WORDS(x, y, ...) __builtin_shuffle(x, y, (vh2){__VA_ARGS__})
#endif

// 32 elements from `from` on, those from `count` on 0.
inline vu load_pairs(const uint16_t* from, uint32_t count) {
  if (count >= 2 * W) return *reinterpret_cast<const vu_unaligned*>(from);
  alignas(64) uint16_t some[2 * W] = {};
  memcpy(some, from, count * sizeof(uint16_t));
  return *reinterpret_cast<const vu_unaligned*>(some);
}

inline void store_pairs(uint16_t* to, vu pairs) { *reinterpret_cast<vu_unaligned*>(to) = pairs; }

// Within each quarter of four lanes: lanes of x and y in turns, of the lower two or the upper two.
template <int... I>
inline void mix_lanes(vu& x, vu& y, std::integer_sequence<int, I...>) {
  const vu low = SHUFFLE(x, y, (I / 4 * 4 + I % 4 / 2 + (I % 2 ? W : 0))...);
  y = SHUFFLE(x, y, (I / 4 * 4 + 2 + I % 4 / 2 + (I % 2 ? W : 0))...);
  x = low;
}
// Pairs of lanes in turns.
template <int... I>
inline void mix_pairs(vu& x, vu& y, std::integer_sequence<int, I...>) {
  const vu low = SHUFFLE(x, y, (I / 4 * 4 + I % 2 + (I % 4 / 2 ? W : 0))...);
  y = SHUFFLE(x, y, (I / 4 * 4 + 2 + I % 2 + (I % 4 / 2 ? W : 0))...);
  x = low;
}
// Quarters 0 and 2 of both, and quarters 1 and 3.
template <int... I>
inline void mix_quarters(vu& x, vu& y, std::integer_sequence<int, I...>) {
  const vu even = SHUFFLE(x, y, (I % 4 + I / 4 % 2 * 8 + (I / 8 ? W : 0))...);
  y = SHUFFLE(x, y, (I % 4 + 4 + I / 4 % 2 * 8 + (I / 8 ? W : 0))...);
  x = even;
}

// 16 x 16 words of 32 bits.
inline void transpose(vu (&v)[16]) {
  const auto lanes = std::make_integer_sequence<int, W>{};
  for (int i = 0; i < 16; i += 2) mix_lanes(v[i], v[i + 1], lanes);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) mix_pairs(v[i + j], v[i + j + 2], lanes);
  // v[4 i + {0, 2, 1, 3}[c]] now has, in quarter q, column 4 q + c of rows [4 i, 4 i + 4).
  for (int c = 0; c < 4; ++c) {
    mix_quarters(v[c], v[c + 4], lanes);
    mix_quarters(v[c + 8], v[c + 12], lanes);
    mix_quarters(v[c], v[c + 8], lanes);       // columns of quarters 0 and 2
    mix_quarters(v[c + 4], v[c + 12], lanes);  // of 1 and 3
  }
}

// The vector that holds a column after transpose().
constexpr int transposed(int column) {
  constexpr int order[4] = {0, 2, 1, 3};
  return order[column % 4] + column / 4 % 2 * 4 + column / 8 * 8;
}

// keys [depth / 2][kPart][2], of `count` positions, a multiple of 16. The next part is fetched meanwhile.
inline void take_keys(const Part<uint16_t>& part, const Part<uint16_t>& next, uint32_t count, uint32_t d,
                      uint16_t* keys) {
  for (uint32_t t = 0; t < count; t += 16) {
    for (uint32_t i = 0; i < d; i += 32) {
      vu v[16];
      for (uint32_t p = 0; p < 16; ++p) {
        __builtin_prefetch(next.keys[t + p] + i, 0, 2);
        v[p] = load_pairs(part.keys[t + p] + i, d - i);
      }
      transpose(v);
      uint16_t* to = keys + (size_t{i} / 2 * kPart + t) * 2;
      for (int c = 0; c < 16; ++c) store_pairs(to + size_t(c) * 2 * kPart, v[transposed(c)]);
    }
  }
}

// Elements of x and y in turns, of their low or high halves.
template <int... I>
inline void pair_up(vh2 x, vh2 y, vu* low, vu* high, std::integer_sequence<int, I...>) {
  *low = reinterpret_cast<vu>(SHUFFLE_WORDS(x, y, (I / 2 + (I % 2 ? 2 * W : 0))...));
  *high = reinterpret_cast<vu>(SHUFFLE_WORDS(x, y, (I / 2 + W + (I % 2 ? 2 * W : 0))...));
}

// values [pairs][width][2].
inline void take_values(const Part<uint16_t>& part, const Part<uint16_t>& next, uint32_t count, uint32_t d,
                        uint32_t width, uint16_t* values) {
  for (uint32_t t = 0; t < count; t += 2) {
    const uint16_t *even = part.values[t], *odd = part.values[t + 1];
    uint16_t* to = values + size_t{t / 2} * width * 2;
    for (uint32_t i = 0; i < d; i += 32) {
      vu low, high;
      __builtin_prefetch(next.values[t] + i, 0, 2);
      __builtin_prefetch(next.values[t + 1] + i, 0, 2);
      pair_up(reinterpret_cast<vh2>(load_pairs(even + i, d - i)), reinterpret_cast<vh2>(load_pairs(odd + i, d - i)),
              &low, &high, std::make_integer_sequence<int, 2 * W>{});
      store_pairs(to + 2 * i, low);
      store_pairs(to + 2 * i + 32, high);
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
inline void soften_for_tiles(const float* scores, const Seen* seen, uint32_t rows, uint32_t count, float scale,
                             uint16_t* weights, float* largest, float* sums) {
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
  }
  fold_all<Largest, W, kSoftenedRows>(joined);
  const float factor = scale * kLog2E;
  const vf most = joined[0] * scale, offsets = most * kLog2E;
  for (uint32_t row = 0; row < rows; ++row) {
    const float* from = scores + row * kPart;
    uint16_t* to = weights + row * kPart;
    Visible<All> visible(seen[row]);
    dot_f total = {};
    for (uint32_t t = 0; t < count; t += 2 * W) {
      const vf low = visible.next(exponential2(load(from + t) * factor - offsets[row]), 0.0f);
      const vf high = visible.next(exponential2(load(from + t + W) * factor - offsets[row]), 0.0f);
      const dot_u pairs = to_bfloat16_pairs(low, high);
      total = bfloat16_dot(total, kBfloat16Ones, pairs);
      store_pairs(to + t, pairs);
    }
    joined[row] = total;
  }
  fold_all<Sum, W, kSoftenedRows>(joined);
  store(largest, most);
  store(sums, joined[0]);
}

__attribute__((noinline)) void soften_for_tiles(const PhModel* m, float* scores, const Seen* seen, uint32_t rows,
                                                uint32_t count, float scale, uint16_t* weights, float* largest,
                                                float* sums) {
  if (m->logit_softcap != 0.0f) {
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t t = seen[row].begin; t < seen[row].end; ++t)
        scores[row * kPart + t] = m->logit_softcap * tanhf(scores[row * kPart + t] * scale / m->logit_softcap);
    scale = 1.0f;
  }
  bool all = true;
  for (uint32_t row = 0; row < rows; ++row) all = all && seen[row].begin == 0 && seen[row].end == kPart;
  if (all) return soften_for_tiles<true>(scores, seen, rows, kPart, scale, weights, largest, sums);
  soften_for_tiles<false>(scores, seen, rows, count, scale, weights, largest, sums);
}

// What rows from `row` on have, and these partials.
inline void combine_rows(const Rows& rows, uint32_t row, const Seen* seen, uint32_t count, const float* partials) {
  alignas(64) float more[kSoftenedRows] = {}, share[kSoftenedRows];
  for (uint32_t r = 0; r < count; ++r) more[r] = more_of(rows.at(row + r), partials + r * rows.stride);
  store(share, share_of(load(more)));
  for (uint32_t r = 0; r < count; ++r)
    if (seen[r].begin < seen[r].end)
      combine(rows.at(row + r), partials + r * rows.stride, more[r], share[r], rows.stride);
}

// --- a piece of work ---

inline void attend_in_tiles(const Attention* job, Rows* rows, float* memory) {
  const uint32_t d = job->model->head_dim, depth = pad32(d), padded = pad16(rows->count);
  const auto take = [&](size_t floats) {
    float* taken = memory;
    memory += floats;
    return taken;
  };
  const auto take_halves = [&](size_t count) { return reinterpret_cast<uint16_t*>(take(count / 2)); };
  uint16_t* queries = take_halves(size_t{rows->count} * depth);
  uint16_t* zeros = take_halves(depth);
  uint16_t* keys = take_halves(size_t{depth} * kPart);
  uint16_t* values = take_halves(size_t{depth} * kPart);
  float* scores = take(kScoredRows * kPart);
  uint16_t* weights = take_halves(size_t{rows->count} * kPart);
  float *largest = take(padded), *sums = take(padded);
  float* partials = take(size_t{kScoredRows} * rows->stride);
  uint32_t* positions = reinterpret_cast<uint32_t*>(take(padded));
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  memset(zeros, 0, depth * sizeof(uint16_t));
  for (uint32_t row = 0; row < rows->count; ++row) {
    const Query& query = rows->query(row);
    const float* from = query.projected + size_t{rows->head(row)} * d;
    uint16_t* to = queries + size_t{row} * depth;
    over(d, [&](uint32_t i, auto as) { store(to + i, load_as(as, from + i)); });
    memset(to + d, 0, (depth - d) * sizeof *to);
    positions[row] = query.position;
  }
  // f(first row, rows, what they see, until where): blocks of rows that see any of a part.
  const auto over_rows = [&](uint32_t start, auto&& f) {
    for (uint32_t row = 0; row < rows->count; row += kScoredRows) {
      const uint32_t size = rows->count - row < kScoredRows ? rows->count - row : kScoredRows;
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
  // All weights before any value: keys, then values stay in the first-level cache while rows go by.
  over_parts<uint16_t>(job, zeros, rows, [&](uint32_t start, const Part<uint16_t>& part, const Part<uint16_t>& next) {
    take_keys(part, next, pad32(part.seen.end), d, keys);
    over_rows(start, [&](uint32_t row, uint32_t size, const Seen* seen, uint32_t count) {
      product(queries + size_t{row} * depth, depth, keys, kPart, scores, kPart, size, count, depth);
      by_softened(size, [&](uint32_t r, uint32_t some) {
        soften_for_tiles(job->model, scores + r * kPart, seen + r, some, count, scale,
                         weights + size_t{row + r} * kPart, largest + row + r, sums + row + r);
      });
    });
    take_values(part, next, pad32(part.seen.end), d, depth, values);
    over_rows(start, [&](uint32_t row, uint32_t size, const Seen* seen, uint32_t count) {
      product(weights + size_t{row} * kPart, kPart, values, depth, partials + kPartialValues, rows->stride, size, depth,
              count);
      for (uint32_t r = 0; r < size; ++r) {
        partials[r * rows->stride] = largest[row + r];
        partials[r * rows->stride + 1] = sums[row + r];
      }
      by_softened(size, [&](uint32_t r, uint32_t some) {
        combine_rows(*rows, row + r, seen + r, some, partials + r * rows->stride);
      });
    });
  });
}

}  // namespace
