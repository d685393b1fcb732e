// From pages to shared memory.
#pragma once
#include "attention_types.cuh"

// Copies the keys and values of one column, tile by tile. Tokens outside [kv_first, kv_end) become zeros and their
// slots are not read: what lies there may be NaN, and 0 * NaN is not 0.
template <typename S>
struct Loader {
  static constexpr int kIds = S::kSlice > PAGE_SIZE ? S::kSlice / PAGE_SIZE : 1;  // pages of a slice
  static constexpr int kWindowTiles = 32 / kIds;

  const u8* head;  // the K of the item's KV head in page 0
  const i32* table;
  i64 page_stride, half_stride;
  u8* shared;
  i32 kv_first, kv_end, first;  // first: token of the column in tile 0
  i32 ids, next_ids;            // lane i: page i % kIds of tile i / kIds in this window of tiles, and in the next

  DEVICE i32 page_ids(int window) const {
    const int lane = lane_id();
    const i32 token = first + (window * kWindowTiles + lane / kIds) * kTile + lane % kIds * PAGE_SIZE;
    const i32 entry = token / PAGE_SIZE;
    return entry >= kv_first / PAGE_SIZE && entry * PAGE_SIZE < kv_end ? table[entry] : 0;
  }

  DEVICE void start() {
    ids = page_ids(0);
    next_ids = page_ids(1);
  }

  DEVICE u8* half(int tile, int which) const {
    return shared + (static_cast<u32>(tile) % STAGES * 2 + which) * S::kHalfBytes;
  }

  // Tiles are issued in order.
  DEVICE void issue(int tile) {
    if (tile != 0 && tile % kWindowTiles == 0) {
      ids = next_ids;
      next_ids = page_ids(tile / kWindowTiles + 1);
    }
    const int id = tile % kWindowTiles * kIds;
    const i32 slice = first + tile * kTile;
    // A slice is whole pages, or lies within one.
    const u8* const start = head + (kIds == 1 ? static_cast<u32>(slice) % PAGE_SIZE * S::kChunks * 16 : 0);
    const u32 token = static_cast<u32>(slice - kv_first), length = static_cast<u32>(kv_end - kv_first);
    u8* const keys = half(tile, 0);
    const u32 thread = threadIdx.x % S::kLoaders;
    if constexpr (S::kLoaders % S::kChunks == 0 && S::kLoaders / S::kChunks <= PAGE_SIZE) {
      // A pass copies whole rows of one page: its addresses are those of the first pass and a constant.
      constexpr int kRows = S::kLoaders / S::kChunks;
      const u32 thread_row = thread / S::kChunks;
      u8* const target = keys + thread_row * S::kRowBytes + thread % S::kChunks * 16;
      const u8* source = nullptr;
#pragma unroll
      for (int row = 0; row < S::kSlice; row += kRows) {
        if (row % PAGE_SIZE == 0) source = start + thread * 16 + shuffle(ids, id + row / PAGE_SIZE) * page_stride;
        copy(target + row * S::kRowBytes, source + row % PAGE_SIZE * S::kChunks * 16,
             token + thread_row + row < length);
      }
    } else {
      constexpr u32 kCopies = S::kSlice * S::kChunks, kPageChunks = PAGE_SIZE * S::kChunks;
#pragma unroll
      for (u32 i = thread; i < kCopies + thread; i += S::kLoaders) {
        const u32 row = i / S::kChunks, page = minimum(i / kPageChunks, kIds - 1);
        const i32 from = shuffle(ids, id + static_cast<int>(page));
        if (kCopies % S::kLoaders != 0 && i >= kCopies) continue;
        copy(keys + row * S::kRowBytes + i % S::kChunks * 16, start + from * page_stride + i % kPageChunks * 16,
             token + row < length);
      }
    }
  }

  DEVICE void copy(u8* target, const u8* source, bool valid) const {
    cp_async16(target, source, valid);
    cp_async16(target + S::kHalfBytes, source + half_stride, valid);
  }
};
