// One C call runs a whole step: embedding, layers, output head, sampling.
//
// A layer is five joins: qkv, (append and) attention, attention output, gate/up, down. Pieces are
// smaller than a thread's share, so that a thread that loses its processor delays one piece.

#include "engine.h"

#include <math.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace {

// How many values of `down`'s inputs are rotated together: see integers.py.
uint32_t rotation(uint32_t n) {
  uint32_t width = 1;
  while (width < kMostRotated && n % (width * 2 * kRotated) == 0) width *= 2;
  return width;
}

// Rows that norm_rows() fetches ahead: the other threads wrote parts of them, so that they lie in other caches.
constexpr uint32_t kRowsAhead = 2;

void fetch(const void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i);
}

// A draft is right where it is what was sampled after the right ones before it. found: by sampled position of the
// chunk.
void accept(const PhChunk& chunk, const Sampled* found, uint32_t c, uint32_t drafts, const Results& results) {
  const uint32_t* draft = chunk.tokens + chunk.start + chunk.count - chunk.sample + 1;
  uint32_t right = 0;
  for (; right + 1 < chunk.sample && found[right].token == draft[right]; ++right)
    results.draft_logprobs[drafts + right] = found[right].logprob;
  results.tokens[c] = found[right].token;
  results.logprobs[c] = found[right].logprob;
  if (results.accepted != nullptr) results.accepted[c] = right;
}

}  // namespace

void PhEngine::embed(const PhChunk* chunks, uint32_t count, float* x, uint32_t stride) {
  const uint32_t hidden = model.hidden;
  for (uint32_t c = 0; c < count; ++c) {
    for (uint32_t i = 0; i < chunks[c].count; ++i) {
      const uint32_t token = chunks[c].tokens[chunks[c].start + i];
      float* out = x + size_t{row_of[c] + i} * stride;
      if (model.embedding == nullptr) {
        read_row(model.output_head, hidden, token, out);
        continue;
      }
      for (uint32_t k = 0; k < hidden; ++k) out[k] = bfloat16_to_float(model.embedding[size_t{token} * hidden + k]);
    }
  }
}

// f(row, thread).
template <class F>
void PhEngine::over_rows(uint32_t rows, F&& f) {
  const uint32_t size = rows <= 4 ? rows : ceil_div(rows, threads.used() * 4);
  parallel(ceil_div(rows, size), [&](uint32_t piece, uint32_t thread) {
    for (uint32_t row = piece * size; row < rows && row < (piece + 1) * size; ++row) f(row, thread);
  });
}

// --- what linears take ---

// The rows [n] of `from`, in the type that linears take, for `matrix`: as they are, or where round_row() puts them.
Inputs PhEngine::inputs_of(const void* from, uint32_t n, uint32_t rows, const PhMatrix& matrix) {
  if (!takes_codes(matrix.encoding)) return {from, pad32(n), ceil_div(n, 2), nullptr};
  expanded_of(0);  // what round_row() needs grows here, before threads have it
  const size_t of_row = is_integer_blocks(matrix.encoding) ? 2 * ceil_div(n, kBlock) : 1;
  return {codes.get<int8_t>(size_t{rows} * pad64(n)), pad64(n) / 2, ceil_div(n, 4), factors.get<float>(rows * of_row)};
}

void PhEngine::round_row(const void* from, uint32_t n, uint32_t row, uint32_t encoding, uint32_t width,
                         uint32_t thread) {
  const uint8_t* values = static_cast<const uint8_t*>(from) + size_t{row} * pad32(n) * isa->input_size;
  int8_t* to = codes.get<int8_t>(0) + size_t{row} * pad64(n);
  float* scales = factors.get<float>(0);
  if (is_integer_blocks(encoding))
    return isa->round_blocks(values, n, pad64(n), to, scales + size_t{row} * 2 * ceil_div(n, kBlock));
  float* memory = reinterpret_cast<float*>(expanded_of(thread));
  scales[row] = isa->round_row(values, n, width, pad64(n), memory, to);
}

Inputs PhEngine::rounded(const void* from, uint32_t n, uint32_t rows, const PhMatrix& matrix, uint32_t width) {
  const Inputs inputs = inputs_of(from, n, rows, matrix);
  if (inputs.factors != nullptr)
    over_rows(rows, [&](uint32_t row, uint32_t thread) { round_row(from, n, row, matrix.encoding, width, thread); });
  return inputs;
}

