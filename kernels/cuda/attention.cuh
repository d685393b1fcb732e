// Attention of a step's queries over paged keys and values: one loader and one inner loop for the shapes of
// paged_decode.cu and paged_append.cu.
//
// A block takes one work item (queries x a range of keys) and one KV head. Its rows are (query, head of the group):
//
//   rows    16 * M_TILES * WARPS_M   row r is query r / heads, head r % heads of the group
//   tokens  kTile = 64 at a time, at multiples of kTile; warp column n owns the kSlice tokens from n * kSlice
//
// Warps of one column share the tokens they load (cp.async, STAGES deep) and synchronise among themselves only, so
// decode (one warp to a column) runs without a block barrier until its columns are merged through shared memory.
//
// S = Q K^T and O += P V are mma.m16n8k16 with float32 accumulators; the accumulator of S has the layout of the
// operand P, so P never leaves the registers (FlashAttention-2). Scores live in units of log2.
//
// fp8 pages: e4m3 becomes f16 in registers after ldmatrix, which moves 16-bit units. For K this permutes the order in
// which the products of a row are summed, so Q is stored permuted alike; for V a unit holds two dimensions of one
// token, so the bytes of two tokens are interleaved and an output tile holds every second dimension.
//
// A row's result depends on its own query, keys and split alone: tiles and splits lie at absolute positions, and a
// tile or a split that a row does not see leaves every bit of it as it was.
#pragma once
#include "attention_loader.cuh"
#include "attention_merge.cuh"
#include "attention_rows.cuh"

// The item's queries to shared memory [kRows, kQueryBytes], as operands; rows beyond the item's are zeros.
template <typename S>
DEVICE void load_queries(const Attention& a, const Item& item, int kv_head, int head_first, u8* shared) {
  for (int i = static_cast<int>(threadIdx.x); i < S::kRows * (HEAD_DIM / 8); i += S::kThreads) {
    const int row = i / (HEAD_DIM / 8), k = i % (HEAD_DIM / 8) * 8;
    const int query = row / S::kHeads, head = head_first + row % S::kHeads;
    u32 words[4] = {};
    if (query < item.query_count && head < GROUP) {
      const u8* const line = a.queries + (item.query_first + query) * a.query_stride +
                             static_cast<i64>(kv_head * GROUP + head) * (HEAD_DIM * 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        words[j] = *reinterpret_cast<const u32*>(line + dimension_at(k + j * 2) * 2);
        if constexpr (!kSame<Element, Operand>) {
          const float2 pair = unpack2<Element>(words[j]);
          words[j] = pack2<Operand>(pair.x, pair.y);
        }
      }
    }
    *reinterpret_cast<uint4*>(shared + row * S::kQueryBytes + k * 2) = uint4{words[0], words[1], words[2], words[3]};
  }
}

// Grid (kv_heads * kHeadBlocks, items): blocks that run together read neighbouring heads of the same pages.
template <int M_TILES, int WARPS_M, int WARPS_N>
DEVICE void attend(const Attention& a, u8* shared) {
  using S = Shape<M_TILES, WARPS_M, WARPS_N>;
  const Item item = a.items[blockIdx.y];
  if (!item.valid) return;
  const int kv_head = static_cast<int>(blockIdx.x) / S::kHeadBlocks;
  const int head_first = static_cast<int>(blockIdx.x) % S::kHeadBlocks * S::kRows;
  const int column = warp_id() / WARPS_M, warp_row = warp_id() % WARPS_M * 16 * M_TILES;
  const i32 tile_first = item.kv_first / kTile * kTile;
  const int tiles = (item.kv_end - tile_first + kTile - 1) / kTile;

  Loader<S> loader;
  loader.head = a.pool + static_cast<i64>(kv_head) * (PAGE_SIZE * HEAD_DIM * static_cast<int>(sizeof(Stored)));
  loader.table = a.tables + static_cast<i64>(item.table_row) * a.table_stride;
  loader.page_stride = a.page_stride;
  loader.half_stride = a.half_stride;
  loader.shared = shared + column * S::kColumnBytes;
  loader.kv_first = item.kv_first;
  loader.kv_end = item.kv_end;
  loader.first = tile_first + column * S::kSlice;
  loader.start();
#pragma unroll
  for (int tile = 0; tile < S::kAhead; ++tile) {
    if (tile < tiles) loader.issue(tile);
    cp_async_commit();
  }

  u8* const queries = shared + WARPS_N * S::kColumnBytes;
  load_queries<S>(a, item, kv_head, head_first, queries);
  sync_block();
  // SOFTCAP: what turns a product into the argument of exp2 in tanh(x) = 1 - 2 / (1 + exp2(2 x log2 e)).
  const float product = a.scale * (kFp8 ? a.k_scale[kv_head] : 1.0f) * kLog2E;
  const float factor = SOFTCAP ? product * 2 / a.softcap : product;
  Rows<M_TILES, WARPS_M, WARPS_N> rows;
  rows.start(a, item, kv_head, head_first, queries, warp_row);

  for (int tile = 0; tile < tiles; ++tile) {
    if constexpr (S::kAlone) {
      cp_async_wait<STAGES - 1>();
      S::synchronise();
    } else if constexpr (STAGES > 1) {
      cp_async_wait<STAGES - 2>();
      // The tile has arrived for all, and none still reads the one before it, whose place is filled next.
      S::synchronise();
      if (tile + STAGES - 1 < tiles) loader.issue(tile + STAGES - 1);
      cp_async_commit();
    } else {
      S::synchronise();
      loader.issue(tile);
      cp_async_commit();
      cp_async_wait<0>();
      S::synchronise();
    }
    const u8 *const keys = loader.half(tile, 0), *const values = loader.half(tile, 1);
    const i32 first = loader.first + tile * kTile;
    if (first <= rows.seen_last && first + S::kSlice > rows.seen_first) rows.consume(a, factor, first, keys, values);
    if constexpr (S::kAlone) {
      // Its place is filled at once: while the warp waits for the next tile, all stages are under way.
      S::synchronise();
      if (tile + STAGES < tiles) loader.issue(tile + STAGES);
      cp_async_commit();
    }
  }

  // The stages' memory now holds what the columns summed.
  cp_async_wait<0>();
  sync_block();
  float* const sums = reinterpret_cast<float*>(shared);
  float2* const states = reinterpret_cast<float2*>(sums + WARPS_N * S::kRows * S::kMergeStride);
  rows.store(factor, sums + column * S::kRows * S::kMergeStride, states + column * S::kRows, warp_row);
  sync_block();
  write_rows<S, WARPS_N>(a, item, kv_head, head_first, sums, states);
  // The queries of an item all have several splits, or none has.
  if (a.plan[item.query_first].splits > 1)
    merge_splits<S>(a, item, kv_head, reinterpret_cast<u32*>(states + WARPS_N * S::kRows));
}
