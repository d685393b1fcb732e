// The noise of sampling: a pure function of (seed, position, output index, token), bit for bit that of the CPU.
#pragma once
#include "device.cuh"

struct Noise {
  u64 seed;
  u32 position, index;  // that the token would take; of the output
};

// Philox4x32-10 (Salmon et al., SC 2011) of the counter (position, index, token, 0): the first word.
DEVICE u32 philox(const Noise& noise, u32 token) {
  u32 k0 = static_cast<u32>(noise.seed), k1 = static_cast<u32>(noise.seed >> 32);
  u32 c0 = noise.position, c1 = noise.index, c2 = token, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 a = u64{0xD2511F53u} * c0, b = u64{0xCD9E8D57u} * c2;
    c0 = static_cast<u32>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<u32>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<u32>(b);
    c3 = static_cast<u32>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// Of the word's upper 24 bits as a uniform that is never 0 or 1.
DEVICE float gumbel(u32 word) {
  const double uniform = ((word >> 8) + 0.5) * (1.0 / 16777216.0);
  return static_cast<float>(-log_accurate(-log_accurate(uniform)));
}

// How far z lies above `best`, and a margin that outweighs all rounding below.
DEVICE float gap_to(float z, float best) { return z - best + (1e-4f + (best < 0 ? -best : best) * 1e-6f); }

// No noise is above 17.33.
constexpr float kHopeless = -17.4f;

// False only where z plus the word's noise is surely below `best`, by their gap. Noise g of a uniform u reaches c only
// if 1 - u <= exp(-c), because 1 - u <= -log u.
DEVICE bool may_reach(u32 word, float gap) {
  const float rest = (static_cast<float>(0xffffffu - (word >> 8)) + 0.5f) * (1.0f / 16777216.0f);
  return !(gap < 0) || rest <= exp2_fast(gap * 1.44269504f);
}
