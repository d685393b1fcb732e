// Linears by blocks of integers: 32 inputs of an output have codes of 4 or 8 bits without signs, a scale and a least
// value (integer_blocks.py), and 32 inputs of a row have codes of 8 bits and a factor.
//
//   sum of weight * input = scale * factor * (sum of products of codes) + least * factor * (sum of the inputs' codes)
//
// Sums of products of codes are exact. An output adds its blocks one after the other, in two steps each, whatever the
// number of rows and however they are grouped.

namespace {

// --- rows to codes ---

// A row [n] of what a table's linears take into codes [padded] with zeros behind, 32 at a time by the largest of them.
// factors: [2][blocks], the factors, and then these times the sums of codes.
template <class T>
void round_blocks(const void* row, uint32_t n, uint32_t padded, int8_t* codes, float* factors) {
  constexpr uint32_t kVectors = kBlock / W;
  const T* values = static_cast<const T*>(row);
  const uint32_t blocks = (n + kBlock - 1) / kBlock;
  for (uint32_t b = 0; b < blocks; ++b, values += kBlock, codes += kBlock) {
    const uint32_t count = n - b * kBlock < kBlock ? n - b * kBlock : kBlock;
    alignas(64) float rest[kBlock] = {};
    for (uint32_t i = 0; count < kBlock && i < count; ++i) rest[i] = to_float(values[i]);
    vf v[kVectors];
    vi most = vi{}, total = vi{};
    for (uint32_t i = 0; i < kVectors; ++i) {
      v[i] = count < kBlock ? load(rest + i * W) : load(values + i * W);
      most = most_of(most, v[i]);
    }
    const float largest = largest_of(most), inverse = largest < kLeastRounded ? 0.0f : 127.0f / largest;
    for (uint32_t i = 0; i < kVectors; ++i) {
      const vi whole = whole_of(v[i], inverse);
      store_codes(codes + i * W, whole);
      total += whole;
    }
    factors[b] = largest / 127.0f;
    factors[blocks + b] = factors[b] * static_cast<float>(sum_of(total));
  }
  memset(codes, 0, padded - blocks * kBlock);
}

// --- products ---

// Sums of products of four codes in each lane: add() the products of w, of weights, without signs and below 16 if they
// are `Narrow`, and x, of inputs, the same for all lanes; then take() a block's.
template <bool Narrow>
struct BlockSums {
#if W == 16 && !defined(PAGEHOLD_EMULATE)
  static inline vi add(vi sums, vu w, uint32_t x) {
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(static_cast<int>(x)));
  }
#elif W == 16
  static inline vi add(vi sums, vu w, uint32_t x) {
    for (int shift = 24; shift >= 0; shift -= 8)
      sums += (static_cast<int32_t>(x << shift) >> 24) * reinterpret_cast<vi>(w << shift >> 24);
    return sums;
  }
#elif W == 8
  static inline vi add(vi sums, vu w, uint32_t x) {
    const __m256i inputs = _mm256_set1_epi32(static_cast<int>(x)), weights = (__m256i)w;
    return (vi)_mm256_add_epi32(
        (__m256i)sums,
        _mm256_add_epi32(_mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8),
                                           _mm256_and_si256(weights, _mm256_set1_epi16(0xff))),
                         _mm256_madd_epi16(_mm256_srai_epi16(inputs, 8), _mm256_srli_epi16(weights, 8))));
  }
#else
  static inline vi add(vi sums, vu w, uint32_t x) {
    const __m128i inputs = _mm_set1_epi32(static_cast<int>(x)), weights = (__m128i)w;
    const __m128i even =
        _mm_madd_epi16(_mm_srai_epi16(_mm_slli_epi16(inputs, 8), 8), _mm_and_si128(weights, _mm_set1_epi16(0xff)));
    const __m128i odd = _mm_madd_epi16(_mm_srai_epi16(inputs, 8), _mm_srli_epi16(weights, 8));
    return sums + ((vi)even + (vi)odd);
  }
#endif
  static inline vi take(vi sums) { return sums; }
};

#if W == 8
// In halves of lanes, which hold a block's: 16 products of at most 15 * 127.
template <>
struct BlockSums<true> {
  static inline vi add(vi sums, vu w, uint32_t x) {
    const __m256i products = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(static_cast<int>(x)));
    return (vi)_mm256_add_epi16((__m256i)sums, products);
  }
  static inline vi take(vi sums) { return (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
};
#endif

// R rows from `row` on, and V vectors of outputs from `n` on, by a panel; sums: [R][kPanelVectors] from there.
template <uint32_t encoding, int R, int V>
__attribute__((noinline)) void block_tile(const Linear* job, uint32_t row, const uint8_t* panel, uint32_t n, vf* sums) {
  constexpr uint32_t kBytes = packed_block_size(encoding);
  constexpr bool kFour = has_least(encoding);
  typedef BlockSums<kFour> Sums;
  const uint32_t blocks = blocks_of(encoding, job->pairs);
  const size_t stride = size_t{job->stride} * 2;
  const int8_t* x = static_cast<const int8_t*>(job->at) + row * stride;
  const float* factors = job->factors + size_t{row} * 2 * blocks;
  vf acc[R][V] = {};
  for (uint32_t b = 0; b < blocks; ++b, x += kBlock, ++factors, panel += kBytes) {
    if (n == 0) fetch(panel + kFetchBlocks * kBytes, kBytes);
    const uint16_t* head = reinterpret_cast<const uint16_t*>(panel) + n;
    const uint8_t* codes = panel + (kFour ? 4 : 2) * kPanel + 4 * n;
    vi whole[R][V] = {};
    const auto add = [&](uint32_t input, const vu(&w)[V]) {
      for (int r = 0; r < R; ++r) {
        uint32_t four;
        memcpy(&four, x + r * stride + input, 4);
        for (int v = 0; v < V; ++v) whole[r][v] = Sums::add(whole[r][v], w[v], four);
      }
    };
    for (uint32_t i = 0; i < kBlock; codes += 4 * kPanel) {
      vu low[V], high[V];
      for (int v = 0; v < V; ++v) {
        const vu both = load_codes(codes + 4 * W * v);
        low[v] = kFour ? both & 0x0f0f0f0fu : both;
        high[v] = both >> 4 & 0x0f0f0f0fu;
      }
      add(i, low);
      i += 4;
      if (!kFour) continue;
      add(i, high);
      i += 4;
    }
    for (int v = 0; v < V; ++v) {
      const vf scale = load_halves(head + v * W), least = kFour ? load_halves(head + kPanel + v * W) : scale * -128.0f;
      for (int r = 0; r < R; ++r) {
        const float* factor = factors + size_t(r) * 2 * blocks;
        acc[r][v] += __builtin_convertvector(Sums::take(whole[r][v]), vf) * (scale * factor[0]);
        acc[r][v] += least * factor[blocks];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r * kPanelVectors + v] = acc[r][v];
}

// As the other inputs of linear.inl; its tiles are block_tile's.
template <uint32_t encoding>
struct BlockInput {
  typedef uint16_t type;
  typedef vf Sum;
  static inline vf output(vf sums, const Linear*, uint32_t, const uint8_t*, uint32_t) { return sums; }
};

}  // namespace
