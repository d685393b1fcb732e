// Decode, and anything of few rows: a block is four warps, each with 16 of a tile's 64 tokens and all of the rows.
//
// A step reads every key and value once, so this kernel is to be as fast as the memory: the warps load, wait and
// compute on their own, and meet once, when they add up. Versions 1 and 2 are in ladder/; this is 3: cp.async stages
// instead of loads that are waited for, keys split over warps and over blocks, partial results merged in the same
// launch. Gain over 2: 3.2 to 4.2 times on one H200.
#include "attention.cuh"

#ifndef ROW_TILES  // 16 rows each
#define ROW_TILES 1
#endif

KERNEL(paged_decode, 128, MIN_BLOCKS)(ATTENTION_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  attend<ROW_TILES, 1, 4>(ATTENTION_ARGUMENTS, reinterpret_cast<u8*>(shared));
}
