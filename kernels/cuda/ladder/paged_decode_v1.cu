// Version 1: a block for every (query, head), as vLLM's first paged attention kernel. A thread scores one token of 128
// at a time on the CUDA cores, then sums some dimensions over them. Keys and values are read again by each head of a
// group and waited for. No splits, window, soft cap or ALiBi. It is where the ladder starts: 160 to
// 190 GB/s on one H200.
#include "attention_types.cuh"

constexpr int kThreads = 128;

DEVICE float block_maximum(float value, float* scratch) {
  sync_block();
#pragma unroll
  for (int step = 1; step < 32; step *= 2) value = maximum(value, shuffle_xor(value, step));
  if (lane_id() == 0) scratch[warp_id()] = value;
  sync_block();
  return maximum(maximum(scratch[0], scratch[1]), maximum(scratch[2], scratch[3]));
}

KERNEL(paged_decode_v1, 128, 1)(ATTENTION_PARAMETERS) {
  SHARED float query[HEAD_DIM];
  SHARED float weights[kThreads];
  SHARED float scratch[4];
  const Item item = items[blockIdx.y];
  if (!item.valid) return;
  const int thread = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x), kv_head = head / GROUP;
  const i32* const table = tables + static_cast<i64>(item.table_row) * table_stride;
  const Element* const line = reinterpret_cast<const Element*>(queries + item.query_first * query_stride);
  const float factor = scale * (kFp8 ? k_scale[kv_head] : 1.0f) * kLog2E;
  for (int d = thread; d < HEAD_DIM; d += kThreads) query[d] = to_float(line[head * HEAD_DIM + d]) * factor;

  constexpr int kDims = (HEAD_DIM + kThreads - 1) / kThreads;
  float values[kDims] = {}, best = kNothing, sum = 0;
  for (i32 first = item.kv_first; first < item.kv_end; first += kThreads) {
    const int count = minimum(kThreads, item.kv_end - first);
    const auto row = [&](int i, bool value) {
      const i32 token = first + i;
      const u8* const page = pool + table[token / PAGE_SIZE] * page_stride + (value ? half_stride : 0);
      return reinterpret_cast<const Stored*>(page) + (kv_head * PAGE_SIZE + token % PAGE_SIZE) * HEAD_DIM;
    };
    sync_block();
    float score = kNothing;
    if (thread < count) {
      const Stored* const key = row(thread, false);
      score = 0;
      for (int d = 0; d < HEAD_DIM; ++d) score += query[d] * to_float(key[d]);
    }
    const float top = maximum(best, block_maximum(score, scratch)), correction = exp2_fast(best - top);
    best = top;
    weights[thread] = exp2_fast(score - top);
    sync_block();
    sum *= correction;
    for (float& value : values) value *= correction;
    for (int i = 0; i < count; ++i) {
      sum += weights[i];
      const Stored* const value = row(i, true);
#pragma unroll
      for (int j = 0; j < kDims; ++j)
        if (thread + j * kThreads < HEAD_DIM) values[j] += weights[i] * to_float(value[thread + j * kThreads]);
    }
  }
  const float divisor = (kFp8 ? v_scale[kv_head] : 1.0f) / sum;
  Element* const target = output + (static_cast<i64>(item.query_first) * kv_heads * GROUP + head) * HEAD_DIM;
  for (int j = 0; j < kDims; ++j)
    if (thread + j * kThreads < HEAD_DIM) target[thread + j * kThreads] = from_float<Element>(values[j] * divisor);
}
