// The C interface of the native kernels: plain structs, checked on load by version and size.
#pragma once
#include <stdint.h>

#define PAGEHOLD_ABI_VERSION 9u

#define PAGEHOLD_API __attribute__((visibility("default")))

extern "C" {

// How the weights of a linear lie in memory. kPhBfloat16 (packing.py), kPhInt8 and kPhInt4 (blocks.py) are multiplied
// as bfloat16; kPhIntegers (integers.py) by inputs that are rounded to 8 bits, those of `down` rotated before; blocks
// of integers (integer_blocks.py) by inputs that are rounded to 8 bits, 32 at a time.
enum PhEncoding : uint32_t {
  kPhBfloat16 = 0,
  kPhInt8 = 1,
  kPhInt4 = 2,
  kPhIntegers = 3,
  kPhIntegerBlocks8 = 4,
  kPhIntegerBlocks4 = 5,
};

// What pages hold, in the order of pages.inl; int8 with a float for each slot, its scale.
enum PhKvType : uint32_t { kPhKvFloat32 = 0, kPhKvBfloat16 = 1, kPhKvInt8 = 2 };

struct PhMatrix {
  const void* panels;
  uint32_t encoding, unused;
};

struct PhLayer {
  const float* attention_norm;  // [hidden]
  PhMatrix qkv;                 // rows q | k | v
  const float* qkv_bias;        // [(heads + 2 kv_heads) head_dim] or null
  const float* q_norm;          // [head_dim] or null
  const float* k_norm;          // [head_dim] or null
  PhMatrix attention_output;
  const float* mlp_norm;  // [hidden]
  PhMatrix gate_up;       // panels of gate and up alternate
  PhMatrix down;
};

struct PhModel {
  uint32_t abi_version, model_size, chunk_size, sampling_size;  // bytes of these structs; all must fit
  uint32_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, max_positions;
  uint32_t sliding_window;  // positions that a query sees, itself included; 0: all
  float rms_norm_eps, logit_softcap;
  uint32_t kv_type;          // PhKvType of the pages
  uint32_t bfloat16_inputs;  // round the inputs of linears where the instruction set multiplies bfloat16
  const float* rope_cos;     // [max_positions, head_dim / 2]
  const float* rope_sin;
  const uint16_t* embedding;  // row-major [vocab, hidden]; null: the rows of output_head
  PhMatrix output_head;
  const float* final_norm;
  const PhLayer* layer;  // [layers]
  // The same with matrices of the same values in fewer bytes, for steps of few rows; null: there are none.
  PhMatrix compact_head;
  const PhLayer* compact_layer;  // [layers]
};

struct PhSampling {
  uint64_t seed;
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  uint32_t top_k, output_index, prompt_length, min_tokens, want_logprob;
  uint32_t biases, suppressed;
  const uint32_t* bias_ids;        // [biases]
  const float* bias_values;        // [biases]
  const uint32_t* suppressed_ids;  // [suppressed]; not sampled while the output is shorter than min_tokens
};

// Positions [start, start + count) of one sequence.
struct PhChunk {
  uint32_t* tokens;     // [.. start + count), by position
  const uint64_t* row;  // block table: page id in the low half of each entry
  const PhSampling* sampling;
  uint32_t start, count, write_from;
  uint32_t sample;  // after how many of the last positions a token is sampled; all but the first of them hold drafts
};

struct PhPool {
  uint8_t* base;  // [pages][layer][k, v][kv_head] planes of page_size slots: pages.inl
  uint64_t pages;
  uint32_t page_size;
};

struct PhEngine;

// isa: "portable", "avx2", "avx512bf16", "amx", or null for the best. On failure returns null and sets *error.
PAGEHOLD_API PhEngine* pagehold_create(const PhModel* model, uint32_t threads, const char* isa, const char** error);
PAGEHOLD_API void pagehold_destroy(PhEngine* engine);
PAGEHOLD_API void pagehold_map_pool(PhEngine* engine, const PhPool* pool);
// Space-separated names of the instruction sets that this machine can run.
PAGEHOLD_API const char* pagehold_isas(void);
PAGEHOLD_API const char* pagehold_isa(const PhEngine* engine);
// Computes all chunks. tokens, logprobs: [chunks]; 0 where nothing is sampled. accepted: [chunks], how many drafts were
// what is sampled in their place; `tokens` holds what is sampled after those. draft_logprobs: [drafts of all chunks],
// of the accepted ones. Both may be null where no chunk has drafts. all_logits: null, or [positions of all chunks,
// vocab]. Returns 0, or 1 when memory ran out.
PAGEHOLD_API int pagehold_step(PhEngine* engine, const PhChunk* chunks, uint32_t count, uint32_t* tokens,
                               float* logprobs, uint32_t* accepted, float* draft_logprobs, float* all_logits);
// Puts drafts behind chunks that sample one token: into their tokens, with `count` and `sample` raised. drafts:
// [chunks], how many a chunk may get, and then how many it has got; room: how many all of them may get. Returns as
// pagehold_step does.
PAGEHOLD_API int pagehold_draft(PhChunk* chunks, uint32_t count, uint32_t* drafts, uint32_t room);

// For tests. What a step does between the qkv and the output projection of one layer. qkv: float [positions of all
// chunks, (heads + 2 kv_heads) head_dim], before rotary. output: float [positions, heads head_dim].
PAGEHOLD_API int pagehold_attend(PhEngine* engine, uint32_t layer, const PhChunk* chunks, uint32_t count,
                                 const float* qkv, float* output);
// For tests. The token at position `known`; logits: [vocab], changed. Returns as pagehold_step does.
PAGEHOLD_API int pagehold_sample(PhEngine* engine, float* logits, const PhSampling* sampling, const uint32_t* tokens,
                                 uint32_t known, uint32_t* token, float* logprob);
}
