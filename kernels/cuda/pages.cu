// Whole pages, or their first slots, from one place to another: many of them in one launch. Every thread has BATCH
// accesses of 16 bytes in flight before it stores the first.
//
// A page is `parts` runs of memory, one for each layer and half (K, V); a run holds the page's slots of all KV heads.
// Runs lie apart by layer_stride and half_stride, pages by page_stride, in bytes.

#include "device.cuh"

constexpr int THREADS = 256;
constexpr int BATCH = 4;

// copy(i) names source and target of vector i: nothing depends on the order.
template <typename Place>
DEVICE void copy_vectors(i32 count, Place place) {
  for (i32 first = static_cast<i32>(threadIdx.x); first < count; first += THREADS * BATCH) {
    uint4 vectors[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (first + i * THREADS < count) vectors[i] = load_streaming(place(first + i * THREADS).source);
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      if (first + i * THREADS < count) *place(first + i * THREADS).target = vectors[i];
    }
  }
}

struct Vectors {
  const uint4* source;
  uint4* target;
};

// Grid: (pairs, parts). pairs: {source page, target page, slots, 0}. K and V of the first `slots` slots of all KV
// heads. slot_vectors: 16-byte vectors in a slot of one head. No page may be a source and a target.
KERNEL(copy_slots, THREADS, 1)
(u8* pool, const i32* pairs, i64 page_stride, i64 layer_stride, i64 half_stride, i32 kv_heads, i32 page_size,
 i32 slot_vectors) {
  const i32* pair = pairs + static_cast<i64>(blockIdx.x) * 4;
  const i32 head_vectors = pair[2] * slot_vectors;
  u8* part = pool + blockIdx.y / 2 * layer_stride + blockIdx.y % 2 * half_stride;
  const uint4* source = reinterpret_cast<const uint4*>(part + pair[0] * page_stride);
  uint4* target = reinterpret_cast<uint4*>(part + pair[1] * page_stride);
  copy_vectors(kv_heads * head_vectors, [=](i32 i) {
    const i32 head = i / head_vectors;
    const i32 at = head * page_size * slot_vectors + i - head * head_vectors;
    return Vectors{source + at, target + at};
  });
}

// Run `run` of a list of pages: its place in the pool. The list's runs one after another are the packed form.
DEVICE u8* in_pool(u8* pool, const i32* pages, i64 run, i32 parts, i64 page_stride, i64 layer_stride, i64 half_stride) {
  const i64 index = run / parts;
  const i32 part = static_cast<i32>(run - index * parts);
  return pool + pages[index] * page_stride + part / 2 * layer_stride + part % 2 * half_stride;
}

// Grid: any; blocks take runs in turn. pages: [count]. packed: [count][parts][run_vectors] vectors, in device memory
// or in host memory that the device sees.
KERNEL(gather_pages, THREADS, 1)
(u8* pool, const i32* pages, uint4* packed, i64 page_stride, i64 layer_stride, i64 half_stride, i32 count, i32 parts,
 i32 run_vectors) {
  for (i64 run = blockIdx.x; run < static_cast<i64>(count) * parts; run += gridDim.x) {
    const u8* from = in_pool(pool, pages, run, parts, page_stride, layer_stride, half_stride);
    const uint4* source = reinterpret_cast<const uint4*>(from);
    uint4* target = packed + run * run_vectors;
    copy_vectors(run_vectors, [=](i32 i) { return Vectors{source + i, target + i}; });
  }
}

// The way back. No page may be in the list twice.
KERNEL(scatter_pages, THREADS, 1)
(u8* pool, const i32* pages, const uint4* packed, i64 page_stride, i64 layer_stride, i64 half_stride, i32 count,
 i32 parts, i32 run_vectors) {
  for (i64 run = blockIdx.x; run < static_cast<i64>(count) * parts; run += gridDim.x) {
    u8* to = in_pool(pool, pages, run, parts, page_stride, layer_stride, half_stride);
    const uint4* source = packed + run * run_vectors;
    uint4* target = reinterpret_cast<uint4*>(to);
    copy_vectors(run_vectors, [=](i32 i) { return Vectors{source + i, target + i}; });
  }
}
