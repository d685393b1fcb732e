// Panels of weights as bfloat16 [K/2][32][2], whatever their encoding: blocks of 32 inputs are expanded in the cache.
//
// A block of 32 outputs by 32 inputs: float16 scales [32]; int4 alone: float16 least values [32]; codes. The codes
// of 8 (int4) or 4 (int8) pairs of inputs share 32 bits, so that a shift gives the next pair; packing.py has the order.
// scale * code is exact in float, so that the sum with the least value is rounded once, to what the conversion to
// bfloat16 has: the same weights in fewer bytes.

namespace {

#if W == 16 && defined(__AVX512F__)
// W of them as floats.
inline vf load_halves(const uint16_t* halves) {
  __m256i bits;
  memcpy(&bits, halves, sizeof bits);
  return (vf)_mm512_maskz_cvtph_ps(0xffff, bits);
}
#else
// A float16 in the low half of each lane; neither infinity nor NaN. The exponent's bias is mended by a product, which
// is right for subnormals too.
inline vf half_to_float(vu bits) {
  const vf magnitude = reinterpret_cast<vf>((bits & 0x7fffu) << 13) * 0x1p112f;
  return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | (bits & 0x8000u) << 16);
}
inline vf load_halves(const uint16_t* halves) {
  return half_to_float(__builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(halves), vu));
}
#endif

// Each output's factor beside each of its pair's two inputs: float16 [32] into float [64].
#if W == 16 && defined(__AVX512F__) && !defined(__clang__)
typedef uint16_t halves32 __attribute__((vector_size(64)));

// Of outputs [First, First + 16). Masked by nothing, as in multiply().
template <int First, int... I>
inline void spread_16(halves32 halves, float* to, std::integer_sequence<int, I...>) {
  const halves32 both = __builtin_shuffle(halves, (halves32){(First + I / 2)...});
  __m256i parts[2];
  memcpy(parts, &both, sizeof parts);
  for (int i = 0; i < 2; ++i) store(to + 2 * First + i * W, (vf)_mm512_maskz_cvtph_ps(0xffff, parts[i]));
}

inline void spread(const uint16_t* halves, float* to) {
  typedef std::make_integer_sequence<int, 32> Lanes;
  halves32 all;
  memcpy(&all, halves, sizeof all);
  spread_16<0>(all, to, Lanes{});
  spread_16<16>(all, to, Lanes{});
}
#else
// Lane i has lane First + i / 2 of v.
template <int First, int... I>
inline vf twice(vf v, std::integer_sequence<int, I...>) {
  return SHUFFLE(v, v, (First + I / 2)...);
}

inline void spread(const uint16_t* halves, float* to) {
  typedef std::make_integer_sequence<int, W> Lanes;
  for (uint32_t n = 0; n < kPanel; n += W) {
    const vf factors = load_halves(halves + n);
    store(to + 2 * n, twice<0>(factors, Lanes{}));
    store(to + 2 * n + W, twice<W / 2>(factors, Lanes{}));
  }
}
#endif

// Two vectors of one row, rounded to nearest even.
inline void store_both(uint16_t* to, vf low, vf high) {
#ifdef BFLOAT16_DOT
  const dot_u both = to_bfloat16_pairs(low, high);
  memcpy(to, &both, sizeof both);
#else
  store(to, low);
  store(to + W, high);
#endif
}

inline vf code4(vu codes, uint32_t t) {
#if W == 16 && !defined(__clang__)  // looked up by the low four bits: one instruction instead of two
  constexpr vf kValues = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return __builtin_shuffle(kValues, reinterpret_cast<vi>(codes >> (4 * t)));
#else
  return __builtin_convertvector(reinterpret_cast<vi>(codes >> (4 * t) & 15u), vf);
#endif
}

inline vf code8(vu codes, uint32_t t) {
  return __builtin_convertvector(reinterpret_cast<vi>(codes << (24 - 8 * t)) >> 24, vf);
}

inline vu load_codes(const uint8_t* from) { return *reinterpret_cast<const vu_unaligned*>(from); }

constexpr uint32_t kPanelVectors = kPanel / W;
constexpr uint32_t kBlockValues = kBlock * kPanel;
constexpr uint32_t kFetchBlocks = 4;  // how many blocks ahead of the one that is expanded

inline void fetch(const uint8_t* from, uint32_t bytes) {
  for (uint32_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line, 0, 2);
}

