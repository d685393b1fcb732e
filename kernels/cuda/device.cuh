// What the kernels need of the device: types, conversions, and every PTX instruction behind a function.
//
// No CUDA header is included: neither the NVRTC nor the CuPy wheel has one. Under PAGEHOLD_HOST the same names come
// from twins.h, the tests' stand-in, which runs a block as one fiber per thread on the CPU; what is arithmetic only
// is written once, here, for both.
//
// Words: a collective is called by all 32 lanes of a warp together. "shared" pointers are generic pointers into shared
// memory. Addresses of 16-byte accesses are multiples of 16.
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// How elements lie in memory; arithmetic is done in float.
struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};
struct e4m3 {  // 8-bit float of the OCP: bias 7, no infinities, NaN is 0x7F and 0xFF, largest 448
  u8 bits;
};

constexpr int kWarp = 32;
constexpr u32 kAllLanes = 0xFFFFFFFFu;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7F800000u);  // NVRTC has no __builtin_huge_valf

#ifdef PAGEHOLD_HOST
#include "twins.h"
#else

#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define KERNEL(name, threads, min_blocks) extern "C" __global__ void __launch_bounds__(threads, min_blocks) name
// One array of bytes whose size the launch gives; the same name everywhere in a file.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]

// --- bits ---

DEVICE u32 as_u32(float value) { return __float_as_uint(value); }
DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u64 as_u64(double value) { return static_cast<u64>(__double_as_longlong(value)); }
DEVICE double as_double(u64 bits) { return __longlong_as_double(static_cast<i64>(bits)); }

DEVICE u32 popcount(u32 value) { return static_cast<u32>(__popc(value)); }
DEVICE u32 leading_zeros(u32 value) { return static_cast<u32>(__clz(static_cast<int>(value))); }
DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }

// Byte i of the result is byte (selector >> 4i) & 7 of the eight bytes b:a, a's lowest first.
DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }

// --- arithmetic ---

