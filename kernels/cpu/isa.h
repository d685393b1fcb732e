// What one instruction set offers: pieces of a step, called through a table.
//
// The tables are made in one file for each instruction set. Those files hold nothing with external
// linkage but the table: an inline function that the linker folded would run the widest
// instructions on a machine that lacks them.
#pragma once
#include <stddef.h>

#include "abi.h"

// What a linear takes, row-major.
struct Inputs {
  const void* at;   // [rows, stride]: float, or bfloat16 where the table says so; codes of int8 for takes_codes()
  uint32_t stride;  // in elements; of codes in twos
  uint32_t pairs;   // ceil(K / 2); of codes fours, ceil(K / 4)
  // What codes are multiplied by: [rows] with kPhIntegers; with blocks of integers [rows][2][blocks], each block's
  // factor, and then that times the sum of its codes.
  const float* factors;
};

struct Linear : Inputs {
  uint32_t rows;
  PhMatrix weights;
  float* output;  // [rows, output_stride]
  void* product;  // gate_up only: [rows, output_stride], of the input type
  uint32_t output_stride;
  const float* bias;  // [N] or null
  uint32_t outputs;   // N without padding, for the bias
  // What the thread is likely to multiply by after its last panel, or null: tiles fetch it meanwhile.
  const void* following;
};

// One position whose heads attend, as one piece of work sees it.
struct Query {
  uint32_t position;
  bool write;        // append K and V; else they are in the page
  float* projected;  // its row of q | k | v
  void* output;      // [heads * head_dim], of the input type
  float* partials;   // slots for what the piece makes of it; null when it has all that the query sees
};

// The heads of kv heads [kv_head, kv_head + kv_heads) attend to parts [first, last) of a context: positions
// [first * kPart, last * kPart), as far as a query sees them.
struct Attention {
  const PhModel* model;
  const PhPool* pool;
  const uint64_t* row;  // block table
  const Query* queries;
  uint32_t count;  // of queries; at most attention_queries()
  uint32_t layer;
  uint32_t kv_head, kv_heads;  // at most heads_together()
  uint32_t first, last;
  // What the queries see begins here: parts are combined into the first slot, the other slots stay empty.
  // Else each part has its slot.
  bool leading;
  const Attention* following;  // what the thread is likely to do next, or null: its first part is fetched meanwhile
};

// The noise of one draw; a token's counter is (position, index, token, 0), the key the seed.
struct Noise {
  uint64_t seed;
  uint32_t position, index;
};

struct IsaTable {
  const char* name;
  uint32_t input_size;  // bytes of an element of a linear's input: 4, or 2 for bfloat16
  uint32_t few_rows;    // up to so many are multiplied faster by blocks than by bfloat16, which is more bytes
  // y = W x (+ bias) for panels [first, last). expanded: scratch of expanded_size() elements.
  void (*linear)(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded);
  // output += W x.
  void (*linear_add)(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded);
  // product = silu(gate) * up for pairs of panels [first, last).
  void (*linear_gate_up)(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded);
  // RMSNorm of one row into the input type, zero-padded to `padded`.
  void (*norm)(const float* x, const float* weight, uint32_t n, uint32_t padded, float eps, void* out);
  // A row [n] of that type, rotated as kPhIntegers says, into codes [padded]. width: 1 for rows that are not rotated.
  // scratch: floats, [padded]. Returns the row's factor.
  float (*round_row)(const void* row, uint32_t n, uint32_t width, uint32_t padded, float* scratch, int8_t* codes);
  // A row for blocks of integers: codes [padded], factors [2][blocks].
  void (*round_blocks)(const void* row, uint32_t n, uint32_t padded, int8_t* codes, float* factors);
  // Query/key norm and rotary of the queries' rows in place, for the kv heads and their queries, then K and V into the
  // pages. The queries are neighbours in one chunk.
  void (*append)(const Attention* job);
  // Scratch: floats, at least attention_scratch() of them.
  void (*attend)(const Attention* job, float* scratch);
  // At the end of a call: what the calling thread has in registers of its own kind is dropped, for another library may
  // use them next.
  void (*rest)();
  // Slots [0, slots) of a query to its output.
  void (*merge)(const PhModel* model, const Query* query, const float* partials, uint32_t slots, float* scratch);
  // The largest of n floats, -inf for none.
  float (*largest)(const float* x, uint32_t n);
  // Indices of x >= least, in order, into ids [n]. Returns how many.
  uint32_t (*at_least)(const float* x, uint32_t n, float least, uint32_t* ids);
  // Sum of exp(x - most), in double.
  double (*weight)(const float* x, uint32_t n, float most);
  // Of tokens [first, first + count), count <= kNoiseBlock: those whose noisy logit may reach `most`, and maybe
  // a few more. z: by token. Returns how many.
  uint32_t (*contenders)(const Noise* noise, const float* z, uint32_t first, uint32_t count, float most, uint32_t* ids);
};

