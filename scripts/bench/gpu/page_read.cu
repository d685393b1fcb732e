// Reads whole pages, K and V of one layer, and does nothing with them: the rate that no attention kernel
// over the same block tables can pass.

#include "device.cuh"

// pages: [count] page ids. A block takes a page at a time; 128 threads keep UNROLL x 2 KiB each way in flight.
#ifndef UNROLL
#define UNROLL 8
#endif

KERNEL(page_read, 128, 1)
(const u8* pool, const i32* pages, i32 count, i64 page_stride, i64 half_stride, i32 half_bytes, u32* sink) {
  const int step = 128 * 16;
  u32 seen = 0;
  for (i32 item = blockIdx.x; item < 2 * count; item += gridDim.x) {
    const u8* half = pool + pages[item >> 1] * page_stride + (item & 1) * half_stride;
    for (i32 start = threadIdx.x * 16; start < half_bytes; start += UNROLL * step) {
      uint4 words[UNROLL];
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        const i32 at = start + i * step;
        words[i] = load_streaming((const uint4*)(half + (at < half_bytes ? at : start)));
      }
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) seen ^= words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    }
  }
  // Never true of random numbers; the compiler does not know.
  if (seen == 0x9E3779B9u) *sink = seen;
}
