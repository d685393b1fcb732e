// Vectors of W floats: what the rest of an instruction set's file is written in.
//
// Everything here has internal linkage, and so must whatever an includer adds: see isa.h.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

namespace {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

// Half as many doubles, in as many bytes.
typedef double vd __attribute__((vector_size(W * 4)));
typedef int64_t vl __attribute__((vector_size(W * 4)));
typedef uint64_t vq __attribute__((vector_size(W * 4)));
typedef float vf_half __attribute__((vector_size(W * 2)));
typedef float vf_half_unaligned __attribute__((vector_size(W * 2), aligned(4), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }

// A bfloat16 is the upper half of a float.
inline vf load(const uint16_t* p) {
#if W == 8  // as below, but in one instruction
  const vu wide = reinterpret_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif W == 16 && defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const vu wide = reinterpret_cast<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, halves));
#else
  const vu wide = __builtin_convertvector(*reinterpret_cast<const vh_unaligned*>(p), vu);
#endif
  return reinterpret_cast<vf>(wide << 16);
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const uint32_t quiet = bits >> 16 | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (vi){__VA_ARGS__})
#endif

// Rounded as to_bfloat16() rounds, into the lower halves of lanes.
inline vu to_halves(vf v) {
  const vu bits = reinterpret_cast<vu>(v);
  const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded;
}
inline void store(uint16_t* p, vf v) {
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(to_halves(v), vh);
}

// f(i, vector or single) over [0, n): whole vectors, then what is left one by one.
template <class F>
inline void over(uint32_t n, F&& f) {
  uint32_t i = 0;
  for (; i + W <= n; i += W) f(i, vf{});
  for (; i < n; ++i) f(i, 0.0f);
}

// Loads a vector or a single float, as `over` asks.
inline vf load_as(vf, const float* p) { return load(p); }
inline float load_as(float, const float* p) { return *p; }
inline void store(float* p, float x) { *p = x; }
inline void store(uint16_t* p, float x) { *p = to_bfloat16(x); }

// Each lane is joined with the one `half` further on, then with half of that, down to 1: one fixed tree.
template <uint32_t half, class F, int... I>
inline float join(vf v, F&& f, std::integer_sequence<int, I...> lanes) {
  v = f(v, SHUFFLE(v, v, (I + int(half)) % W...));
  if constexpr (half > 1) {
    return join<half / 2>(v, f, lanes);
  } else {
    return v[0];
  }
}

inline float sum(vf v) {
  return join<W / 2>(v, [](vf x, vf y) { return x + y; }, std::make_integer_sequence<int, W>{});
}

inline float largest(vf v) {
  return join<W / 2>(v, [](vf x, vf y) { return y > x ? y : x; }, std::make_integer_sequence<int, W>{});
}

inline bool any(vi mask) {
  int32_t lanes[W];
  memcpy(lanes, &mask, sizeof lanes);
  int32_t all = 0;
  for (uint32_t i = 0; i < W; ++i) all |= lanes[i];
  return all != 0;
}

// exp to about 1 ulp (Cephes' polynomial); 0 below -87.3, so that masked scores vanish; x is at most 88.
inline vf exponential(vf x) {
  const vi none = x < splat(-87.3f);
  const vf clamped = none ? splat(-87.3f) : x;
  const vf shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const vf n = shifted - 12582912.0f;
  vf r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi exponent = __builtin_convertvector(n, vi) << 23;
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
  return none ? vf{} : scaled;
}

// The same in double (Cephes' rational form) for x in [-708, 0]; 0 below.
inline vd exponential(vd x) {
  const vl none = x < -708.0;
  const vd clamped = none ? vd{} : x;
  const vd shifted = clamped * 1.4426950408889634073599 + 6755399441055744.0;  // 1.5 * 2^52
  const vd n = shifted - 6755399441055744.0;
  vd r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  const vd rr = r * r;
  const vd p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1);
  const vd q =
      ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0;
  const vd value = 1.0 + 2.0 * (p / (q - p));
  // The integer lies in the low bits of `shifted`: no 64-bit conversion, which only AVX-512 has.
  const vl exponent = reinterpret_cast<vl>(shifted) << 52;
  const vd scaled = reinterpret_cast<vd>(reinterpret_cast<vl>(value) + exponent);
  return none ? vd{} : scaled;
}

// The low halves of the lanes times x, in full.
inline vq multiply(vq lanes, uint32_t x) {
#if W == 4
  return reinterpret_cast<vq>(_mm_mul_epu32(reinterpret_cast<__m128i>(lanes), _mm_set1_epi64x(x)));
#elif W == 8
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(lanes), _mm256_set1_epi64x(x)));
#elif defined(__AVX512F__)  // masked by nothing: gcc 12 warns of the plain form
  const __m512i factor = _mm512_set1_epi64(x);
  return reinterpret_cast<vq>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(lanes), factor));
#else
  return (lanes & 0xffffffffu) * x;
#endif
}

inline vf silu(vf x) {
  const vf low = -x > splat(88.0f) ? splat(88.0f) : -x;
  return x / (exponential(low) + 1.0f);
}

// A count known to the compiler.
template <int N>
struct Count {
  static constexpr int value = N;
};

// f(Count<count>) for a count of 1 to Most.
template <int Most, class F>
inline void with_count(uint32_t count, F&& f) {
  if constexpr (Most > 1) {
    if (count != Most) return with_count<Most - 1>(count, f);
  }
  f(Count<Most>{});
}

// f(first, Count<n>) over [0, count) in blocks of at most Most, as even as they can be: 8 in blocks of 6 are 4 + 4.
template <int Most, class F>
inline void in_blocks(uint32_t count, F&& f) {
  for (uint32_t first = 0, blocks = (count + Most - 1) / Most; blocks > 0; --blocks) {
    const uint32_t size = (count - first + blocks - 1) / blocks;
    with_count<Most>(size, [&](auto rows) { f(first, rows); });
    first += size;
  }
}

}  // namespace
