// What an attention kernel is compiled for (macros), what it is given, how a block lays out its work.
#pragma once
#include "device.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef PAGE_SIZE
#define PAGE_SIZE 16
#endif
#ifndef GROUP  // query heads of one KV head
#define GROUP 4
#endif
#ifndef DTYPE  // of queries and output: bf16, f16
#define DTYPE bf16
#endif
#ifndef KV_DTYPE  // of the pages: bf16, f16, e4m3
#define KV_DTYPE bf16
#endif
#ifndef WINDOW  // 1: a query sees only the last `window` positions
#define WINDOW 0
#endif
#ifndef SOFTCAP  // 1: scores s become softcap * tanh(s / softcap)
#define SOFTCAP 0
#endif
#ifndef ALIBI  // 1: scores get slopes[head] * (key - query)
#define ALIBI 0
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef MIN_BLOCKS  // resident on a multiprocessor: bounds the registers
#define MIN_BLOCKS 2
#endif

constexpr int kTile = 64;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNothing = -kInfinity;  // the score of what is not seen

template <typename T, typename U>
constexpr bool kSame = false;
template <typename T>
constexpr bool kSame<T, T> = true;

template <typename T>
struct OperandOf {
  using Type = T;
};
template <>
struct OperandOf<e4m3> {
  using Type = f16;
};

using Element = DTYPE;
using Stored = KV_DTYPE;
using Operand = OperandOf<Stored>::Type;
constexpr bool kFp8 = sizeof(Stored) == 1;

struct alignas(16) Query {
  i32 position, table_row, partial_first, splits;
};

struct alignas(16) Item {
  i32 query_first, query_count, kv_first, kv_end, split, table_row, valid, unused;
};

// Of every attention kernel; `heads` below is kv_heads * GROUP.
struct Attention {
  const u8* queries;  // [tokens, heads, HEAD_DIM] Element, tokens query_stride bytes apart
  Element* output;    // [tokens, heads, HEAD_DIM]
  i64 query_stride;
  const u8* pool;  // of the layer; strides in bytes
  i64 page_stride, half_stride;
  const float *k_scale, *v_scale;  // [kv_heads], for fp8 pages
  const float* slopes;             // [heads], for ALiBi
  const Query* plan;               // [tokens]
  const Item* items;               // [gridDim.y]
  const i32* tables;               // [rows, table_stride] page ids
  i32 table_stride;
  float* partials;  // [slots, heads, HEAD_DIM]: sums of p * v, not divided by the sum of p
  float2* states;   // [slots, heads]: (maximum score, sum of p)
  u32* counters;    // [tokens, kv_heads], zero before and after
  i32 kv_heads, window;
  float softcap, scale;
};

#define ATTENTION_PARAMETERS                                                                                         \
  const u8 *queries, Element *output, i64 query_stride, const u8 *pool, i64 page_stride, i64 half_stride,            \
      const float *k_scale, const float *v_scale, const float *slopes, const Query *plan, const Item *items,         \
      const i32 *tables, i32 table_stride, float *partials, float2 *states, u32 *counters, i32 kv_heads, i32 window, \
      float softcap, float scale
#define ATTENTION_ARGUMENTS                                                                                       \
  Attention {                                                                                                     \
    queries, output, query_stride, pool, page_stride, half_stride, k_scale, v_scale, slopes, plan, items, tables, \
        table_stride, partials, states, counters, kv_heads, window, softcap, scale                                \
  }

DEVICE int minimum(int a, int b) { return a < b ? a : b; }
DEVICE int maximum(int a, int b) { return a > b ? a : b; }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// The dimension whose query value stands at place k of a row: as e4m3 pairs of K lie after ldmatrix.
DEVICE int dimension_at(int k) { return kFp8 ? k / 16 * 16 + k % 8 / 2 * 4 + k % 16 / 8 * 2 + k % 2 : k; }

// The low or the high pair of e4m3: two dimensions' values of one token, or one dimension's of two, as an operand.
DEVICE u32 widen_low(u32 pairs) { return e4m3x2_to_f16x2(static_cast<u16>(pairs)); }
DEVICE u32 widen_high(u32 pairs) {
#if !defined(PAGEHOLD_HOST) && __CUDA_ARCH__ >= 890
  // The instruction can take the high half itself, where the halves are named; a shift would come before it.
  u32 result;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}" : "=r"(result) : "r"(pairs));
  return result;
#else
  return e4m3x2_to_f16x2(static_cast<u16>(pairs >> 16));
#endif
}

template <int M_TILES, int WARPS_M, int WARPS_N>
struct Shape {
  static constexpr int kWarps = WARPS_M * WARPS_N;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * M_TILES * WARPS_M;
  static constexpr int kSlice = kTile / WARPS_N;
  static constexpr int kLoaders = 32 * WARPS_M;
  static constexpr bool kAlone = WARPS_M == 1;                 // a warp waits for no other one
  static constexpr int kAhead = kAlone ? STAGES : STAGES - 1;  // tiles under way before the first is needed
  static constexpr int kSteps = HEAD_DIM / 16;
  static constexpr bool kQueriesInRegisters = HEAD_DIM * M_TILES <= 128;

  static constexpr int kHeads = GROUP < kRows ? GROUP : kRows;  // of the group in one block
  static constexpr int kHeadBlocks = (GROUP + kRows - 1) / kRows;
  static constexpr int kQueries = kRows / kHeads;

  // Rows of shared memory are an odd number of 16-byte chunks apart: the 8 rows of an ldmatrix fall into 8 banks of 16
  // B.
  static constexpr int kChunks = HEAD_DIM * static_cast<int>(sizeof(Stored)) / 16;
  static constexpr int kRowBytes = (kChunks | 1) * 16;
  static constexpr int kHalfBytes = kSlice * kRowBytes;
  static constexpr int kQueryBytes = HEAD_DIM * 2 + 16;
  static constexpr int kColumnBytes = STAGES * 2 * kHalfBytes;
  static constexpr int kMergeStride = HEAD_DIM + 8;  // floats

  DEVICE static void synchronise() {
    if constexpr (WARPS_M == 1)
      sync_warp();
    else
      sync_block();
  }
};
