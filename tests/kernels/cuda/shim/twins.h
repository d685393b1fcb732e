// The host's side of device.cuh, which includes this under PAGEHOLD_HOST: the same names, run by the engine.
#pragma once

#include <math.h>
#include <string.h>

#include "engine.h"
#include "types.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define DEVICE inline
// Thread-local memory of a library is one segment, which the engine poisons before each block.
#define SHARED static thread_local
#define KERNEL(name, threads, min_blocks) extern "C" [[gnu::noinline]] void name  // host.py looks for these words
#define DYNAMIC_SHARED(name) char* const name = shim::dynamic_shared()

inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// --- bits ---

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline u32 as_u32(float value) { return same_bits<u32>(value); }
inline float as_float(u32 bits) { return same_bits<float>(bits); }
inline u64 as_u64(double value) { return same_bits<u64>(value); }
inline double as_double(u64 bits) { return same_bits<double>(bits); }

inline u32 popcount(u32 value) { return static_cast<u32>(__builtin_popcount(value)); }
inline u32 leading_zeros(u32 value) { return value ? static_cast<u32>(__builtin_clz(value)) : 32; }
inline u32 multiply_high(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
inline u32 byte_permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<u32>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

// --- arithmetic: compiled without contraction ---

inline float add_rn(float a, float b) { return a + b; }
inline float subtract_rn(float a, float b) { return a - b; }
inline float multiply_rn(float a, float b) { return a * b; }
inline float divide_rn(float a, float b) { return a / b; }
inline double add_rn(double a, double b) { return a + b; }
inline double multiply_rn(double a, double b) { return a * b; }

inline float exp2_fast(float value) { return exp2f(value); }
inline float reciprocal_fast(float value) { return 1.0f / value; }
inline float rsqrt_fast(float value) { return 1.0f / sqrtf(value); }
inline float tanh_accurate(float value) { return tanhf(value); }
inline float exp_accurate(float value) { return expf(value); }
inline float log_accurate(float value) { return logf(value); }
inline float sqrt_accurate(float value) { return sqrtf(value); }
inline double exp_accurate(double value) { return exp(value); }
inline double log_accurate(double value) { return log(value); }
inline double sqrt_accurate(double value) { return sqrt(value); }

// --- conversions ---

inline float to_float(f16 value) { return static_cast<float>(same_bits<_Float16>(value.bits)); }
inline f16 to_f16(float value) {
  return f16{value != value ? u16{0x7FFF} : same_bits<u16>(static_cast<_Float16>(value))};
}
inline bf16 to_bf16(float value) {
  const u32 bits = as_u32(value);
  return bf16{value != value ? u16{0x7FFF} : static_cast<u16>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
inline u32 pack_bf16x2(float low, float high) { return to_bf16(low).bits | static_cast<u32>(to_bf16(high).bits) << 16; }
inline u32 pack_f16x2(float low, float high) { return to_f16(low).bits | static_cast<u32>(to_f16(high).bits) << 16; }

// --- warps and blocks ---

inline int lane_id() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
inline void sync_warp() {
  shim::Operand operand{shim::Collective::kSync};
  shim::collective(operand);
}
inline void sync_block() { shim::sync_block(); }
inline u32 ballot(bool predicate) {
  shim::Operand operand{shim::Collective::kBallot, 0, predicate};
  shim::collective(operand);
  return operand.value;
}

template <typename T>
inline T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "4 or 8 bytes");
  u32 words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  for (u32& word : words) {
    shim::Operand operand{shim::Collective::kShuffle, lane, word};
    shim::collective(operand);
    word = operand.value;
  }
  memcpy(&value, words, sizeof value);
  return value;
}
template <typename T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_id() ^ mask);
}
template <typename T>
inline T shuffle_up(T value, int delta) {
  return shuffle(value, lane_id() < delta ? lane_id() : lane_id() - delta);
}
template <typename T>
inline T shuffle_down(T value, int delta) {
  return shuffle(value, lane_id() + delta > kWarp - 1 ? lane_id() : lane_id() + delta);
}

// --- memory ---

template <typename T, typename Change>
inline T change(T* target, Change change_to) {
  shim::interleave_blocks();
  const T old = *target;
  *target = change_to(old);
  shim::interleave_blocks();
  return old;
}
inline u32 atomic_add(u32* target, u32 value) {
  return change(target, [=](u32 old) { return old + value; });
}
inline u64 atomic_add(u64* target, u64 value) {
  return change(target, [=](u64 old) { return old + value; });
}
inline u32 atomic_or(u32* target, u32 value) {
  return change(target, [=](u32 old) { return old | value; });
}
inline u32 atomic_exchange(u32* target, u32 value) {
  return change(target, [=](u32) { return value; });
}
inline u32 atomic_max(u32* target, u32 value) {
  return change(target, [=](u32 old) { return max(old, value); });
}
inline u32 atomic_min(u32* target, u32 value) {
  return change(target, [=](u32 old) { return min(old, value); });
}
inline u64 atomic_max(u64* target, u64 value) {
  return change(target, [=](u64 old) { return max(old, value); });
}
inline void fence() { shim::interleave(); }

inline uint4 load_streaming(const uint4* source) { return *source; }
template <typename T>
inline T load_shared_by_blocks(const T* source) {
  return *source;
}

inline void cp_async16(void* shared, const void* global, bool valid) { shim::issue_copy(shared, global, valid); }
inline void cp_async_commit() { shim::commit_copies(); }
template <int N>
inline void cp_async_wait() {
  shim::wait_for_copies(N);
}

// --- matrices ---

template <int kRegisters>
inline void ldmatrix(u32 (&registers)[kRegisters], const void* shared, int matrices) {
  shim::Operand operand{shim::Collective::kLdmatrix, matrices, 0, shared, registers};
  shim::collective(operand);
}
inline void ldmatrix_x4(u32 (&r)[4], const void* shared) { ldmatrix(r, shared, 4); }
inline void ldmatrix_x4_trans(u32 (&r)[4], const void* shared) { ldmatrix(r, shared, -4); }
inline void ldmatrix_x2(u32 (&r)[2], const void* shared) { ldmatrix(r, shared, 2); }
inline void ldmatrix_x2_trans(u32 (&r)[2], const void* shared) { ldmatrix(r, shared, -2); }

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  constexpr auto kKind = __is_same(T, bf16) ? shim::Collective::kMmaBf16 : shim::Collective::kMmaF16;
  shim::Operand operand{kKind, 0, 0, nullptr, nullptr, d, a, b};
  shim::collective(operand);
}
