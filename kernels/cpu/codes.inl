// Codes of 8 bits: what the types that are rounded to them have in common.

namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
constexpr float kLeastRounded = 1e-33f;  // rows whose largest value is less are zeros

// vpdpbusd wants one side without a sign: codes of inputs are multiplied as if they were kShift more. They are stored
// kStoredShift more: as it takes them, or where tiles take them too, as they are.
#if W == 16 && !defined(PAGEHOLD_EMULATE)
constexpr int32_t kShift = 128;
#else
constexpr int32_t kShift = 0;
#endif
#ifdef TILES
constexpr int32_t kStoredShift = 0;
#else
constexpr int32_t kStoredShift = kShift;
#endif

// The largest |value| of a vector's lanes and `most`, as bits; NaN is above all.
inline vi most_of(vi most, vf values) {
  const vi bits = reinterpret_cast<vi>(values) & 0x7fffffff;
  return bits > most ? bits : most;
}

inline float largest_of(vi most) {
  int32_t lanes[W], largest = 0;
  memcpy(lanes, &most, sizeof lanes);
  for (int32_t lane : lanes) largest = lane > largest ? lane : largest;
  float value;
  memcpy(&value, &largest, 4);
  return value;
}

inline int32_t sum_of(vi whole) {
  int32_t lanes[W], sum = 0;
  memcpy(lanes, &whole, sizeof lanes);
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// value * inverse, to the nearest integer.
inline vi whole_of(vf values, float inverse) {
  return reinterpret_cast<vi>(values * inverse + kRounder) - reinterpret_cast<vi>(splat(kRounder));
}

typedef int8_t vb __attribute__((vector_size(W)));
typedef int8_t vb_unaligned __attribute__((vector_size(W), aligned(1), may_alias));

inline void store_codes(int8_t* to, vi whole) {
  *reinterpret_cast<vb_unaligned*>(to) = __builtin_convertvector(whole, vb);
}

}  // namespace