constexpr uint32_t kPart = 128;       // positions that attention reduces at once, counted from 0
constexpr uint32_t kRowBlock = 384;   // rows (a query of one head) in one piece of work, unless one query has more
constexpr uint32_t kNoiseBlock = 64;  // tokens whose noise is made at once

// Philox4x32 (Salmon et al., SC 2011).
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;

constexpr uint32_t kPanel = 32;              // outputs of a panel
constexpr uint32_t kBlock = 32;              // inputs that share a scale
constexpr uint32_t kPanelHead = 8 * kPanel;  // bytes before the codes of a panel of kPhIntegers

// Vectors of kRotated values that are rotated together, at most.
constexpr uint32_t kRotated = 16, kMostRotated = 32;

// What is multiplied by codes of inputs, four in a word, instead of pairs of bfloat16.
static constexpr bool is_integer_blocks(uint32_t encoding) { return encoding >= kPhIntegerBlocks8; }
static constexpr bool takes_codes(uint32_t encoding) { return encoding == kPhIntegers || is_integer_blocks(encoding); }
static constexpr uint32_t inputs_in_word(uint32_t encoding) { return takes_codes(encoding) ? 4 : 2; }

// Blocks with codes of 4 bits and least values; others have 8 bits.
static constexpr bool has_least(uint32_t encoding) { return encoding == kPhInt4 || encoding == kPhIntegerBlocks4; }

// Bytes of a block of a quantized panel, and of one panel. pairs: as Inputs has them.
static constexpr size_t packed_block_size(uint32_t encoding) {
  return kPanel * (has_least(encoding) ? 4 + kBlock / 2 : 2 + kBlock);
}
static constexpr uint32_t blocks_of(uint32_t encoding, uint32_t pairs) {
  return (pairs * inputs_in_word(encoding) + kBlock - 1) / kBlock;
}
static constexpr size_t panel_size(uint32_t encoding, uint32_t pairs) {
  const size_t ready = size_t{pairs} * 4 * kPanel;
  if (encoding == kPhIntegers) return kPanelHead + ready;
  return encoding == kPhBfloat16 ? ready : blocks_of(encoding, pairs) * packed_block_size(encoding);
}
// Two panels, gate and up, as bfloat16, in whole blocks.
static constexpr size_t expanded_size(uint32_t pairs) { return 2 * (size_t{pairs} + kBlock / 2) * 2 * kPanel; }

// Partial: what one head of a query has of some parts, as floats [partial_size()]: the largest score, the sum of
// weights, 14 unused, then the weighted values. A largest score of -inf: nothing seen. A slot is one for each head of a
// query.
constexpr uint32_t kPartialValues = 16;

static constexpr uint32_t pad16(uint32_t n) { return (n + 15) / 16 * 16; }
static constexpr uint32_t pad32(uint32_t n) { return (n + 31) / 32 * 32; }
static constexpr uint32_t pad64(uint32_t n) { return (n + 63) / 64 * 64; }

static constexpr uint32_t partial_size(uint32_t head_dim) { return kPartialValues + pad32(head_dim); }
static constexpr uint32_t attention_queries(uint32_t group) { return kRowBlock > group ? kRowBlock / group : 1; }
// kv heads that one piece of work may have: a part of theirs and the next one stay in the second-level cache.
constexpr uint32_t kMostHeads = 8, kMostDimensions = 256;
static constexpr uint32_t heads_together(uint32_t head_dim) {
  const uint32_t fit = kMostDimensions / head_dim;
  return fit > kMostHeads ? kMostHeads : fit > 1 ? fit : 1;
}
// Floats for any way to attend: keys and values of a part, twice; scores; weights of rows; queries and sums of each
// head's.
static constexpr uint32_t attention_scratch(uint32_t head_dim, uint32_t group) {
  const uint32_t rows = pad16(attention_queries(group) * group);
  return 4 * kPart * (pad32(head_dim) + 1) + 32 * kPart + 16 * partial_size(head_dim) + rows * (kPart / 2 + 4) +
         heads_together(head_dim) * rows * (pad32(head_dim) + partial_size(head_dim) + 1);
}

const IsaTable* portable_table(bool bfloat16_inputs);
const IsaTable* avx2_table(bool bfloat16_inputs);
const IsaTable* avx512bf16_table(bool bfloat16_inputs);
const IsaTable* amx_table(bool bfloat16_inputs);
