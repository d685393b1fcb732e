// RMSNorm over rows, alone and with the residual's addition. One block a row, which stays in registers between the
// two passes: every byte is read once. The order of the sum depends on HIDDEN alone, so a row's result does not
// depend on its neighbours.
//
// Rounding follows the Hugging Face implementations: the sum with the residual is rounded to DTYPE, normalised in
// float32, rounded, multiplied by the weight and rounded again.

#include "packet.cuh"

#ifndef DTYPE
#define DTYPE bf16
#endif
#ifndef HIDDEN
#define HIDDEN 4096
#endif
#ifndef WIDTH  // elements of one access; divides HIDDEN
#define WIDTH 8
#endif
#ifndef THREADS
#define THREADS 512
#endif

constexpr int PACKETS = HIDDEN / WIDTH;
constexpr int ROUNDS = (PACKETS + THREADS - 1) / THREADS;

static_assert(HIDDEN % WIDTH == 0 && THREADS % 32 == 0);

// Where this thread's packet of a round begins in the row; HIDDEN or more: it has none.
DEVICE int column(int round) { return (round * THREADS + static_cast<int>(threadIdx.x)) * WIDTH; }

DEVICE float block_sum(float value) {
  SHARED float sums[THREADS / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  if (lane_id() == 0) sums[warp_id()] = value;
  sync_block();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) sum += sums[i];
  return sum;
}

// This thread's elements of a row of T; what is there stays where it has none.
template <typename T>
DEVICE void load_row(float (&values)[ROUNDS][WIDTH], const T* row) {
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    if (column(round) < HIDDEN) load(values[round], row + column(round));
  }
}

// row: rounded to DTYPE, zeros where this thread has no element.
DEVICE void normalise(float (&row)[ROUNDS][WIDTH], const float (&weight)[ROUNDS][WIDTH], DTYPE* out, float epsilon) {
  float squares = 0;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) squares += row[round][i] * row[round][i];
  }
  const float factor = 1.0f / sqrt_accurate(block_sum(squares) / HIDDEN + epsilon);
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    if (column(round) >= HIDDEN) continue;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) row[round][i] *= factor;
    round_to<DTYPE>(row[round]);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) row[round][i] *= weight[round][i];
    store(out + column(round), row[round]);
  }
}

// x, out: [rows, HIDDEN]; they may be the same. weight: [HIDDEN], read before the barrier so that the row is waited for
// but once.
KERNEL(rms_norm, THREADS, 1)(const DTYPE* x, const float* weight, DTYPE* out, float epsilon) {
  const i64 offset = static_cast<i64>(blockIdx.x) * HIDDEN;
  float row[ROUNDS][WIDTH] = {}, weights[ROUNDS][WIDTH];
  load_row(row, x + offset);
  load_row(weights, weight);
  normalise(row, weights, out + offset, epsilon);
}

// residual += x, and out is the norm of the sum. x, residual, out: [rows, HIDDEN]; x and out may be the same.
KERNEL(add_rms_norm, THREADS, 1)
(const DTYPE* x, DTYPE* residual, const float* weight, DTYPE* out, float epsilon) {
  const i64 offset = static_cast<i64>(blockIdx.x) * HIDDEN;
  float row[ROUNDS][WIDTH] = {}, added[ROUNDS][WIDTH] = {}, weights[ROUNDS][WIDTH];
  load_row(row, residual + offset);
  load_row(added, x + offset);
  load_row(weights, weight);
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    if (column(round) >= HIDDEN) continue;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) row[round][i] += added[round][i];
    round_to<DTYPE>(row[round]);
    store(residual + offset + column(round), row[round]);
  }
  normalise(row, weights, out + offset, epsilon);
}
