// Slots of int8 pages: the codes of one position's keys or values of one head, then their scale, a float.
//
// A code is value / scale, to nearest even; the scale is the largest |value| / 127. Both are divisions that every
// instruction set rounds alike, and nothing here can be contracted: equal values have equal bytes wherever and
// whenever they are stored. A slot moves as a whole, so whoever copies slots or pages need not know of scales.

namespace {

constexpr float kLeastStored = 1e-30f;  // a head whose largest value is less is stored as zeros

// NaN and infinity end as a scale that is one.
inline void store_int8(const float* values, uint32_t n, uint8_t* slot) {
  uint32_t most = 0;  // as bits, which are ordered as the values are, NaN above all
  for (uint32_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float scale;
  memcpy(&scale, &most, 4);
  scale = scale < kLeastStored ? 0.0f : scale / 127.0f;
  const float divisor = scale == 0.0f ? 1.0f : scale;
  for (uint32_t i = 0; i < n; ++i) {
    const float shifted = values[i] / divisor + kRounder;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    slot[i] = static_cast<uint8_t>(bits);
  }
  memcpy(slot + n, &scale, 4);
}

inline float scale_of(const int8_t* codes, uint32_t n) {
  float scale;
  memcpy(&scale, codes + n, 4);
  return scale;
}

// Codes as floats, without their scale.
inline vf load(const int8_t* p) {
#if W == 4
  int32_t four;
  memcpy(&four, p, 4);
  const __m128i bytes = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(bytes, bytes);
  return _mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24));
#elif W == 8
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  typedef int8_t codes __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const codes*>(p), vi), vf);
#endif
}
inline float to_float(int8_t code) { return static_cast<float>(code); }

}  // namespace
