// From the sums of warps, and of splits, to the output.
#pragma once
#include "attention_types.cuh"

// Sums of parts with different maxima, added in the order of the parts. A part that saw nothing adds nothing.
struct Merged {
  float top = kNothing;
  float sum = 0;
  float value[4] = {};

  DEVICE void raise(float2 state) { top = maximum(top, state.x); }
  DEVICE void add(float2 state, float4 values) {
    const float weight = top == kNothing ? 0.0f : exp2_fast(state.x - top);
    sum += state.y * weight;
    value[0] += values.x * weight;
    value[1] += values.y * weight;
    value[2] += values.z * weight;
    value[3] += values.w * weight;
  }

  DEVICE void write(Element* target) const {
    const float divisor = sum > 0 ? 1 / sum : 0.0f;
    *reinterpret_cast<uint2*>(target) = uint2{pack2<Element>(value[0] * divisor, value[1] * divisor),
                                              pack2<Element>(value[2] * divisor, value[3] * divisor)};
  }
};

// Adds up what the warp columns hold; writes the output, or a partial where the query has several splits.
template <typename S, int WARPS_N>
DEVICE void write_rows(const Attention& a, const Item& item, int kv_head, int head_first, const float* sums,
                       const float2* states) {
  const float v_scale = kFp8 ? a.v_scale[kv_head] : 1.0f;
  const i64 heads = static_cast<i64>(a.kv_heads) * GROUP;
  for (int i = static_cast<int>(threadIdx.x); i < item.query_count * S::kHeads * (HEAD_DIM / 4); i += S::kThreads) {
    const int row = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    if (head_first + row % S::kHeads >= GROUP) continue;
    const i32 token = item.query_first + row / S::kHeads;
    const i64 head = kv_head * GROUP + head_first + row % S::kHeads;
    Merged merged;
#pragma unroll
    for (int n = 0; n < WARPS_N; ++n) merged.raise(states[n * S::kRows + row]);
#pragma unroll
    for (int n = 0; n < WARPS_N; ++n)
      merged.add(states[n * S::kRows + row],
                 *reinterpret_cast<const float4*>(sums + (n * S::kRows + row) * S::kMergeStride + d));
#pragma unroll
    for (int j = 0; j < 4; ++j) merged.value[j] *= v_scale;
    const Query query = a.plan[token];
    if (query.splits <= 1) {
      merged.write(a.output + (token * heads + head) * HEAD_DIM + d);
    } else {
      const i64 slot = (query.partial_first + item.split) * heads + head;
      *reinterpret_cast<float4*>(a.partials + slot * HEAD_DIM + d) =
          float4{merged.value[0], merged.value[1], merged.value[2], merged.value[3]};
      if (d == 0) a.states[slot] = float2{merged.top, merged.sum};
    }
  }
}

// The last block to arrive at a query adds up its partials, in the order of the splits.
template <typename S>
DEVICE void merge_splits(const Attention& a, const Item& item, int kv_head, u32* last) {
  // What this thread wrote must be seen by whoever sees its block arrive.
  fence();
  sync_block();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < item.query_count; i += S::kThreads) {
    const i32 token = item.query_first + i;
    const u32 arrivals = static_cast<u32>(a.plan[token].splits * S::kHeadBlocks);
    u32* const counter = a.counters + static_cast<i64>(token) * a.kv_heads + kv_head;
    last[i] = a.plan[token].splits > 1 && atomic_add(counter, 1u) == arrivals - 1;
    if (last[i]) *counter = 0;
  }
  sync_block();
  fence();
  const i64 heads = static_cast<i64>(a.kv_heads) * GROUP;
  for (int i = thread; i < item.query_count * GROUP * (HEAD_DIM / 4); i += S::kThreads) {
    const int row = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    if (!last[row / GROUP]) continue;
    const i32 token = item.query_first + row / GROUP;
    const i64 head = kv_head * GROUP + row % GROUP;
    const Query query = a.plan[token];
    const i64 slot = query.partial_first * heads + head;
    Merged merged;
    for (int split = 0; split < query.splits; ++split)
      merged.raise(load_shared_by_blocks(a.states + slot + split * heads));
#pragma unroll 4
    for (int split = 0; split < query.splits; ++split)
      merged.add(
          load_shared_by_blocks(a.states + slot + split * heads),
          load_shared_by_blocks(reinterpret_cast<const float4*>(a.partials + (slot + split * heads) * HEAD_DIM + d)));
    merged.write(a.output + (token * heads + head) * HEAD_DIM + d);
  }
}