// One rounding each, never contracted into a fused multiply-add, subnormals kept: for results that are compared bit for
// bit. In PTX, because CuPy always compiles with -ftz=true, which takes the subnormals from plain float arithmetic.
DEVICE float add_rn(float a, float b) {
  float result;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DEVICE float subtract_rn(float a, float b) {
  float result;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DEVICE float multiply_rn(float a, float b) {
  float result;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DEVICE float divide_rn(float a, float b) {
  float result;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
DEVICE double multiply_rn(double a, double b) { return __dmul_rn(a, b); }

DEVICE float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
DEVICE float reciprocal_fast(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
DEVICE float rsqrt_fast(float value) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
DEVICE float tanh_accurate(float value) { return tanhf(value); }
DEVICE float exp_accurate(float value) { return expf(value); }
DEVICE float log_accurate(float value) { return logf(value); }
DEVICE float sqrt_accurate(float value) { return sqrtf(value); }
DEVICE double exp_accurate(double value) { return exp(value); }
DEVICE double log_accurate(double value) { return log(value); }
DEVICE double sqrt_accurate(double value) { return sqrt(value); }

// --- conversions: round to nearest, ties to even; NaN becomes the type's canonical NaN ---

DEVICE float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
DEVICE f16 to_f16(float value) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return f16{bits};
}
DEVICE bf16 to_bf16(float value) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bf16{bits};
}
DEVICE u32 pack_bf16x2(float low, float high) {
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
DEVICE u32 pack_f16x2(float low, float high) {
  u32 result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// --- warps and blocks ---

DEVICE int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
// A macro because nvcc's own headers still declare the function of compute capability 2.
#define ballot(predicate) __ballot_sync(kAllLanes, predicate)

DEVICE u32 shuffle_bits(u32 value, int lane) { return __shfl_sync(kAllLanes, value, lane); }
DEVICE u32 shuffle_xor_bits(u32 value, int mask) { return __shfl_xor_sync(kAllLanes, value, mask); }
DEVICE u32 shuffle_up_bits(u32 value, int delta) { return __shfl_up_sync(kAllLanes, value, delta); }
DEVICE u32 shuffle_down_bits(u32 value, int delta) { return __shfl_down_sync(kAllLanes, value, delta); }

template <typename T>
union Words {  // a value of 4 or 8 bytes as what the shuffles move
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  u32 words[sizeof(T) / 4];
  T value;
  DEVICE Words(T whole) : value(whole) {}
};
#define PAGEHOLD_SHUFFLE(name)                                                      \
  template <typename T>                                                             \
  DEVICE T name(T value, int operand) {                                             \
    Words<T> exchange(value);                                                       \
    exchange.words[0] = name##_bits(exchange.words[0], operand);                    \
    constexpr int kLast = sizeof(T) / 4 - 1;                                        \
    if (kLast) exchange.words[kLast] = name##_bits(exchange.words[kLast], operand); \
    return exchange.value;                                                          \
  }
PAGEHOLD_SHUFFLE(shuffle)       // the value of that lane
PAGEHOLD_SHUFFLE(shuffle_xor)   // of lane ^ operand
PAGEHOLD_SHUFFLE(shuffle_up)    // of lane - operand; the lane's own where there is none
PAGEHOLD_SHUFFLE(shuffle_down)  // of lane + operand; the lane's own where there is none
#undef PAGEHOLD_SHUFFLE

// --- memory ---

DEVICE u32 atomic_add(u32* target, u32 value) { return atomicAdd(target, value); }
DEVICE u64 atomic_add(u64* target, u64 value) { return atomicAdd(target, value); }
DEVICE u32 atomic_or(u32* target, u32 value) { return atomicOr(target, value); }
DEVICE u32 atomic_exchange(u32* target, u32 value) { return atomicExch(target, value); }
DEVICE u32 atomic_max(u32* target, u32 value) { return atomicMax(target, value); }
DEVICE u32 atomic_min(u32* target, u32 value) { return atomicMin(target, value); }
DEVICE u64 atomic_max(u64* target, u64 value) { return atomicMax(target, value); }
// Orders this thread's writes before its later ones, for every thread of the device.
DEVICE void fence() { __threadfence(); }

// Read once and by one block only, never written during the launch: leaves L1 to others.
DEVICE uint4 load_streaming(const uint4* source) {
  uint4 result;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "l"(source));
  return result;
}
// From L2: what other blocks wrote during this launch.
DEVICE float load_shared_by_blocks(const float* source) {
  float result;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(result) : "l"(source) : "memory");
  return result;
}
DEVICE float2 load_shared_by_blocks(const float2* source) {
  float2 result;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(result.x), "=f"(result.y) : "l"(source) : "memory");
  return result;
}
DEVICE float4 load_shared_by_blocks(const float4* source) {
  float4 result;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(result.x), "=f"(result.y), "=f"(result.z), "=f"(result.w)
               : "l"(source)
               : "memory");
  return result;
}

DEVICE u32 shared_address(const void* shared) { return static_cast<u32>(__cvta_generic_to_shared(shared)); }

// 16 bytes from global to shared memory past the registers; zeros when not valid, and then nothing is read. They are
// there, for this thread alone, after the cp_async_wait that covers their group; for the block after a barrier then.
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes the group of this thread's copies since the last one; a group may be empty.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups, the newest, are under way.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- matrices ---

// Collective: matrix m of 8 rows of 8 16-bit elements has its rows' addresses in the lanes 8m..8m+7. Register m of lane
// l gets the elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1), low half first; transposed: (2(l%4), l/4), (2(l%4)+1, l/4).
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
// The addresses of the lanes 16..31 are not used.
DEVICE void ldmatrix_x2(u32 (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}
DEVICE void ldmatrix_x2_trans(u32 (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// Collective: d[16, 8] += a[16, 16] b[16, 8], the elements T, the sums float. With g = lane/4 and t = lane%4:
// a: rows g, g+8, g, g+8 and columns 2t, 2t+1 of the first (registers 0, 1) and last eight (2, 3);
// b: column g and rows 2t, 2t+1 of the first (register 0) and last eight (1);
// d: columns 2t, 2t+1 of row g (registers 0, 1) and of row g+8 (2, 3).
template <typename T>
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void mma_m16n8k16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // PAGEHOLD_HOST

// --- conversions that are arithmetic, or an instruction that some devices lack ---

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return as_float(static_cast<u32>(value.bits) << 16); }
DEVICE float to_float(e4m3 value) {
  const u32 bits = value.bits;
  // The seven low bits at float's place are the value scaled by 2^-120, subnormals too: the product is exact.
  const float magnitude = multiply_rn(as_float((bits & 0x7Fu) << 20), 0x1p120f);
  const u32 sign = (bits & 0x80u) << 24;
  return as_float(sign | ((bits & 0x7Fu) == 0x7Fu ? 0x7FFFFFFFu : as_u32(magnitude)));
}

DEVICE e4m3 to_e4m3_arithmetic(float value) {
  const u32 bits = as_u32(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7FFFFFFFu;
  u32 result;
  if (magnitude > 0x7F800000u) return e4m3{static_cast<u8>(0x7Fu)};
  if (magnitude < 0x3C800000u) {  // below 2^-6: multiples of 2^-9, which is the last place of 2^14
    result = as_u32(add_rn(as_float(magnitude), 0x1p14f)) - 0x46800000u;
  } else {
    result = (magnitude + 0x7FFFFu + (magnitude >> 20 & 1u)) >> 20;
    result = result < 0x3C0u + 0x7Eu ? result - 0x3C0u : 0x7Eu;
  }
  return e4m3{static_cast<u8>(sign | result)};
}

// Saturates: what is above 448 becomes 448, infinities too.
DEVICE u16 pack_e4m3x2(float low, float high) {
#if !defined(PAGEHOLD_HOST) && __CUDA_ARCH__ >= 890
  u16 result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
#else
  return static_cast<u16>(to_e4m3_arithmetic(low).bits | to_e4m3_arithmetic(high).bits << 8);
#endif
}
DEVICE e4m3 to_e4m3(float value) { return e4m3{static_cast<u8>(pack_e4m3x2(value, 0.0f))}; }

DEVICE u32 e4m3x2_to_f16x2(u16 pair) {  // exact
#if !defined(PAGEHOLD_HOST) && __CUDA_ARCH__ >= 890
  u32 result;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(result) : "h"(pair));
  return result;
#else
  return pack_f16x2(to_float(e4m3{static_cast<u8>(pair)}), to_float(e4m3{static_cast<u8>(pair >> 8)}));
#endif
}

DEVICE float2 unpack_bf16x2(u32 pair) { return float2{as_float(pair << 16), as_float(pair & 0xFFFF0000u)}; }
DEVICE float2 unpack_f16x2(u32 pair) {
  return float2{to_float(f16{static_cast<u16>(pair)}), to_float(f16{static_cast<u16>(pair >> 16)})};
}

// By type.
template <typename T>
DEVICE T from_float(float value);
template <>
DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DEVICE bf16 from_float<bf16>(float value) {
  return to_bf16(value);
}
template <>
DEVICE f16 from_float<f16>(float value) {
  return to_f16(value);
}
template <>
DEVICE e4m3 from_float<e4m3>(float value) {
  return to_e4m3(value);
}

template <typename T>
DEVICE u32 pack2(float low, float high);
template <>
DEVICE u32 pack2<bf16>(float low, float high) {
  return pack_bf16x2(low, high);
}
template <>
DEVICE u32 pack2<f16>(float low, float high) {
  return pack_f16x2(low, high);
}

template <typename T>
DEVICE float2 unpack2(u32 pair);
template <>
DEVICE float2 unpack2<bf16>(u32 pair) {
  return unpack_bf16x2(pair);
}
template <>
DEVICE float2 unpack2<f16>(u32 pair) {
  return unpack_f16x2(pair);
}
