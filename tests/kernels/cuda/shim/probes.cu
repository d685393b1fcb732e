// Kernels that show what the stand-in does: each instruction alone, and each kind of mistake.
#include "device.cuh"

#ifndef THREADS
#define THREADS 128
#endif

// One mma of fragments that every lane loads itself. T: bf16 or f16. a: [16, 16], b: [16, 8], d: [16, 8], row-major.
template <typename T>
DEVICE void multiply(const T* a, const T* b, float* d) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  u32 left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const T* from = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
    left[i] = from[0].bits | static_cast<u32>(from[1].bits) << 16;
    sums[i] = d[(g + i / 2 * 8) * 8 + t + i % 2];
  }
  for (int i = 0; i < 2; ++i) {
    const T* from = b + (t + i * 8) * 8 + g;
    right[i] = from[0].bits | static_cast<u32>(from[8].bits) << 16;
  }
  mma_m16n8k16<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}
KERNEL(multiply_bf16, 32, 1)(const bf16* a, const bf16* b, float* d) { multiply(a, b, d); }
KERNEL(multiply_f16, 32, 1)(const f16* a, const f16* b, float* d) { multiply(a, b, d); }

// The same product as a kernel would do it: a [16, 16] and b [16, 8] row-major through shared memory and ldmatrix.
KERNEL(multiply_tiles, 32, 1)(const bf16* a, const bf16* b, float* d) {
  SHARED __align__(16) bf16 left_tile[16][24];
  SHARED __align__(16) bf16 right_tile[16][8];
  const int lane = lane_id();
  cp_async16(&left_tile[lane / 2][lane % 2 * 8], a + lane * 8, true);
  if (lane < 16) cp_async16(&right_tile[lane][0], b + lane * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  u32 left[4], right[2];
  float sums[4] = {};
  ldmatrix_x4(left, &left_tile[lane % 16][lane / 16 * 8]);
  ldmatrix_x2_trans(right, &right_tile[lane % 16][0]);
  mma_m16n8k16<bf16>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// Row r of four 8x8 matrices [4, 8, 8] at r's address; out: [32, 4] registers, then the two of ldmatrix_x2_trans.
KERNEL(load_matrices, 32, 1)(const u16* matrices, u32* plain, u32* transposed, u32* pair) {
  SHARED __align__(16) u16 rows[32][8];
  for (int i = 0; i < 8; ++i) rows[lane_id()][i] = matrices[lane_id() * 8 + i];
  sync_warp();
  u32 r[4], two[2];
  ldmatrix_x4(r, rows[lane_id()]);
  for (int i = 0; i < 4; ++i) plain[lane_id() * 4 + i] = r[i];
  ldmatrix_x4_trans(r, rows[lane_id()]);
  for (int i = 0; i < 4; ++i) transposed[lane_id() * 4 + i] = r[i];
  ldmatrix_x2(two, rows[lane_id() % 16]);
  for (int i = 0; i < 2; ++i) pair[lane_id() * 2 + i] = two[i];
}

KERNEL(exchange, 64, 1)(const double* values, double* out, u32* votes) {
  const double mine = values[threadIdx.x];
  double* to = out + threadIdx.x * 4;
  to[0] = shuffle(mine, 5);
  to[1] = shuffle_xor(mine, 3);
  to[2] = shuffle_up(mine, 2);
  to[3] = shuffle_down(mine, 4);
  votes[threadIdx.x] = ballot(mine > 0.5);
}

// Each value through each type, as bits: [n, 4] bf16, f16, e4m3, and e4m3 as f16 of the pair (value, -value).
KERNEL(convert, THREADS, 1)(const float* values, u32* out, float* back, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const float value = values[i];
    out[i * 4] = to_bf16(value).bits;
    out[i * 4 + 1] = to_f16(value).bits;
    out[i * 4 + 2] = to_e4m3(value).bits;
    out[i * 4 + 3] = e4m3x2_to_f16x2(pack_e4m3x2(value, -value));
    back[i * 3] = to_float(to_bf16(value));
    back[i * 3 + 1] = to_float(to_f16(value));
    back[i * 3 + 2] = to_float(to_e4m3(value));
  }
}

KERNEL(count, THREADS, 2)(u32* words, u64* sum) {
  atomic_add(words, 1u);
  atomic_or(words + 1, 1u << threadIdx.x % 32);
  atomic_max(words + 2, threadIdx.x);
  atomic_min(words + 3, blockIdx.x + 7);
  atomic_add(sum, static_cast<u64>(threadIdx.x) << 32);
}

// Neighbours' values by way of shared memory. BARRIER 0: one is missing between write and read; 1: right;
// 2: the one between read and the next write.
#ifndef BARRIER
#define BARRIER 1
#endif
KERNEL(rotate, THREADS, 1)(const float* in, float* out, int rounds) {
  SHARED float values[THREADS];
  float mine = in[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    values[threadIdx.x] = mine;
    if (BARRIER != 0) sync_block();
    mine = values[(threadIdx.x + 1) % THREADS];
    if (BARRIER != 2) sync_block();
  }
  out[threadIdx.x] = mine;
}

// A two-stage pipeline over [steps, THREADS] uint4; out: the sum of the words' x. LEFT: groups that a wait leaves.
#ifndef LEFT
#define LEFT 1
#endif
KERNEL(stream, THREADS, 1)(const uint4* in, u32* out, int steps) {
  DYNAMIC_SHARED(memory);
  uint4* stages = reinterpret_cast<uint4*>(memory);
  u32 sum = 0;
  cp_async16(stages + threadIdx.x, in + threadIdx.x, true);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    const int next = step + 1;
    cp_async16(stages + next % 2 * THREADS + threadIdx.x, in + (next < steps ? next : 0) * THREADS + threadIdx.x,
               next < steps);
    cp_async_commit();
    cp_async_wait<LEFT>();
    sync_block();
    sum += stages[step % 2 * THREADS + (threadIdx.x + 40) % THREADS].x;
    sync_block();
  }
  out[threadIdx.x] = sum;
}