Inputs PhEngine::norm_rows(const float* x, const float* weight, uint32_t rows, const PhMatrix& matrix) {
  const uint32_t stride = pad32(model.hidden);
  const size_t bytes = size_t{stride} * isa->input_size;
  uint8_t* out = normed.get<uint8_t>(rows * bytes);
  const Inputs inputs = inputs_of(out, model.hidden, rows, matrix);
  over_rows(rows, [&](uint32_t row, uint32_t thread) {
    fetch(x + size_t{std::min(row + kRowsAhead, rows - 1)} * stride, stride * sizeof(float));
    isa->norm(x + size_t{row} * stride, weight, model.hidden, stride, model.rms_norm_eps, out + row * bytes);
    if (inputs.factors != nullptr) round_row(out, model.hidden, row, matrix.encoding, 1, thread);
  });
  return inputs;
}

void PhEngine::attention(uint32_t index) {
  const auto& pieces = attention_plan.pieces();
  const auto& blocks = attention_plan.blocks();
  const auto& merges = attention_plan.merges();
  const auto count = static_cast<uint32_t>(pieces.size());
  // The heads of a page lie side by side: one thread takes them together where there are pieces enough.
  const uint32_t most = count >= 2 * threads.used() ? heads_together(model.head_dim) : 1;
  const uint32_t cuts = ceil_div(model.kv_heads, most), scratch_size = attention_scratch_floats();
  float* memory = scratch.get<float>(0);
  const auto job_of = [&](const std::vector<Piece>& from, uint32_t i) {
    const Piece& piece = from[i / cuts];
    const uint32_t head = model.kv_heads * (i % cuts) / cuts, end = model.kv_heads * (i % cuts + 1) / cuts;
    return Attention{&model,      &pool,      piece.row,     attention_plan.queries() + piece.query,
                     piece.count, index,      head,          end - head,
                     piece.first, piece.last, piece.leading, nullptr};
  };
  if (!attention_plan.appends_alone())
    parallel(static_cast<uint32_t>(blocks.size()) * cuts, [&](uint32_t i, uint32_t) {
      const Attention job = job_of(blocks, i);
      isa->append(&job);
    });
  parallel(count * cuts, [&](uint32_t i, uint32_t thread) {
    Attention job = job_of(pieces, i);
    // Threads take pieces in turns, more or less.
    const uint32_t after = std::min(i + threads.used(), count * cuts - 1);
    const Attention following = job_of(pieces, after);
    if (after > i) job.following = &following;
    if (attention_plan.appends_alone()) isa->append(&job);
    isa->attend(&job, memory + size_t{thread} * scratch_size);
  });
  parallel(static_cast<uint32_t>(merges.size()), [&](uint32_t i, uint32_t thread) {
    const Merge& merge = merges[i];
    isa->merge(&model, attention_plan.queries() + merge.query, merge.partials, merge.slots,
               memory + size_t{thread} * scratch_size);
  });
}

void PhEngine::start_layer(uint32_t index, uint32_t rows, const float* x) {
  const PhLayer& w = layer(index, rows);
  const uint32_t qkv_outputs = (model.heads + 2 * model.kv_heads) * model.head_dim;

  const Linear qkv_job{norm_rows(x, w.attention_norm, rows, w.qkv),
                       rows,
                       w.qkv,
                       qkv.get<float>(0),
                       nullptr,
                       pad32(qkv_outputs),
                       w.qkv_bias,
                       qkv_outputs,
                       nullptr};
  over_panels(qkv_of(index, rows), qkv_job, attention_output_of(index, rows), isa->linear);

  attention(index);
}

void PhEngine::end_layer(uint32_t index, uint32_t rows, float* x) {
  const PhLayer& w = layer(index, rows);
  const uint32_t stride = pad32(model.hidden), inner = pad32(model.intermediate);
  const Inputs heads = rounded(attended.get<uint8_t>(0), model.heads * model.head_dim, rows, w.attention_output, 1);
  over_panels(attention_output_of(index, rows),
              {heads, rows, w.attention_output, x, nullptr, stride, nullptr, 0, nullptr}, gate_up_of(index, rows),
              isa->linear_add);

  uint8_t* middle = product.get<uint8_t>(0);
  const Inputs normed_rows = norm_rows(x, w.mlp_norm, rows, w.gate_up);
  over_panels(gate_up_of(index, rows), {normed_rows, rows, w.gate_up, nullptr, middle, inner, nullptr, 0, nullptr},
              down_of(index, rows), isa->linear_gate_up);

  const Inputs products = rounded(middle, model.intermediate, rows, w.down, rotation(model.intermediate));
  over_panels(down_of(index, rows), {products, rows, w.down, x, nullptr, stride, nullptr, 0, nullptr},
              index + 1 < model.layers ? qkv_of(index + 1, rows) : head(rows), isa->linear_add);
}

