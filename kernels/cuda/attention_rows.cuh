// The inner loop: what one warp computes from keys and values in shared memory.
#pragma once
#include "attention_types.cuh"

// Rows of one warp: what they see and what they have summed.
template <int M_TILES, int WARPS_M, int WARPS_N>
struct Rows {
  using S = Shape<M_TILES, WARPS_M, WARPS_N>;

  float output[M_TILES][HEAD_DIM / 8][4] = {};
  float best[M_TILES][2], sum[M_TILES][2];   // rows lane / 4 and lane / 4 + 8; sums of this lane's columns
  i32 lower[M_TILES][2], upper[M_TILES][2];  // keys that a row sees, inclusive
  i32 position[M_TILES][2];
  float slope[M_TILES][2];
  u32 q[S::kQueriesInRegisters ? M_TILES : 1][S::kQueriesInRegisters ? S::kSteps : 1][4];
  const u8* shared_q;         // of the warp's first row
  i32 seen_first, seen_last;  // by some row of the warp
  i32 full_first, full_last;  // by all rows

  // Rows beyond the item's repeat its last query; they are computed and not written.
  DEVICE void start(const Attention& a, const Item& item, int kv_head, int head_first, const u8* queries,
                    int warp_row) {
    seen_first = full_last = 0x7fffffff;
    seen_last = full_first = -1;
    shared_q = queries + warp_row * S::kQueryBytes;
#pragma unroll
    for (int t = 0; t < M_TILES; ++t) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + t * 16 + i * 8 + lane_id() / 4;
        const i32 at = a.plan[item.query_first + minimum(row / S::kHeads, item.query_count - 1)].position;
        position[t][i] = at;
        lower[t][i] = WINDOW ? maximum(item.kv_first, at - a.window + 1) : item.kv_first;
        upper[t][i] = minimum(item.kv_end - 1, at);
        if (ALIBI) {
          const int head = minimum(head_first + row % S::kHeads, GROUP - 1);
          slope[t][i] = a.slopes[kv_head * GROUP + head] * kLog2E;
        }
        best[t][i] = kNothing;
        sum[t][i] = 0;
        seen_first = minimum(seen_first, lower[t][i]);
        seen_last = maximum(seen_last, upper[t][i]);
        full_first = maximum(full_first, lower[t][i]);
        full_last = minimum(full_last, upper[t][i]);
      }
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      seen_first = minimum(seen_first, shuffle_xor(seen_first, step));
      seen_last = maximum(seen_last, shuffle_xor(seen_last, step));
      full_first = maximum(full_first, shuffle_xor(full_first, step));
      full_last = minimum(full_last, shuffle_xor(full_last, step));
    }
    if constexpr (S::kQueriesInRegisters) {
#pragma unroll
      for (int t = 0; t < M_TILES; ++t)
#pragma unroll
        for (int k = 0; k < S::kSteps; ++k) load_query(q[t][k], t, k);
    }
    // A warp none of whose rows is the item's sees nothing.
    if (warp_row >= item.query_count * S::kHeads) seen_first = 0x7fffffff, seen_last = -1;
  }

  DEVICE void load_query(u32 (&fragment)[4], int t, int k) const {
    const int lane = lane_id();
    ldmatrix_x4(fragment, shared_q + (t * 16 + lane % 16) * S::kQueryBytes + (k * 2 + lane / 16) * 16);
  }

  // Calls use(16-token group, k step, operand of its first 8 tokens, operand of its last 8).
  template <typename Use>
  DEVICE static void for_keys(const u8* keys, Use use) {
    const int lane = lane_id();
    if constexpr (!kFp8) {
      const u8* const base = keys + (lane % 8 + lane / 16 * 8) * S::kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
      for (int k = 0; k < S::kSteps; ++k)
#pragma unroll
        for (int g = 0; g < S::kSlice / 16; ++g) {
          u32 r[4];
          ldmatrix_x4(r, base + g * 16 * S::kRowBytes + k * 32);
          use(g, k, {r[0], r[1]}, {r[2], r[3]});
        }
    } else {
      const u8* const base = keys + lane % 16 * S::kRowBytes;
#pragma unroll
      for (int k = 0; k < S::kSteps; k += 2)
#pragma unroll
        for (int g = 0; g < S::kSlice / 16; ++g) {
          u32 r[4];
          load_pair(r, base + g * 16 * S::kRowBytes, k);
          use(g, k, {widen_low(r[0]), widen_high(r[0])}, {widen_low(r[1]), widen_high(r[1])});
          if (k + 1 < S::kSteps)
            use(g, k + 1, {widen_low(r[2]), widen_high(r[2])}, {widen_low(r[3]), widen_high(r[3])});
        }
    }
  }

  // Both 8-token matrices of the 16-byte chunks k and, where there is one, k + 1.
  DEVICE static void load_pair(u32 (&r)[4], const u8* base, int k) {
    if (k + 1 < S::kSteps) {
      ldmatrix_x4(r, base + (k + lane_id() / 16) * 16);
    } else {
      u32 two[2];
      ldmatrix_x2(two, base + k * 16);
      r[0] = two[0], r[1] = two[1];
    }
  }

  DEVICE static void load_pair_trans(u32 (&r)[4], const u8* base, int k) {
    if (k + 1 < S::kSteps) {
      ldmatrix_x4_trans(r, base + (k + lane_id() / 16) * 16);
    } else {
      u32 two[2];
      ldmatrix_x2_trans(two, base + k * 16);
      r[0] = two[0], r[1] = two[1];
    }
  }

  struct Pair {
    u32 words[2];
  };

  // S::kSlice keys from `first` on, whose rows of shared memory begin at keys and values.
  DEVICE void consume(const Attention& a, float factor, i32 first, const u8* keys, const u8* values) {
    constexpr int kTiles = S::kSlice / 8;
    float s[M_TILES][kTiles][4] = {};
    u32 loaded[M_TILES][4];
    int loaded_step = -1;
    for_keys(keys, [&](int g, int k, Pair low, Pair high) {
      if (!S::kQueriesInRegisters && loaded_step != k) {
#pragma unroll
        for (int t = 0; t < M_TILES; ++t) load_query(loaded[t], t, k);
        loaded_step = k;
      }
#pragma unroll
      for (int t = 0; t < M_TILES; ++t) {
        const u32(&fragment)[4] =
            S::kQueriesInRegisters ? q[S::kQueriesInRegisters ? t : 0][S::kQueriesInRegisters ? k : 0] : loaded[t];
        mma_m16n8k16<Operand>(s[t][g * 2], fragment, low.words);
        mma_m16n8k16<Operand>(s[t][g * 2 + 1], fragment, high.words);
      }
    });

    const bool full = first >= full_first && first + S::kSlice - 1 <= full_last;
#pragma unroll
    for (int t = 0; t < M_TILES; ++t) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& score = s[t][n][j];
          const i32 key = first + n * 8 + lane_id() % 4 * 2 + j % 2;
          if (SOFTCAP) score = a.softcap * kLog2E * (1 - 2 * reciprocal_fast(1 + exp2_fast(score * factor)));
          if (ALIBI)
            score = (SOFTCAP ? score : score * factor) + slope[t][j / 2] * static_cast<float>(key - position[t][j / 2]);
        }
      if (!full) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const i32 key = first + n * 8 + lane_id() % 4 * 2 + j % 2;
            if (key < lower[t][j / 2] || key > upper[t][j / 2]) s[t][n][j] = kNothing;
          }
      }
      accumulate(t, SOFTCAP || ALIBI ? 1.0f : factor, s[t]);
    }

