// out = a weight^T + bias with one order of summation: a row's result has the same bits in every batch.
//
// An element is one chain of m16n8k16 products over ascending k with one float32 accumulator: k is never split, and
// neither the tile nor the place of a row in it enters the chain. So two tiles serve one purpose: the narrow one
// spreads few rows over many blocks with a deep pipeline, because then reading the weights is all the time; the wide
// one reuses more of what it reads. This rests on the instruction treating its rows and columns alike, which its
// documentation does not say. On a GPU neither that nor the speed has been measured.
//
// A stage holds TILE_K = 64 columns: 128 bytes a row, eight chunks of 16 bytes, chunk c of row r at place c ^ (r % 8):
// both the copies into a stage and ldmatrix are free of bank conflicts.

#include "device.cuh"

#ifndef DTYPE  // of a, weight, bias and, but for the kernels in float32, out
#define DTYPE bf16
#endif

constexpr int TILE_K = 64;
constexpr int CHUNK = 8;  // elements in 16 bytes
constexpr int CHUNKS = TILE_K / CHUNK;

struct Problem {
  const DTYPE* a;       // [m, k]
  const DTYPE* weight;  // [n, k]
  const DTYPE* bias;    // [n] or null
  i32 m, n, k;          // k: a multiple of CHUNK
};

DEVICE DTYPE* place(DTYPE* tile, int row, int chunk) { return tile + row * TILE_K + (chunk ^ row % CHUNKS) * CHUNK; }

// Starts the copy of rows [first_row, first_row + ROWS) and columns [column, column + TILE_K) of matrix [rows, k];
// zeros beyond its borders.
template <int ROWS, int THREADS>
DEVICE void load_tile(DTYPE* tile, const DTYPE* matrix, int rows, int k, int first_row, int column) {
  static_assert(ROWS * CHUNKS % THREADS == 0);
  const int chunk = static_cast<int>(threadIdx.x) % CHUNKS;
  const bool inside = column + chunk * CHUNK < k;
#pragma unroll
  for (int i = 0; i < ROWS * CHUNKS / THREADS; ++i) {
    const int row = static_cast<int>(threadIdx.x) / CHUNKS + i * (THREADS / CHUNKS);
    const bool valid = inside && first_row + row < rows;
    const i64 offset = valid ? static_cast<i64>(first_row + row) * k + column + chunk * CHUNK : 0;
    cp_async16(place(tile, row, chunk), matrix + offset, valid);
  }
}

DEVICE void put(DTYPE* out, float low, float high) { *reinterpret_cast<u32*>(out) = pack2<DTYPE>(low, high); }
DEVICE void put(float* out, float low, float high) { *reinterpret_cast<float2*>(out) = float2{low, high}; }
DEVICE void put(DTYPE* out, float value) { *out = from_float<DTYPE>(value); }
DEVICE void put(float* out, float value) { *out = value; }

template <int TILE_M_, int TILE_N_, int WARPS_M_, int WARPS_N_, int STAGES_>
struct Tile {
  static constexpr int TILE_M = TILE_M_, TILE_N = TILE_N_, STAGES = STAGES_;
  static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, THREADS = WARPS_M * WARPS_N * 32;
  static constexpr int ROWS = TILE_M / WARPS_M / 16;    // m16 steps of a warp
  static constexpr int COLUMNS = TILE_N / WARPS_N / 8;  // n8 steps of a warp
  static constexpr int STAGE = (TILE_M + TILE_N) * TILE_K;
};

// One stage's products. Lanes address ldmatrix so that a register holds what the product takes: of a, rows 0-7 and 8-15
// of columns 0-7, then of columns 8-15; of the weight, columns 0-7 and 8-15 of rows 0-7, then of rows 8-15.
template <typename T>
DEVICE void multiply(float (&sums)[T::ROWS][T::COLUMNS][4], DTYPE* a_tile, DTYPE* weight_tile) {
  const int lane = lane_id(), warp = warp_id();
  const int a_row = warp / T::WARPS_N * T::ROWS * 16 + lane % 16, a_chunk = lane / 16;
  const int weight_row = warp % T::WARPS_N * T::COLUMNS * 8 + lane / 16 * 8 + lane % 8, weight_chunk = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < TILE_K / 16; ++step) {
    u32 a[T::ROWS][4], weight[T::COLUMNS / 2][4];
#pragma unroll
    for (int i = 0; i < T::ROWS; ++i) ldmatrix_x4(a[i], place(a_tile, a_row + i * 16, step * 2 + a_chunk));
#pragma unroll
    for (int j = 0; j < T::COLUMNS / 2; ++j) {
      ldmatrix_x4(weight[j], place(weight_tile, weight_row + j * 16, step * 2 + weight_chunk));
    }
#pragma unroll
    for (int i = 0; i < T::ROWS; ++i) {
#pragma unroll
      for (int j = 0; j < T::COLUMNS; ++j) {
        const u32 pair[2] = {weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]};
        mma_m16n8k16<DTYPE>(sums[i][j], a[i], pair);
      }
    }
  }
}