uint32_t PhEngine::plan(const PhChunk* chunks, uint32_t count) {
  uint32_t rows = 0;
  row_of.clear();
  sampled.clear();
  for (uint32_t c = 0; c < count; ++c) {
    row_of.push_back(rows);
    rows += chunks[c].count;
    for (uint32_t i = chunks[c].count - chunks[c].sample; i < chunks[c].count; ++i) sampled.push_back({c, i});
  }
  const uint32_t inputs = pad32((model.heads + 2 * model.kv_heads) * model.head_dim);
  const size_t outputs = size_t{pad32(model.heads * model.head_dim)} * isa->input_size;
  float* projected = qkv.get<float>(size_t{rows} * inputs);
  uint8_t* out = attended.get<uint8_t>(rows * outputs);
  attention_plan.make({&model, chunks, count, pool.page_size, threads.used(), projected, inputs, out, outputs});
  attention_plan.place(partials.get<float>(attention_plan.partial_floats()));
  scratch.get<float>(size_t{attention_scratch_floats()} * threads.size());
  return rows;
}

// The rows of x and of what they attended to, but for those that are not sampled after. Returns how many are left.
uint32_t PhEngine::keep_sampled(float* x) {
  const size_t stride = size_t{pad32(model.hidden)}, bytes = pad32(model.heads * model.head_dim) * isa->input_size;
  uint8_t* heads = attended.get<uint8_t>(0);
  for (uint32_t i = 0; i < sampled.size(); ++i) {  // in order: a row never moves behind one that is still to be moved
    const uint32_t row = row_of[sampled[i].chunk] + sampled[i].index;
    memmove(x + i * stride, x + row * stride, stride * sizeof(float));
    memmove(heads + i * bytes, heads + row * bytes, bytes);
  }
  return static_cast<uint32_t>(sampled.size());
}

// The tokens of rows' largest logits: those of a piece are looked at while they are in the cache, and then forgotten.
void PhEngine::take_largest(const Inputs& inputs, uint32_t rows, Sampled* found) {
  struct Best {
    float value;
    uint32_t token;
  };
  const Weights weights = head(rows);
  const uint32_t width = piece_of(weights.panels, rows) * kPanel;
  float* memory = logits.get<float>(size_t{threads.size()} * rows * width);
  Best* bests = best.get<Best>(size_t{threads.size()} * rows);
  std::fill(bests, bests + size_t{threads.size()} * rows, Best{-INFINITY, 0});
  over_pieces(weights, rows, qkv_of(0, rows), [&](uint32_t first, uint32_t last, const void* next, uint32_t thread) {
    float* out = memory + size_t{thread} * rows * width;
    const PhMatrix piece{weights.at(first), weights.matrix.encoding, 0};
    const Linear job{inputs, rows, piece, out, nullptr, width, nullptr, 0, next};
    isa->linear(&job, 0, last - first, expanded_of(thread));
    const uint32_t begin = first * kPanel, count = std::min(last * kPanel, model.vocab) - begin;
    for (uint32_t row = 0; row < rows; ++row, out += width) {
      Best& so_far = bests[size_t{thread} * rows + row];
      const float largest = isa->largest(out, count);
      if (largest > so_far.value)
        so_far = {largest, begin + static_cast<uint32_t>(std::find(out, out + count, largest) - out)};
    }
  });
  for (uint32_t row = 0; row < rows; ++row) {
    Best whole = bests[row];
    for (uint32_t thread = 1; thread < threads.size(); ++thread) {
      const Best& other = bests[size_t{thread} * rows + row];
      if (other.value > whole.value || (other.value == whole.value && other.token < whole.token)) whole = other;
    }
    found[row] = {whole.token, 0.0f};
  }
}