constexpr uint32_t packed_pairs(uint32_t encoding) { return encoding == kPhInt4 ? 8 : 4; }  // of inputs, in a word

template <uint32_t encoding>
inline vf code_of(vu codes, uint32_t t) {
  return encoding == kPhInt4 ? code4(codes, t) : code8(codes, t);
}

// One block: use(pair, column, weights [W], weights [W]) for each pair of inputs in turn and all columns of outputs and
// inputs [32 outputs][2]. Returns the next block.
template <uint32_t encoding, class F>
inline const uint8_t* over_weights(const uint8_t* block, F&& use) {
  constexpr uint32_t kBytes = packed_block_size(encoding), kPairs = packed_pairs(encoding), kVectors = 2 * kPanel / W;
  fetch(block + kFetchBlocks * kBytes, kBytes);
  alignas(64) float scales[2 * kPanel], least[2 * kPanel];
  spread(reinterpret_cast<const uint16_t*>(block), scales);
  if (encoding == kPhInt4) spread(reinterpret_cast<const uint16_t*>(block) + kPanel, least);
  block += (encoding == kPhInt4 ? 4 : 2) * kPanel;
  constexpr uint32_t kGroups = kBlock / 2 / kPairs, kHalf = kGroups * 128;  // bytes of the codes of 16 outputs
  for (uint32_t g = 0; g < kGroups; ++g) {
    vu codes[kVectors];
    for (uint32_t v = 0; v < kVectors; ++v)
      codes[v] = load_codes(block + 128 * g + v * W / 32 * kHalf + v * W % 32 * 4);
#pragma GCC unroll 8  // a shift by a constant is one instruction
    for (uint32_t t = 0; t < kPairs; ++t)
      for (uint32_t v = 0; v < kVectors; v += 2) {
        vf low = code_of<encoding>(codes[v], t) * load(scales + v * W);
        vf high = code_of<encoding>(codes[v + 1], t) * load(scales + (v + 1) * W);
        if (encoding == kPhInt4) low += load(least + v * W), high += load(least + (v + 1) * W);
        use(kPairs * g + t, v * W, low, high);
      }
  }
  return block + 2 * kHalf;
}

// One block into bfloat16 [16][32][2]. Returns the next one.
template <uint32_t encoding>
inline const uint8_t* expand(const uint8_t* block, uint16_t* to) {
  return over_weights<encoding>(block, [&](uint32_t pair, uint32_t column, vf low, vf high) {
    store_both(to + pair * 2 * kPanel + column, low, high);
  });
}

// The panels of a job, `together` of them at a time: 2 for gate and up.
class Panels {
 public:
  Panels(const Linear* job, uint32_t together, uint16_t* expanded)
      : job_(job), together_(together), expanded_(expanded), blocks_((2 * job->pairs + kBlock - 1) / kBlock) {}

  // Nothing is expanded: what lies in memory is multiplied.
  bool ready() const { return job_->weights.encoding == kPhBfloat16 || takes_codes(job_->weights.encoding); }

  // As they lie in memory: the i-th of the panels that belong to p.
  const uint8_t* packed(uint32_t p, uint32_t i) const {
    return static_cast<const uint8_t*>(job_->weights.panels) +
           (size_t{p} * together_ + i) * panel_size(job_->weights.encoding, job_->pairs);
  }

  // Where it lies, if it is ready.
  const uint16_t* weights(uint32_t p, uint32_t i) const {
    const size_t head = job_->weights.encoding == kPhIntegers ? kPanelHead : 0;
    return reinterpret_cast<const uint16_t*>(packed(p, i) + head);
  }

  // Where that one is kept once it is expanded.
  uint16_t* kept(uint32_t i) const { return expanded_ + size_t{i} * blocks_ * kBlockValues; }

  const uint16_t* at(uint32_t p, uint32_t i) {
    if (ready()) return weights(p, i);
    if (held_[i] != p) {
      const uint8_t* block = packed(p, i);
      for (uint16_t *to = kept(i), *end = to + size_t{blocks_} * kBlockValues; to != end; to += kBlockValues)
        block = job_->weights.encoding == kPhInt4 ? expand<kPhInt4>(block, to) : expand<kPhInt8>(block, to);
      held_[i] = p;
    }
    return kept(i);
  }

 private:
  const Linear* job_;
  uint32_t together_;
  uint16_t* expanded_;
  uint32_t blocks_;
  uint32_t held_[2] = {UINT32_MAX, UINT32_MAX};
};

}  // namespace
