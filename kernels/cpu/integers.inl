// Linears by integers: weights are codes of 8 bits with a scale for each output (integers.py), and inputs are rounded
// to such codes with a factor for each row.
//
// Sums of products of codes are exact: they are the same in any order, by any instructions, whatever the batch.

namespace {

// --- rows to codes ---

// In place, vectors of kRotated values `stride` apart: each becomes the sum of all `Count`, with the signs of a row of
// the Hadamard matrix.
template <uint32_t Count>
inline void mix(float* first, uint32_t stride) {
  for (uint32_t i = 0; i < kRotated; i += W) {
    vf v[Count];
    for (uint32_t n = 0; n < Count; ++n) v[n] = load(first + size_t{n} * stride * kRotated + i);
    for (uint32_t half = 1; half < Count; half *= 2) {
      for (uint32_t n = 0; n < Count; ++n) {
        if (n & half) continue;
        const vf sum = v[n] + v[n + half];
        v[n + half] = v[n] - v[n + half];
        v[n] = sum;
      }
    }
    for (uint32_t n = 0; n < Count; ++n) store(first + size_t{n} * stride * kRotated + i, v[n]);
  }
}

template <uint32_t Count>
inline void mix_all(float* values, uint32_t width, uint32_t stride) {
  for (uint32_t n = 0; n < width; n += Count * stride)
    for (uint32_t i = 0; i < stride; ++i) mix<Count>(values + (n + i) * kRotated, stride);
}

// [n / (width * kRotated)][width][kRotated] by the Hadamard matrix of `width`, a power of two up to kMostRotated: what
// one value has beyond the others is spread over `width` of them, so that codes are as fine for the others.
inline void rotate(float* values, uint32_t n, uint32_t width) {
  for (float* end = values + n; values < end; values += width * kRotated) {
    uint32_t stride = 1;
    for (; width / stride >= 8; stride *= 8) mix_all<8>(values, width, stride);
    if (width / stride == 4) mix_all<4>(values, width, stride);
    if (width / stride == 2) mix_all<2>(values, width, stride);
  }
}

// A row [n] of what a table's linears take, rotated, into codes [padded] with zeros behind, all kStoredShift more.
// Returns the factor. scratch: floats, [padded].
template <class T>
float round_row(const void* row, uint32_t n, uint32_t width, uint32_t padded, float* scratch, int8_t* codes) {
  const T* values = static_cast<const T*>(row);
  over(n, [&](uint32_t i, auto as) {
    if constexpr (sizeof as == sizeof(vf)) {
      store(scratch + i, load(values + i));
    } else {
      scratch[i] = to_float(values[i]);
    }
  });
  memset(scratch + n, 0, (padded - n) * sizeof(float));
  if (width > 1) rotate(scratch, n, width);
  vi most = vi{};
  for (uint32_t i = 0; i < padded; i += W) most = most_of(most, load(scratch + i));
  const float largest = largest_of(most), inverse = largest < kLeastRounded ? 0.0f : 127.0f / largest;
  for (uint32_t i = 0; i < padded; i += W) store_codes(codes + i, whole_of(load(scratch + i), inverse) + kStoredShift);
  return largest / 127.0f;
}

// --- products ---

struct PanelHead {
  float scales[kPanel];
  int32_t totals[kPanel];  // of an output's codes
};

inline const PanelHead* head_of(const uint8_t* panel) { return reinterpret_cast<const PanelHead*>(panel); }

// Of a row and W outputs of a panel, from n on.
inline vf scaled(vi sums, const Linear* job, uint32_t row, const PanelHead* head, uint32_t n) {
  return __builtin_convertvector(sums, vf) * (load(head->scales + n) * job->factors[row]);
}

// acc + the products of four codes, in each lane. x: the same four for all lanes, as they are stored.
#if W == 16 && !defined(PAGEHOLD_EMULATE)
inline vi integer_dot(vi acc, uint32_t x, vu w) {
  const __m512i codes = _mm512_set1_epi32(static_cast<int>(kStoredShift == kShift ? x : x ^ 0x80808080u));
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, codes, (__m512i)w);
}
#elif W == 16
inline vi integer_dot(vi acc, uint32_t x, vu w) {
  for (int shift = 24; shift >= 0; shift -= 8)
    acc += (static_cast<int32_t>(x << shift) >> 24) * (reinterpret_cast<vi>(w << shift) >> 24);
  return acc;
}
#else
inline vi integer_dot(vi acc, uint32_t x, vu w) {
#if W == 8
  const __m256i codes = _mm256_set1_epi32(static_cast<int>(x)), weights = (__m256i)w;
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8),
                                         _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srai_epi16(codes, 8), _mm256_srai_epi16(weights, 8));
#else
  const __m128i codes = _mm_set1_epi32(static_cast<int>(x)), weights = (__m128i)w;
  const __m128i even =
      _mm_madd_epi16(_mm_srai_epi16(_mm_slli_epi16(codes, 8), 8), _mm_srai_epi16(_mm_slli_epi16(weights, 8), 8));
  const __m128i odd = _mm_madd_epi16(_mm_srai_epi16(codes, 8), _mm_srai_epi16(weights, 8));
#endif
  return acc + ((vi)even + (vi)odd);
}
#endif

// As the other inputs of linear.inl: a pair is four codes here.
struct IntegerInput {
  typedef uint16_t type;
  typedef vi Sum;
  template <int R, int V>
  static inline void pair(const uint16_t* x, uint32_t stride, const uint16_t* w, vi (&acc)[R][V]) {
    vu weights[V];
    for (int v = 0; v < V; ++v) weights[v] = *reinterpret_cast<const vu_unaligned*>(w + 2 * W * v);
    for (int r = 0; r < R; ++r) {
      uint32_t codes;
      memcpy(&codes, x + size_t(r) * stride, 4);
      for (int v = 0; v < V; ++v) acc[r][v] = integer_dot(acc[r][v], codes, weights[v]);
    }
  }
  static inline vf output(vi whole, const Linear* job, uint32_t row, const uint8_t* panel, uint32_t n) {
    vi totals;
    memcpy(&totals, head_of(panel)->totals + n, sizeof totals);
    if (kShift != 0) whole -= totals * kShift;
    return scaled(whole, job, row, head_of(panel), n);
  }
};

}  // namespace
