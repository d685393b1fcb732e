// Prefill chunks and mixed batches: a block is four warps, each with all of a tile's tokens and its own rows.
//
// The rows are consecutive queries times the heads of the group. Two row tiles to a warp halve what is read from shared
// memory for each product; one computes half as much where rows are few. Results are the same bits.
#ifndef STAGES  // two suffice where the products take longer than the loads
#define STAGES 2
#endif
#include "attention.cuh"

#ifndef ROW_TILES  // of a warp, 16 rows each
#define ROW_TILES 2
#endif

KERNEL(paged_append, 128, MIN_BLOCKS)(ATTENTION_PARAMETERS) {
  DYNAMIC_SHARED(shared);
  attend<ROW_TILES, 4, 1>(ATTENTION_ARGUMENTS, reinterpret_cast<u8*>(shared));
}
