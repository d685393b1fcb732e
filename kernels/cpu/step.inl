// One instruction set's table of the pieces of a step, written once over vectors of W floats.
//
// The includer defines W, TABLE, NAME; BFLOAT16_DOT where the machine multiplies bfloat16; TILES where it has tiles.

#include <utility>

#include "isa.h"
#include "vectors.inl"
//
#include "codes.inl"
//
#include "panels.inl"
//
#include "integers.inl"
//
#ifdef BFLOAT16_DOT
#include "coarse.inl"
#endif
//
#include "integer_blocks.inl"
//
#include "linear.inl"
//
#ifdef TILES
#include "linear_tiles.inl"
#endif
//
#include "pages.inl"
//
#include "append.inl"
//
#include "parts.inl"
//
#include "attention.inl"
#ifdef TILES
#include "product_tiles.inl"
#elif defined(BFLOAT16_DOT)
#include "product_dots.inl"
#endif
//
#ifdef BFLOAT16_DOT
#include "attention_bfloat16.inl"
//
#include "attention_digits.inl"
#endif
//
#include "vocabulary.inl"

namespace {

template <class Input>
void attend_to_parts(const Attention* job, Heads* heads, float* memory) {
  const uint32_t type = job->model->kv_type;
#ifdef BFLOAT16_DOT
  if constexpr (sizeof(typename Input::type) == 2) {
    if (type == kPhKvInt8) return attend_in_digits(job, heads, memory);
    if (type == kPhKvBfloat16) return attend_in_bfloat16(job, heads, memory);
  }
#endif
  if (type == kPhKvInt8) return attend_in_float<int8_t>(job, heads, memory);
  if (type == kPhKvBfloat16) return attend_in_float<uint16_t>(job, heads, memory);
  attend_in_float<float>(job, heads, memory);
}

template <class Input>
void attend(const Attention* job, float* memory) {
  Heads heads(job, memory);
  attend_to_parts<Input>(job, &heads, heads.end());
  for (uint32_t i = 0; i < heads.count; ++i)
    heads.rows[i].over([&](uint32_t row, const Query& query, uint32_t head) {
      if (query.partials == nullptr) finish<Input>(job->model, query, head, heads.rows[i].at(row));
    });
}

inline void rest() {
#ifdef TILES
  drop_tiles();
#endif
}

template <class Input>
constexpr IsaTable make_table(const char* name) {
  return {name,
          sizeof(typename Input::type),
          0,
          linear<Input, Then::kStore>,
          linear<Input, Then::kAdd>,
          linear_gate_up<Input>,
          norm<Input>,
          round_row<typename Input::type>,
          round_blocks<typename Input::type>,
          append,
          attend<Input>,
          rest,
          merge<Input>,
          largest_of,
          at_least,
          weight_of,
          contenders};
}

constexpr IsaTable kFloatTable = make_table<FloatInput>(NAME);
#ifdef BFLOAT16_DOT
constexpr IsaTable make_bf16_table() {
  IsaTable table = make_table<Bf16Input>(NAME);
#ifndef TILES
  table.few_rows = kFewRows;
#else
  table.linear = linear_tiles<Then::kStore>;
  table.linear_add = linear_tiles<Then::kAdd>;
  table.linear_gate_up = gate_up_tiles;
#endif
  return table;
}
constexpr IsaTable kBf16Table = make_bf16_table();
#endif

}  // namespace

const IsaTable* TABLE(bool bfloat16_inputs) {
#ifdef BFLOAT16_DOT
  if (bfloat16_inputs) return &kBf16Table;
#endif
  (void)bfloat16_inputs;
  return &kFloatTable;
}
