// Products of bfloat16 pairs, and their rounding: vdpbf16ps and vcvtne2ps2bf16, or their like where PAGEHOLD_EMULATE
// asks for it.

namespace {

typedef float dot_f __attribute__((vector_size(64)));
typedef uint32_t dot_u __attribute__((vector_size(64)));

constexpr uint32_t kBfloat16Ones = 0x3f803f80;

}  // namespace

#ifndef PAGEHOLD_EMULATE
#include <immintrin.h>

namespace {

// acc + x.low * w.low + x.high * w.high in each lane; x is one pair of bfloat16 for all lanes.
inline dot_f bfloat16_dot(dot_f acc, uint32_t x, dot_u w) {
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(x));
  return (dot_f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)w);
}

// 32 bfloat16, of `low` and then of `high`, to nearest even; NaN stays NaN, what is below 2^-126 may be 0.
inline dot_u to_bfloat16_pairs(dot_f low, dot_f high) { return (dot_u)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
// 16 of them, in the same way.
inline void store_bfloat16(uint16_t* to, dot_f x) {
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &halves, sizeof halves);
}

}  // namespace
#else

namespace {

inline dot_f bfloat16_dot(dot_f acc, uint32_t x, dot_u w) {
  const uint32_t low = x << 16, high = x & 0xffff0000u;
  float x_low, x_high;
  memcpy(&x_low, &low, 4);
  memcpy(&x_high, &high, 4);
  acc += x_high * reinterpret_cast<dot_f>(w & 0xffff0000u);
  return acc + x_low * reinterpret_cast<dot_f>(w << 16);
}

inline dot_u to_bfloat16_pairs(dot_f low, dot_f high) {
  typedef uint16_t half_u __attribute__((vector_size(32)));
  const auto round = [](dot_f x) {
    const dot_u bits = reinterpret_cast<dot_u>(x);
    const dot_u rounded = bits + 0x7fffu + (bits >> 16 & 1);
    return __builtin_convertvector(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16, half_u);
  };
  const half_u halves[2] = {round(low), round(high)};
  dot_u pairs;
  memcpy(&pairs, halves, sizeof pairs);
  return pairs;
}

inline void store_bfloat16(uint16_t* to, dot_f x) {
  const dot_u pairs = to_bfloat16_pairs(x, x);
  memcpy(to, &pairs, sizeof pairs / 2);
}

}  // namespace
#endif