// Every thread leaves a 1; the last block to arrive adds them all up. ARRIVAL 0: one thread arrives for the block
// before the others have left theirs.
#ifndef ARRIVAL
#define ARRIVAL 1
#endif
KERNEL(last_block, THREADS, 1)(u32* ones, u32* counter, u32* sum) {
  SHARED bool last;
  ones[blockIdx.x * THREADS + threadIdx.x] = 1;
  fence();
  if (ARRIVAL) sync_block();
  if (threadIdx.x == 0) last = atomic_add(counter, 1u) == gridDim.x - 1;
  sync_block();
  if (!last || threadIdx.x) return;
  fence();
  *sum = 0;
  for (u32 i = 0; i < gridDim.x * THREADS; ++i) *sum += ones[i];
}

KERNEL(uninitialised, THREADS, 1)(u32* statics, u32* dynamics) {
  SHARED u32 words[THREADS];
  DYNAMIC_SHARED(memory);
  statics[blockIdx.x * THREADS + threadIdx.x] = words[threadIdx.x];
  dynamics[blockIdx.x * THREADS + threadIdx.x] = reinterpret_cast<u32*>(memory)[threadIdx.x];
  sync_block();
  words[threadIdx.x] = 1;
  reinterpret_cast<u32*>(memory)[threadIdx.x] = 2;
}

// mistake 0: half a warp leaves before a shuffle and the rest votes; 1: half the block waits for ever;
// 2: a matrix instruction by half a warp; 3: a write past dynamic shared memory; 4: a crooked copy.
KERNEL(wrong, THREADS, 1)(u32* out, int mistake, int bytes) {
  DYNAMIC_SHARED(memory);
  u32 r[4];
  if (mistake == 0) out[threadIdx.x] = threadIdx.x % 2 ? shuffle(threadIdx.x, 0) : ballot(true);
  if (mistake == 1 && threadIdx.x % 2) sync_block();
  if (mistake == 1 && threadIdx.x % 2 == 0) sync_warp();
  if (mistake == 2 && threadIdx.x % 2) ldmatrix_x4(r, memory);
  if (mistake == 3) memory[bytes] = 1;
  if (mistake == 4) cp_async16(memory + 8, out, true);
}

KERNEL(out_of_bounds, 32, 1)(u32* out, int n) { out[threadIdx.x + n] = threadIdx.x; }

KERNEL(order, THREADS, 1)(u32* next, u32* blocks, u32* threads) {
  const u32 place = atomic_add(next, 1u);
  blocks[place] = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  threads[place] = threadIdx.x;
}

KERNEL(every_kind, 1, 1)(const u32* a, u64 b, i64 c, int d, u32 e, float f, double g, double* out) {
  *out = *a + static_cast<double>(b) + static_cast<double>(c) + d + e + f + g;
}
