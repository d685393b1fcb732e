// Products of bfloat16 pairs: vdpbf16ps, or its like where PAGEHOLD_EMULATE asks for it.

namespace {

typedef float dot_f __attribute__((vector_size(64)));
typedef uint32_t dot_u __attribute__((vector_size(64)));

}  // namespace

#ifndef PAGEHOLD_EMULATE
#include <immintrin.h>

namespace {

// acc + x.low * w.low + x.high * w.high in each lane; x is one pair of bfloat16 for all lanes.
inline dot_f bfloat16_dot(dot_f acc, uint32_t x, dot_u w) {
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(x));
  return (dot_f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)w);
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

}  // namespace
#endif
