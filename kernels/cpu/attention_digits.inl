// Attention over int8 pages: codes are multiplied as they lie in pages, by integers, exactly.
//
// Queries and weights are rounded to integers of two digits, each an int8: value = (128 high + low) x a row's factor.
// The digits of a block of rows are the rows of one matrix, high ones first, so that both sums come from one product.
// Integer sums are exact: whatever the batch, the chunk and the order of additions, they are the same. The scales of
// keys are applied to scores, those of values to weights before they are rounded.
//
// |128 high + low| <= 16256 and |code| <= 127: a sum over 1,040 dimensions, or over a part, fits an int32.

namespace {

constexpr uint32_t kDigitRows = 16;          // rows in one product, of two digits each
constexpr float kMostDigits = 127.0f * 128;  // of an integer of two digits

// --- digits ---

inline float inverse_of(float most) { return most < kLeastRounded ? 0.0f : kMostDigits / most; }

// Of values that have signs.
inline void store_digits(vf values, float inverse, int8_t* high, int8_t* low) {
  const vi whole = whole_of(values, inverse), upper = (whole + 64) >> 7;
  store_codes(high, upper + kStoredShift);
  store_codes(low, whole - (upper << 7) + kStoredShift);
}
// Of weights, which have none.
inline void store_weight_digits(vf weights, float inverse, int8_t* high, int8_t* low) {
  const vi whole = whole_of(weights, inverse);
  store_codes(high, whole >> 7);
  store_codes(low, whole & 127);
}

// The sums of both digits, as they lie in what `product` has left.
inline vf load_sums(const float* high, const float* low) {
  return __builtin_convertvector((reinterpret_cast<vi>(load(high)) << 7) + reinterpret_cast<vi>(load(low)), vf);
}

// A head's query [d] into digits [depth], zeros behind. Returns the factor. Not inlined: one way to round.
__attribute__((noinline)) float query_digits(const float* query, uint32_t d, uint32_t depth, int8_t* high,
                                             int8_t* low) {
  memset(high, kStoredShift, depth);
  memset(low, kStoredShift, depth);
  const auto values = [&](uint32_t i) {
    if (i + W <= d) return load(query + i);
    alignas(64) float some[W] = {};
    memcpy(some, query + i, (d - i) * sizeof(float));
    return load(some);
  };
  vi most = vi{};
  for (uint32_t i = 0; i < d; i += W) most = most_of(most, values(i));
  const float largest = largest_of(most), inverse = inverse_of(largest);
  for (uint32_t i = 0; i < d; i += W) store_digits(values(i), inverse, high + i, low + i);
  return largest / kMostDigits;
}

// --- softmax of one part ---

// The larger as bits: NaN is above all. Of weights, which have no sign.
struct Heaviest {
  static vf of(vf x, vf y) { return reinterpret_cast<vf>(most_of(reinterpret_cast<vi>(x), y)); }
};

static_assert(kDigitRows <= kSoftenedRows, "lanes of what rows have");

// What rows have of a part, by row: the largest score, the sum of weights before values' scales, and the factor of the
// weights' digits.
struct Softened {
  alignas(64) float largest[kSoftenedRows], sums[kSoftenedRows], factors[kSoftenedRows];
};

// Scores of rows, [rows][kPart], and what each is multiplied by, [kSoftenedRows], into the digits of weights; scores
// are changed. Positions that a row does not see have weight 0. All: there is none. count: a multiple of 64.
template <bool All>
inline void soften_scores(float* scores, const float* factors, const Scales& scales, const Seen* seen, uint32_t rows,
                          uint32_t count, Ahead<int8_t>& ahead, int8_t* weights, Softened* softened) {
  vf joined[kSoftenedRows] = {}, heaviest[kSoftenedRows] = {};
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
  const vf most = joined[0] * load(factors), offsets = most * kLog2E, steps = load(factors) * kLog2E;
  for (uint32_t row = 0; row < rows; ++row) {
    float* at = scores + row * kPart;
    Visible<All> visible(seen[row]);
    if (row % 4 == 0) stay_awake();
    vf total = vf{}, heavy = vf{};
    for (uint32_t t = 0; t < count; t += W) {
      // A scale that nobody sees may be anything.
      const vf p = exponential2(load(at + t) * steps[row] - offsets[row]);
      Visible<All> here = visible;
      const vf weight = here.next(p * load(scales.values + t), 0.0f);
      total += visible.next(p, 0.0f);
      heavy = Heaviest::of(heavy, weight);
      store(at + t, weight);
    }
    joined[row] = total;
    heaviest[row] = heavy;
    ahead.fetch(kFetched);
  }
  fold_all<Sum, W, kSoftenedRows>(joined);
  fold_all<Heaviest, W, kSoftenedRows>(heaviest);
  const vf inverses = heaviest[0] < splat(kLeastRounded) ? vf{} : kMostDigits / heaviest[0];
  for (uint32_t row = 0; row < rows; ++row) {
    const float* from = scores + row * kPart;
    if (row % 4 == 0) stay_awake();
    int8_t *high = weights + row * kPart, *low = high + rows * kPart;
    for (uint32_t t = 0; t < count; t += W) store_weight_digits(load(from + t), inverses[row], high + t, low + t);
  }
  store(softened->largest, most);
  store(softened->sums, joined[0]);
  store(softened->factors, heaviest[0] * (1.0f / kMostDigits));
}

// Sums of both digits of rows' scores, [2][rows][kPart], into the digits of their weights. factors: of rows' queries.
__attribute__((noinline)) void soften_digits(const PhModel* m, float* scores, const float* factors,
                                             const Scales& scales, const Seen* seen, uint32_t rows, uint32_t count,
                                             Ahead<int8_t>& ahead, int8_t* weights, Softened* softened) {
  alignas(64) float scale[kSoftenedRows] = {};
  memcpy(scale, factors, rows * sizeof(float));
  bool all = true;
  for (uint32_t row = 0; row < rows; ++row) {
    float *high = scores + row * kPart, *low = high + rows * kPart;
    if (row % 4 == 0) stay_awake();
    ahead.fetch(kFetched);
    for (uint32_t t = 0; t < count; t += W) store(high + t, load_sums(high + t, low + t) * load(scales.keys + t));
    all = all && seen[row].begin == 0 && seen[row].end == kPart;
    if (m->logit_softcap == 0.0f) continue;
    for (uint32_t t = seen[row].begin; t < seen[row].end; ++t)
      high[t] = m->logit_softcap * tanhf(high[t] * scale[row] / m->logit_softcap);
    scale[row] = 1.0f;
  }
  if (all) return soften_scores<true>(scores, scale, scales, seen, rows, kPart, ahead, weights, softened);
  soften_scores<false>(scores, scale, scales, seen, rows, count, ahead, weights, softened);
}

// --- a piece of work ---

inline void attend_in_digits(const Attention* job, Heads* heads, float* memory) {
  const uint32_t d = job->model->head_dim, depth = pad64(d), width = pad32(d);
  const uint32_t rows_of_head = heads->rows[0].count, padded = pad16(rows_of_head);
  const auto take = [&](size_t floats) {
    float* from = memory;
    memory += floats;
    return from;
  };
  const auto take_codes = [&](size_t bytes) { return reinterpret_cast<int8_t*>(take(bytes / sizeof(float))); };
  const size_t queries_size = size_t{padded} * 2 * depth;
  float* factors = take(heads->count * padded);               // [heads][rows]
  int8_t* queries = take_codes(heads->count * queries_size);  // of each head and block [digit][rows][depth]
  int8_t* keys = take_codes(size_t{depth} * kPart);
  int8_t* taken = take_codes(size_t{width} * kPart);
  int8_t* weights = take_codes(2 * kDigitRows * kPart);
  float* scores = take(2 * kDigitRows * kPart);
  float* sums = take(size_t{2} * kDigitRows * width);
  float* partials = take(size_t{kDigitRows} * heads->rows[0].stride);
  Scales scales;
  const auto rows_from = [&](uint32_t row) {
    return rows_of_head - row < kDigitRows ? rows_of_head - row : kDigitRows;
  };
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  for (uint32_t head = 0; head < heads->count; ++head)
    heads->rows[head].over([&](uint32_t row, const Query& query, uint32_t query_head) {
      const uint32_t block = row / kDigitRows * kDigitRows;
      int8_t* high = queries + head * queries_size + (size_t{2} * block + row - block) * depth;
      const float* from = query.projected + size_t{query_head} * d;
      factors[head * padded + row] =
          query_digits(from, d, depth, high, high + size_t{rows_from(block)} * depth) * scale;
    });
  shape_tiles(2 * rows_from(0));
  over_parts<int8_t>(
      job, memory, heads, [&](uint32_t head, uint32_t start, const Part<int8_t>& part, Ahead<int8_t>& ahead) {
        Rows& rows = heads->rows[head];
        const int8_t* its_queries = queries + head * queries_size;
        const float* its_factors = factors + head * padded;
        const Part<int8_t> deep = deepened(part, d, depth, keys);
        take_scales(part, &scales);
        const int8_t* values[kRuns] = {};
        for (uint32_t row = 0; row < rows_of_head; row += kDigitRows) {
          const uint32_t size = rows_from(row);
          Seen seen[kDigitRows];
          uint32_t count = 0;
          for (uint32_t r = 0; r < size; ++r) {
            seen[r] = seen_by(job->model, rows.query(row + r).position, start);
            if (seen[r].begin < seen[r].end && seen[r].end > count) count = seen[r].end;
          }
          if (count == 0) continue;
          count = pad64(count);
          shape_tiles(2 * size);
          score_block(its_queries + size_t{2} * row * depth, deep, ahead, depth, scores, 2 * size, count);
          Softened softened;
          soften_digits(job->model, scores, its_factors + row, scales, seen, size, count, ahead, weights, &softened);
          if (values[0] == nullptr)
            take_values(part, ahead, rows_of_head, pad64(part.seen.end), d, width, taken, values);
          weigh_block(weights, values, ahead, width, sums, width, 2 * size, count);
          float* to = place_partials(rows, row, partials);
          for (uint32_t r = 0; r < size; ++r) {
            float* partial = to + r * rows.stride;
            partial[0] = softened.largest[r];
            partial[1] = softened.sums[r];
            for (uint32_t i = 0; i < width; i += W)
              store(partial + kPartialValues + i,
                    load_sums(sums + r * width + i, sums + (size + r) * width + i) * softened.factors[r]);
          }
          combine_rows(rows, row, seen, size, to);
        }
        if (head + 1 == heads->count) ahead.fetch_rest();
      });
}

}  // namespace