int PhEngine::step(const PhChunk* chunks, uint32_t count, const Results& results, float* all_logits) {
  const uint32_t stride = pad32(model.hidden), vocab_stride = pad32(model.vocab);
  const uint32_t rows = plan(chunks, count);
  float* x = residual.get<float>(size_t{rows} * stride);
  product.get<uint8_t>(size_t{rows} * pad32(model.intermediate) * isa->input_size);

  embed(chunks, count, x, stride);
  for (uint32_t index = 0; index < model.layers; ++index) {
    start_layer(index, rows, x);
    if (index + 1 < model.layers) end_layer(index, rows, x);
  }

  // Of the others nothing but their keys and values is used: they end here.
  const uint32_t wanted = all_logits != nullptr ? rows : keep_sampled(x);
  for (uint32_t c = 0; c < count; ++c) {
    results.tokens[c] = 0;
    results.logprobs[c] = 0;
    if (results.accepted != nullptr) results.accepted[c] = 0;
  }
  if (wanted == 0) return 0;
  end_layer(model.layers - 1, wanted, x);
  const Weights last = head(wanted);
  const Inputs inputs = norm_rows(x, model.final_norm, wanted, last.matrix);
  const auto known = [&](const Place& place) { return chunks[place.chunk].start + place.index + 1; };
  std::vector<Sampled> found(wanted);
  if (all_logits == nullptr && std::all_of(sampled.begin(), sampled.end(), [&](const Place& place) {
        return takes_largest(*chunks[place.chunk].sampling, known(place));
      })) {
    take_largest(inputs, wanted, found.data());
  } else {
    float* out = logits.get<float>(size_t{wanted} * vocab_stride);
    over_panels(last, {inputs, wanted, last.matrix, out, nullptr, vocab_stride, nullptr, model.vocab, nullptr},
                qkv_of(0, wanted), isa->linear);
    if (all_logits != nullptr) {
      for (uint32_t i = 0; i < wanted; ++i)
        memcpy(all_logits + size_t{i} * model.vocab, out + size_t{i} * vocab_stride, size_t{model.vocab} * 4);
      return 0;
    }
    parallel(wanted, [&](uint32_t i, uint32_t) {
      const PhChunk& chunk = chunks[sampled[i].chunk];
      found[i] =
          sample(*isa, out + size_t{i} * vocab_stride, model.vocab, *chunk.sampling, chunk.tokens, known(sampled[i]));
    });
  }
  for (uint32_t first = 0, drafts = 0; first < wanted;) {
    const uint32_t c = sampled[first].chunk, behind = chunks[c].sample - 1;
    accept(chunks[c], found.data() + first, c, drafts, results);
    first += behind + 1;
    drafts += behind;
  }
  return 0;
}

double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

// A step, and what it says about how many threads the next one should use.
int PhEngine::watched_step(const PhChunk* chunks, uint32_t count, const Results& results, float* all_logits) {
  const double begun = seconds_now();
  const uint64_t ticks = __builtin_ia32_rdtsc();
  threads.take_waited();
  const int result = step(chunks, count, results, all_logits);
  const double now = seconds_now(), passed = static_cast<double>(__builtin_ia32_rdtsc() - ticks);
  uint32_t rows = 0;
  for (uint32_t c = 0; c < count; ++c) rows += chunks[c].count;
  crew.learn(rows, now - begun, (now - begun) * static_cast<double>(threads.take_waited()) / passed, now);
  if (crew.size() != threads.used()) threads.use(crew.size());
  return result;
}

void PhEngine::attend(uint32_t index, const PhChunk* chunks, uint32_t count, const float* from, float* to) {
  const uint32_t rows = plan(chunks, count), outputs = model.heads * model.head_dim;
  const uint32_t inputs = outputs + 2 * model.kv_heads * model.head_dim;
  for (uint32_t r = 0; r < rows; ++r)
    memcpy(qkv.get<float>(0) + size_t{r} * pad32(inputs), from + size_t{r} * inputs, size_t{inputs} * 4);
  attention(index);
  for (uint32_t r = 0; r < rows; ++r) {
    for (uint32_t i = 0; i < outputs; ++i) {
      const size_t at = size_t{r} * pad32(outputs) + i;
      to[size_t{r} * outputs + i] =
          isa->input_size == 2 ? bfloat16_to_float(attended.get<uint16_t>(0)[at]) : attended.get<float>(0)[at];
    }
  }
}