#pragma unroll
    for (int g = 0; g < S::kSlice / 16; ++g) {
      u32 p[M_TILES][4];
#pragma unroll
      for (int t = 0; t < M_TILES; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          p[t][j] = pack2<Operand>(s[t][g * 2 + j / 2][j % 2 * 2], s[t][g * 2 + j / 2][j % 2 * 2 + 1]);
      const u8* const base = values + (g * 16 + lane_id() % 16) * S::kRowBytes;
      if constexpr (!kFp8) {
#pragma unroll
        for (int k = 0; k < S::kSteps; ++k) {
          u32 r[4];
          ldmatrix_x4_trans(r, base + (k * 2 + lane_id() / 16) * 16);
          weigh(k, p, {r[0], r[1]}, {r[2], r[3]});
        }
      } else {
#pragma unroll
        for (int k = 0; k < S::kSteps; k += 2) {
          u32 r[4];
          load_pair_trans(r, base, k);
          weigh_bytes(k, p, r[0], r[1]);
          if (k + 1 < S::kSteps) weigh_bytes(k + 1, p, r[2], r[3]);
        }
      }
    }
  }

  // Turns the scores of row tile t into weights and rescales what is summed to the new maximum.
  template <int kTiles>
  DEVICE void accumulate(int t, float factor, float (&s)[kTiles][4]) {
    float correction[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = best[t][i];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) top = maximum(top, maximum(s[n][i * 2], s[n][i * 2 + 1]));
      top = maximum(top, shuffle_xor(top, 1));
      top = maximum(top, shuffle_xor(top, 2));
      // Rounded before the difference is: where the maximum stays, the correction must be exactly 1.
      const float zero = top == kNothing ? 0.0f : multiply_rn(top, factor);
      correction[i] = exp2_fast(subtract_rn(multiply_rn(best[t][i], factor), zero));
      best[t][i] = top;
      float total = 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int j = i * 2; j < i * 2 + 2; ++j) {
          s[n][j] = exp2_fast(fmaf(s[n][j], factor, -zero));
          total += s[n][j];
        }
      sum[t][i] = fmaf(sum[t][i], correction[i], total);
    }
    // After the first tiles the maximum seldom rises.
    if (ballot(correction[0] != 1 || correction[1] != 1)) {
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) output[t][n][j] *= correction[j / 2];
    }
  }

  DEVICE void weigh(int k, const u32 (&p)[M_TILES][4], Pair low, Pair high) {
#pragma unroll
    for (int t = 0; t < M_TILES; ++t) {
      mma_m16n8k16<Operand>(output[t][k * 2], p[t], low.words);
      mma_m16n8k16<Operand>(output[t][k * 2 + 1], p[t], high.words);
    }
  }

  // first, second: two dimensions of two tokens, of the tokens 0-7 and 8-15.
  DEVICE void weigh_bytes(int k, const u32 (&p)[M_TILES][4], u32 first, u32 second) {
    first = byte_permute(first, 0, 0x3120);
    second = byte_permute(second, 0, 0x3120);
    weigh(k, p, {widen_low(first), widen_low(second)}, {widen_high(first), widen_high(second)});
  }

  // Writes the warp's sums to sums [rows, kMergeStride] and its (maximum, sum) to states [rows].
  DEVICE void store(float factor, float* sums, float2* states, int warp_row) const {
    const int column = lane_id() % 4;
#pragma unroll
    for (int t = 0; t < M_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = warp_row + t * 16 + i * 8 + lane_id() / 4;
        float total = sum[t][i];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        if (column == 0) states[row] = float2{best[t][i] * (SOFTCAP || ALIBI ? 1.0f : factor), total};
        float* const line = sums + row * S::kMergeStride;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n += 2) {
          const float* const x = output[t][n] + i * 2;
          const float* const y = output[t][n + 1] + i * 2;
          if (kFp8) {
            *reinterpret_cast<float4*>(line + n * 8 + column * 4) = float4{x[0], y[0], x[1], y[1]};
          } else {
            *reinterpret_cast<float2*>(line + n * 8 + column * 2) = float2{x[0], x[1]};
            *reinterpret_cast<float2*>(line + n * 8 + 8 + column * 2) = float2{y[0], y[1]};
          }
        }
      }
  }
};
