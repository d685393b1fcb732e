// Neighbouring elements that move in one access of up to 16 bytes, and are converted in pairs.
#pragma once

#include "device.cuh"

// The built-in types: of a struct, even an aligned one, the compiler may make several accesses.
template <int BYTES>
struct Access;
template <>
struct Access<4> {
  using Type = u32;
};
template <>
struct Access<8> {
  using Type = uint2;
};
template <>
struct Access<16> {
  using Type = uint4;
};

template <typename T, int N>
union Packet {
  using Bits = typename Access<N * sizeof(T)>::Type;
  Bits bits;
  T at[N];
  DEVICE Packet() {}
};

template <typename T, int N>
DEVICE Packet<T, N> load_packet(const void* address) {
  Packet<T, N> packet;
  packet.bits = *static_cast<const typename Packet<T, N>::Bits*>(address);
  return packet;
}

// One access for sure: the compiler splits some stores of these types.
template <typename Bits>
DEVICE void store_bits(void* address, Bits bits) {
  *static_cast<Bits*>(address) = bits;
}
#ifndef PAGEHOLD_HOST
template <>
DEVICE void store_bits<uint2>(void* address, uint2 bits) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(bits.x), "r"(bits.y) : "memory");
}
template <>
DEVICE void store_bits<uint4>(void* address, uint4 bits) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y), "r"(bits.z),
               "r"(bits.w)
               : "memory");
}
#endif

// u32 of two-byte types, u16 of e4m3.
template <typename T>
DEVICE auto pack_pair(float low, float high) {
  if constexpr (sizeof(T) == 1) {
    return pack_e4m3x2(low, high);
  } else {
    return pack2<T>(low, high);
  }
}

// address: aligned to N elements. T: of two bytes.
template <typename T, int N>
DEVICE void load(float (&values)[N], const T* address) {
  if constexpr (N == 1) {
    values[0] = to_float(*address);
  } else {
    const Packet<u32, N / 2> packet = load_packet<u32, N / 2>(address);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float2 pair = unpack2<T>(packet.at[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

// As `load`, of float32 in accesses of 16 bytes.
template <int N>
DEVICE void load(float (&values)[N], const float* address) {
  constexpr int STEP = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += STEP) {
    const Packet<float, STEP> packet = load_packet<float, STEP>(address + i);
#pragma unroll
    for (int j = 0; j < STEP; ++j) values[i + j] = packet.at[j];
  }
}

template <typename T, int N>
DEVICE void store(T* address, const float (&values)[N]) {
  if constexpr (N == 1) {
    *address = from_float<T>(values[0]);
  } else {
    using Pair = decltype(pack_pair<T>(0.0f, 0.0f));
    Packet<Pair, N / 2> packet;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) packet.at[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    store_bits(address, packet.bits);
  }
}

// Each value becomes the nearest one of T, a type of two bytes.
template <typename T, int N>
DEVICE void round_to(float (&values)[N]) {
  if constexpr (N == 1) {
    values[0] = to_float(from_float<T>(values[0]));
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = unpack2<T>(pack2<T>(values[i], values[i + 1]));
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  }
}
