// SiLU of the gate times up. One thread for WIDTH neighbouring elements; nothing is reused, so nothing is shared.

#include "packet.cuh"

#ifndef DTYPE
#define DTYPE bf16
#endif
#ifndef COLUMNS
#define COLUMNS 14336
#endif
#ifndef WIDTH  // elements of one access; divides COLUMNS
#define WIDTH 8
#endif

constexpr int THREADS = 256;
constexpr int PACKETS = COLUMNS / WIDTH;

DEVICE float silu(float x) {
  constexpr float LOG2_E = 1.44269504f;
  return x * reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x));
}

// gate_up: [rows, 2, COLUMNS], the gate first. out: [rows, COLUMNS]. SiLU is rounded to DTYPE, and so is the product.
KERNEL(silu_mul, THREADS, 1)(const DTYPE* __restrict__ gate_up, DTYPE* __restrict__ out, i32 rows) {
  const i64 packet = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
  const i64 row = packet / PACKETS;
  if (row >= rows) return;
  const i64 column = (packet - row * PACKETS) * WIDTH;
  float gate[WIDTH], up[WIDTH];
  load(gate, gate_up + row * 2 * COLUMNS + column);
  load(up, gate_up + (row * 2 + 1) * COLUMNS + column);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) gate[i] = silu(gate[i]);
  round_to<DTYPE>(gate);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) gate[i] *= up[i];
  store(out + row * COLUMNS + column, gate);
}
