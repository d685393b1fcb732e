// The state of one model that steps, and its pieces: see engine.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "buffer.h"
#include "crew.h"
#include "isa.h"
#include "plan.h"
#include "sampling.h"
#include "threads.h"

static inline uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Of a step: see abi.h.
struct Results {
  uint32_t* tokens;
  float* logprobs;
  uint32_t* accepted;
  float* draft_logprobs;
};

// A position of a chunk after which a token is sampled.
struct Place {
  uint32_t chunk, index;
};

// One model with its memory and threads.
struct PhEngine {
  PhModel model;
  std::vector<PhLayer> layers, compact;  // compact: of the same values in fewer bytes, or empty
  PhPool pool{};
  const IsaTable* isa;
  ThreadPool threads;
  Crew crew;
  Buffer best, residual, normed, codes, factors, qkv, attended, product, logits, scratch, partials, expanded;
  std::vector<uint32_t> row_of;  // first activation row of each chunk
  AttentionPlan attention_plan;
  std::vector<Place> sampled;

  PhEngine(const PhModel* m, uint32_t thread_count, const IsaTable* table)
      : model(*m), layers(m->layer, m->layer + m->layers), isa(table), threads(thread_count), crew(thread_count) {
    model.layer = layers.data();
    if (m->compact_layer != nullptr) compact.assign(m->compact_layer, m->compact_layer + m->layers);
  }

  uint32_t attention_scratch_floats() const {
    return pad16(attention_scratch(model.head_dim, model.heads / model.kv_heads));
  }

  template <class F>
  void parallel(uint32_t pieces, F&& f) {
    auto* job = &f;
    threads.run(
        pieces, [](void* j, uint32_t piece, uint32_t thread) { (*static_cast<decltype(job)>(j))(piece, thread); }, job);
  }

  // Scratch of expanded_size() for the widest linear of the model.
  uint16_t* expanded_of(uint32_t thread) {
    const uint32_t widest = std::max({model.hidden, model.heads * model.head_dim, model.intermediate});
    const size_t size = expanded_size(ceil_div(widest, 2));
    return expanded.get<uint16_t>(size * threads.size()) + size * thread;
  }

  // What a linear multiplies by: so many panels, or pairs of them, side by side.
  struct Weights {
    const PhMatrix& matrix;
    uint32_t panels, together, inputs;

    const void* at(uint32_t panel) const {
      const uint32_t pairs = ceil_div(inputs, inputs_in_word(matrix.encoding));
      return static_cast<const uint8_t*>(matrix.panels) + panel * together * panel_size(matrix.encoding, pairs);
    }
  };
  // For so many rows.
  bool take_compact(uint32_t rows) const { return rows <= isa->few_rows && !compact.empty(); }
  const PhLayer& layer(uint32_t index, uint32_t rows) const { return (take_compact(rows) ? compact : layers)[index]; }
  Weights qkv_of(uint32_t index, uint32_t rows) const {
    const uint32_t outputs = (model.heads + 2 * model.kv_heads) * model.head_dim;
    return {layer(index, rows).qkv, ceil_div(outputs, kPanel), 1, model.hidden};
  }
  Weights attention_output_of(uint32_t index, uint32_t rows) const {
    const uint32_t inputs = model.heads * model.head_dim;
    return {layer(index, rows).attention_output, ceil_div(model.hidden, kPanel), 1, inputs};
  }
  Weights gate_up_of(uint32_t index, uint32_t rows) const {
    return {layer(index, rows).gate_up, ceil_div(model.intermediate, kPanel), 2, model.hidden};
  }
  Weights down_of(uint32_t index, uint32_t rows) const {
    return {layer(index, rows).down, ceil_div(model.hidden, kPanel), 1, model.intermediate};
  }
  Weights head(uint32_t rows) const {
    const PhMatrix& matrix = take_compact(rows) ? model.compact_head : model.output_head;
    return {matrix, ceil_div(model.vocab, kPanel), 1, model.hidden};
  }

  // Panels of a piece: about four pieces for each thread, as many for one as for the other, and never less than what
  // one claim is worth.
  uint32_t piece_of(uint32_t panels, uint32_t rows) const {
    if (panels > 1000) return 16;  // the output head: many even pieces
    if (threads.used() == 1) return panels;
    const auto most_of_one = [&](uint32_t size) { return ceil_div(ceil_div(panels, size), threads.used()) * size; };
    const uint32_t least = rows <= 2 ? 2 : 1, size = std::max(ceil_div(panels, threads.used() * 4), least);
    return size > least && most_of_one(size - 1) < most_of_one(size) ? size - 1 : size;
  }

  // f(first panel, last, what the thread takes next, thread): a linear's panels in pieces. following: what comes after
  // it.
  template <class F>
  void over_pieces(const Weights& weights, uint32_t rows, const Weights& following, F&& f) {
    const uint32_t panels = weights.panels, size = piece_of(panels, rows);
    expanded_of(0);  // it grows here, before threads have it
    parallel(ceil_div(panels, size), [&](uint32_t piece, uint32_t thread) {
      const uint32_t first = piece * size;
      // Threads take pieces in turns, more or less.
      const uint32_t next = (piece + threads.used()) * size;
      f(first, std::min(first + size, panels),
        next < panels ? weights.at(next) : following.at(thread * piece_of(following.panels, rows) % following.panels),
        thread);
    });
  }
  void over_panels(const Weights& weights, const Linear& job, const Weights& following,
                   void (*linear)(const Linear*, uint32_t, uint32_t, uint16_t*)) {
    over_pieces(weights, job.rows, following, [&](uint32_t first, uint32_t last, const void* next, uint32_t thread) {
      Linear mine = job;
      mine.following = next;
      linear(&mine, first, last, expanded_of(thread));
    });
  }

  void embed(const PhChunk* chunks, uint32_t count, float* x, uint32_t stride);
  template <class F>
  void over_rows(uint32_t rows, F&& f);
  Inputs inputs_of(const void* from, uint32_t n, uint32_t rows, const PhMatrix& matrix);
  void round_row(const void* from, uint32_t n, uint32_t row, uint32_t encoding, uint32_t width, uint32_t thread);
  Inputs rounded(const void* from, uint32_t n, uint32_t rows, const PhMatrix& matrix, uint32_t width);
  Inputs norm_rows(const float* x, const float* weight, uint32_t rows, const PhMatrix& matrix);
  void start_layer(uint32_t index, uint32_t rows, const float* x);
  void end_layer(uint32_t index, uint32_t rows, float* x);
  uint32_t keep_sampled(float* x);
  void take_largest(const Inputs& inputs, uint32_t rows, Sampled* found);
  void attention(uint32_t index);
  uint32_t plan(const PhChunk* chunks, uint32_t count);
  void attend(uint32_t index, const PhChunk* chunks, uint32_t count, const float* from, float* to);
  int step(const PhChunk* chunks, uint32_t count, const Results& results, float* all_logits);
  int watched_step(const PhChunk* chunks, uint32_t count, const Results& results, float* all_logits);
};