template <typename T, typename OUT>
DEVICE void write(const float (&sums)[T::ROWS][T::COLUMNS][4], const Problem& problem, OUT* out) {
  const int lane = lane_id(), warp = warp_id();
  const int first_row = blockIdx.x * T::TILE_M + warp / T::WARPS_N * T::ROWS * 16 + lane / 4;
  const int first_column = blockIdx.y * T::TILE_N + warp % T::WARPS_N * T::COLUMNS * 8 + lane % 4 * 2;
  const bool aligned = problem.n % 2 == 0;
#pragma unroll
  for (int j = 0; j < T::COLUMNS; ++j) {
    const int column = first_column + j * 8;
    if (column >= problem.n) continue;
    const bool pair = column + 1 < problem.n;
    float bias[2] = {};
    if (problem.bias != nullptr) {
      bias[0] = to_float(problem.bias[column]);
      if (pair) bias[1] = to_float(problem.bias[column + 1]);
    }
#pragma unroll
    for (int i = 0; i < T::ROWS * 2; ++i) {
      const int row = first_row + i * 8;
      if (row >= problem.m) continue;
      const float low = sums[i / 2][j][i % 2 * 2] + bias[0], high = sums[i / 2][j][i % 2 * 2 + 1] + bias[1];
      OUT* at = out + static_cast<i64>(row) * problem.n + column;
      if (aligned) {
        put(at, low, high);
      } else {
        put(at, low);
        if (pair) put(at + 1, high);
      }
    }
  }
}

// Block (x, y) has rows from x * TILE_M and columns from y * TILE_N: neighbours in time share a tile of the weight.
template <typename T, typename OUT>
DEVICE void multiply_block(const Problem& problem, OUT* out, DTYPE* shared) {
  const auto load = [&](int step) {
    DTYPE* stage = shared + step % T::STAGES * T::STAGE;
    const int column = step * TILE_K;
    load_tile<T::TILE_M, T::THREADS>(stage, problem.a, problem.m, problem.k, blockIdx.x * T::TILE_M, column);
    load_tile<T::TILE_N, T::THREADS>(stage + T::TILE_M * TILE_K, problem.weight, problem.n, problem.k,
                                     blockIdx.y * T::TILE_N, column);
  };
  const int steps = (problem.k + TILE_K - 1) / TILE_K;
  for (int step = 0; step < T::STAGES - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  float sums[T::ROWS][T::COLUMNS][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<T::STAGES - 2>();
    sync_block();  // the stage is there for all, and all are done with the one that is loaded next
    if (step + T::STAGES - 1 < steps) load(step + T::STAGES - 1);
    cp_async_commit();  // also when empty: the wait counts groups
    DTYPE* stage = shared + step % T::STAGES * T::STAGE;
    multiply<T>(sums, stage, stage + T::TILE_M * TILE_K);
  }
  write<T>(sums, problem, out);
}

using Narrow = Tile<64, 64, 2, 2, 6>;
using Wide = Tile<128, 128, 2, 4, 3>;

// Grid: (tiles of m, tiles of n). Dynamic shared memory: STAGES * STAGE elements, 96 KiB of either tile.

KERNEL(gemm_narrow, Narrow::THREADS, 2)
(const DTYPE* a, const DTYPE* weight, const DTYPE* bias, DTYPE* out, i32 m, i32 n, i32 k) {
  DYNAMIC_SHARED(shared);
  multiply_block<Narrow>(Problem{a, weight, bias, m, n, k}, out, reinterpret_cast<DTYPE*>(shared));
}

KERNEL(gemm_narrow_float32, Narrow::THREADS, 2)
(const DTYPE* a, const DTYPE* weight, const DTYPE* bias, float* out, i32 m, i32 n, i32 k) {
  DYNAMIC_SHARED(shared);
  multiply_block<Narrow>(Problem{a, weight, bias, m, n, k}, out, reinterpret_cast<DTYPE*>(shared));
}

KERNEL(gemm_wide, Wide::THREADS, 2)
(const DTYPE* a, const DTYPE* weight, const DTYPE* bias, DTYPE* out, i32 m, i32 n, i32 k) {
  DYNAMIC_SHARED(shared);
  multiply_block<Wide>(Problem{a, weight, bias, m, n, k}, out, reinterpret_cast<DTYPE*>(shared));
}

KERNEL(gemm_wide_float32, Wide::THREADS, 2)
(const DTYPE* a, const DTYPE* weight, const DTYPE* bias, float* out, i32 m, i32 n, i32 k) {
  DYNAMIC_SHARED(shared);
  multiply_block<Wide>(Problem{a, weight, bias, m, n, k}, out, reinterpret_cast<DTYPE*>(shared));
}
