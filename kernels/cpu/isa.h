// What one instruction set offers: pieces of a step, called through a table.
//
// The tables are made in one file for each instruction set. Those files hold nothing with external
// linkage but the table: an inline function that the linker folded would run the widest
// instructions on a machine that lacks them.
#pragma once
#include "abi.h"

// Row-major activations; `stride` in elements of the type that `input_size` gives.
struct Linear {
  const void* input;  // [rows, stride]: float, or bfloat16 where the table says so
  uint32_t rows, stride;
  uint32_t pairs;           // ceil(K / 2)
  const uint16_t* weights;  // panels [N/32][K/2][32][2]
  float* output;            // [rows, output_stride]
  void* product;            // gate_up only: [rows, output_stride], of the input type
  uint32_t output_stride;
  const float* bias;  // [N] or null
  uint32_t outputs;   // N without padding, for the bias
};

struct Attention {
  const PhModel* model;
  const PhPool* pool;
  const PhChunk* chunk;
  const float* qkv;  // rows of this chunk, [count, qkv_stride]
  uint32_t qkv_stride;
  void* output;  // [count, output_stride], of the input type
  uint32_t output_stride;
  uint32_t layer, kv_head;
  uint32_t first, last;  // queries [first, last) of the chunk
};

struct IsaTable {
  const char* name;
  uint32_t input_size;  // bytes of an element of a linear's input: 4, or 2 for bfloat16
  // y = W x (+ bias) for panels [first, last).
  void (*linear)(const Linear* job, uint32_t first, uint32_t last);
  // output += W x.
  void (*linear_add)(const Linear* job, uint32_t first, uint32_t last);
  // product = silu(gate) * up for pairs of panels [first, last).
  void (*linear_gate_up)(const Linear* job, uint32_t first, uint32_t last);
  // RMSNorm of one row into the input type, zero-padded to `padded`.
  void (*norm)(const float* x, const float* weight, uint32_t n, uint32_t padded, float eps, void* out);
  // Query/key norm and rotary of one position's qkv row in place, for one kv head and its queries, then
  // K and V into the page unless position < write_from.
  void (*append)(const Attention* job, uint32_t position);
  // Scratch: floats, at least attention_scratch() of them.
  void (*attend)(const Attention* job, float* scratch);
};

constexpr uint32_t kTile = 64;        // positions that attention reduces at once, counted from 0
constexpr uint32_t kQueryBlock = 16;  // queries of a chunk in one piece of work

static constexpr uint32_t pad32(uint32_t n) { return (n + 31) / 32 * 32; }

const IsaTable* portable_table(bool bfloat16_inputs);
const IsaTable* avx2_table(bool bfloat16_inputs);
const IsaTable* avx512bf16_table(bool bfloat16_inputs);
