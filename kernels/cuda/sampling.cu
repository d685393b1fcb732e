// One token for each row of logits: argmax over the allowed v of z(v) + Gumbel(Philox(seed, (position, output index,
// v, 0))), where z is the logits after penalties, bias and suppression, over the temperature; top-k, top-p and min-p
// say what is allowed. Ties go to the lower id everywhere. The result does not depend on the other rows, nor on the
// order of threads and blocks: what is added up are integers.
//
// The blocks of a row share its vocabulary, RANGE tokens each; the last one to finish merges what they found, and does
// the filters alone. Passes over the logits (V tokens), by what a row asks for:
//   greedy                1   (+1 of its range for the log-probability, whatever else is asked)
//   temperature           2   best; noise, computed only where it may win
//   min-p                 2   the second by one block
//   top-k, top-p or both  3   best; histogram; list. All else goes over the list of at most LISTED tokens in shared
//   memory.
//                         6+  where more are kept, for each of top-k and top-p: best; histogram; interval; refinement,
//                         1
//                             or 2 (4 where most logits are equal); noise
//   penalties            +2   counts to zero; the changed logits, which the other passes read then
#include "sampling_noise.cuh"
#include "sampling_ranking.cuh"

#ifndef RANGE  // tokens of a block
#define RANGE 16384
#endif
#ifndef LOGIT
#define LOGIT float
#endif

constexpr u32 kWantLogprob = 1;  // Sampling.flags
constexpr u32 kSeen = 1u << 31;  // of a count: in the prompt

// Of one lane. `SAMPLING` in sampling.py.
struct Sampling {
  u64 seed;
  float temperature, top_p, min_p;
  u32 top_k;
  float repetition, presence, frequency;
  u32 output_index, prompt_length, min_tokens;
  u32 bias_first, bias_count, suppressed_first, suppressed_count;
  u32 flags, unused;

  DEVICE bool penalizes() const { return repetition != 1.0f || presence != 0.0f || frequency != 0.0f; }
  DEVICE bool cuts() const { return top_k != 0 || top_p < 1.0f || min_p > 0.0f; }
};

struct Sample {
  i32 lane, position, valid, unused;
};

// What one block found in its range.
struct Partial {
  u64 raw_weights;  // of the logits as given, against raw_most
  Rank best, noisy;
  float raw_most;
  u32 least;  // key of the smallest z that may be drawn
};

// Scratch of one row: ticket, zero between launches; partials; changed logits.
struct RowScratch {
  u32* ticket;
  Partial* partials;
  u32* changed;

  DEVICE RowScratch(u8* start, u32 ranges)
      : ticket(reinterpret_cast<u32*>(start)),
        partials(reinterpret_cast<Partial*>(start + 32)),
        changed(reinterpret_cast<u32*>(start + 32 + ranges * sizeof(Partial))) {}
};

struct SamplingRoom {  // shared memory
  RankingRoom ranking;
  u32 bound;  // key of the best noisy z so far
  bool last;
};

// No product is fused with the subtraction behind it: each operation rounds, as in the reference.
DEVICE float penalized(float z, const Sampling& p, u32 count) {
  if (count == 0) return z;
  if (p.repetition != 1.0f) z = z > 0 ? z / p.repetition : multiply_rn(z, p.repetition);
  const u32 in_output = count & ~kSeen;
  if (in_output) z -= p.presence + multiply_rn(p.frequency, static_cast<float>(in_output));
  return z;
}

// The logits of tokens [first, end) after penalties, bias and suppression, as bits.
DEVICE void change(const LOGIT* logits, const Sampling& p, const u32* bias_ids, const float* bias_values,
                   const u32* suppressed_ids, const u32* history, u32 position, u32 first, u32 end, u32* changed) {
  const u32 size = end - first;
  if (p.penalizes()) {
    for (u32 v = first + threadIdx.x; v < end; v += kThreads) changed[v] = 0;
    sync_block();
    for (u32 i = threadIdx.x; i < position; i += kThreads) {
      const u32 v = history[i];
      if (v - first >= size) continue;
      if (i < p.prompt_length) {
        atomic_or(&changed[v], kSeen);
      } else {
        atomic_add(&changed[v], 1u);
      }
    }
    sync_block();
  }
  for (u32 v = first + threadIdx.x; v < end; v += kThreads) {
    const float z = to_float(logits[v]);
    changed[v] = as_u32(p.penalizes() ? penalized(z, p, changed[v]) : z);
  }
  sync_block();
  for (u32 i = threadIdx.x; i < p.bias_count; i += kThreads) {
    const u32 v = bias_ids[p.bias_first + i];
    if (v - first < size) changed[v] = as_u32(as_float(changed[v]) + bias_values[p.bias_first + i]);
  }
  sync_block();
  if (position - p.prompt_length < p.min_tokens) {
    for (u32 i = threadIdx.x; i < p.suppressed_count; i += kThreads) {
      const u32 v = suppressed_ids[p.suppressed_first + i];
      if (v - first < size) changed[v] = kMinusInfinity;
    }
  }
  sync_block();
}

// The best noisy rank that one thread has met; all threads of the block share the bound below which nothing can win.
class Draw {
 public:
  // best: a rank that may be drawn. All threads call this.
  DEVICE Draw(const Noise& noise, Rank best, u32* bound) : noise_(noise), bound_(bound) {
    if (threadIdx.x == 0) *bound_ = key_of(rank_value(best) + gumbel(philox(noise_, rank_id(best))));
    sync_block();
  }

  DEVICE void consider(Rank rank) {
    const float z = rank_value(rank);
    const float gap = gap_to(z, of_key(*static_cast<volatile u32*>(bound_)));
    if (gap < kHopeless) return;
    const u32 word = philox(noise_, rank_id(rank));
    if (!may_reach(word, gap)) return;
    const Rank noisy = rank_of(z + gumbel(word), rank_id(rank));
    if (noisy <= best_) return;
    best_ = noisy;
    atomic_max(bound_, rank_key(noisy));
  }

  DEVICE Rank best() const { return best_; }

 private:
  Noise noise_;
  u32* bound_;
  Rank best_ = 0;
};

// By all threads of one block, to thread 0's use.
DEVICE Rank draw_filtered(const Tokens<LOGIT>& tokens, const Sampling& p, const Noise& noise, Rank top, float least,
                          SamplingRoom* room) {
  const float most = rank_value(top);
  Ranking<LOGIT> ranking(tokens, most, least, &room->ranking);
  if (p.top_k != 0 && p.top_k < tokens.vocab) ranking.keep_best(p.top_k);
  if (p.top_p < 1.0f) ranking.keep_part(p.top_p);
  Draw draw(noise, top, &room->bound);
  const double least_weight = p.min_p;
  for (u32 i = threadIdx.x; i < ranking.tokens().count(); i += kThreads) {
    const Rank rank = ranking.tokens().rank(i);
    if (rank < ranking.floor()) continue;
    if (least_weight > 0 && rank != top) {
      const double below = static_cast<double>(rank_value(rank)) - static_cast<double>(most);
      if (exp_accurate(below) < least_weight) continue;
    }
    draw.consider(rank);
  }
  return across_block<Most>(draw.best(), 0, room->ranking.reduced);
}

// The row's partials as one; without the weights, which `logprob_of` adds up.
DEVICE Partial merge(const Partial* partials, u32 ranges) {
  Partial all = partials[0];
  for (u32 i = 1; i < ranges; ++i) {
    all.best = Most::of(all.best, partials[i].best);
    all.noisy = Most::of(all.noisy, partials[i].noisy);
    all.raw_most = Most::of(all.raw_most, partials[i].raw_most);
    all.least = Least::of(all.least, partials[i].least);
  }
  return all;
}

// Under the logits as given; ranges are added up in their order.
DEVICE float logprob_of(float logit, const Partial* partials, u32 ranges, float most) {
  double weights = 0;
  for (u32 i = 0; i < ranges; ++i) {
    if (partials[i].raw_weights == 0) continue;
    const double scale = exp_accurate(static_cast<double>(partials[i].raw_most) - static_cast<double>(most));
    weights += static_cast<double>(partials[i].raw_weights) * scale;
  }
  const double sum = log_accurate(weights / kOneWeight);
  return static_cast<float>(static_cast<double>(logit) - static_cast<double>(most) - sum);
}

// grid: (ranges, rows). logits: [rows, row_stride] of LOGIT, the first vocab of each. samples: [rows]; a row that is
// not valid is left alone. parameters: [lanes]. bias, suppressed: of all lanes, ids of one lane distinct; those outside
// the vocabulary are ignored, as in the history. history: [lanes, history_stride]; the token goes to its position in
// it. scratch: [rows, scratch_stride] bytes, 32-byte aligned, the first four of each row zero before and after. Two
// valid rows have different lanes. vocab: at most 2^19.
KERNEL(sample, THREADS, 1)
(const LOGIT* logits, i64 row_stride, const Sample* samples, const Sampling* parameters, const u32* bias_ids,
 const float* bias_values, const u32* suppressed_ids, u32* history, i64 history_stride, u8* scratch, i64 scratch_stride,
 i32* tokens_out, float* logprobs_out, u32 vocab) {
  SHARED SamplingRoom room;
  const u32 row = blockIdx.y, ranges = gridDim.x;
  const Sample sample = samples[row];
  if (!sample.valid) return;
  const Sampling p = parameters[sample.lane];
  const u32 position = static_cast<u32>(sample.position);
  const Noise noise{p.seed, position, p.output_index};
  const RowScratch own(scratch + row * scratch_stride, ranges);
  const u32 first = blockIdx.x * RANGE, end = vocab - first < RANGE ? vocab : first + RANGE;
  logits += row * row_stride;
  history += sample.lane * history_stride;

  const bool suppresses = p.suppressed_count != 0 && position - p.prompt_length < p.min_tokens;
  const bool changes = p.penalizes() || p.bias_count != 0 || suppresses;
  const bool greedy = p.temperature == 0.0f, wants_logprob = p.flags & kWantLogprob;
  if (changes) {
    change(logits, p, bias_ids, bias_values, suppressed_ids, history, position, first, end, own.changed);
  }
  const Tokens<LOGIT> tokens{logits, changes ? own.changed : nullptr, greedy ? 1.0f : p.temperature, vocab, nullptr, 0};

  u32 raw_key = 0, least = ~0u;
  Rank best = 0;
#pragma unroll 4
  for (u32 v = first + threadIdx.x; v < end; v += kThreads) {
    const Rank rank = tokens.of_token(v);
    best = Most::of(best, rank);
    if (rank != 0) least = Least::of(least, rank_key(rank));
    if (wants_logprob) raw_key = Most::of(raw_key, key_of(to_float(logits[v])));
  }
  u64* const reduced = room.ranking.reduced;
  Partial part{0, across_block<Most>(best, 0, reduced), 0, 0, ~0u};
  if (p.cuts()) part.least = static_cast<u32>(across_block<Least>(least, ~0u, reduced));
  if (wants_logprob) {
    raw_key = static_cast<u32>(across_block<Most>(raw_key, 0, reduced));
    part.raw_most = raw_key == 0 ? as_float(kMinusInfinity) : of_key(raw_key);
    u64 weights = 0;
    for (u32 v = first + threadIdx.x; v < end; v += kThreads) {
      weights += fixed_weight(to_float(logits[v]), part.raw_most);
    }
    part.raw_weights = across_block<Sum>(weights, 0, reduced);
  }
  if (!greedy && !p.cuts() && part.best != 0) {
    Draw draw(noise, part.best, &room.bound);
    for (u32 v = first + threadIdx.x; v < end; v += kThreads) {
      const Rank rank = tokens.of_token(v);
      if (rank != 0) draw.consider(rank);
    }
    part.noisy = across_block<Most>(draw.best(), 0, reduced);
  }

  if (threadIdx.x == 0) own.partials[blockIdx.x] = part;
  fence();
  sync_block();
  if (threadIdx.x == 0) room.last = atomic_add(own.ticket, 1u) == ranges - 1;
  sync_block();
  if (!room.last) return;
  fence();
  const Partial all = merge(own.partials, ranges);

  // Noise tells no two infinities apart: the lowest id.
  Rank drawn = all.best;
  if (!greedy && all.best != 0 && rank_key(all.best) != kInfinityKey) {
    drawn = p.cuts() ? draw_filtered(tokens, p, noise, all.best, of_key(all.least), &room) : all.noisy;
  }
  if (threadIdx.x != 0) return;
  const u32 token = drawn == 0 ? 0 : rank_id(drawn);
  tokens_out[row] = static_cast<i32>(token);
  history[position] = token;
  logprobs_out[row] = wants_logprob ? logprob_of(to_float(logits[token]), own.partials, ranges, all.raw_most) : 0.0f;
  *own.ticket = 0;
}

// For tests of a device: words and noise [count] of the tokens from `first` on. grid: enough blocks of 256.
KERNEL(sampling_noise, 256, 1)(u64 seed, u32 position, u32 index, u32 first, u32 count, u32* words, float* values) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  words[i] = philox(Noise{seed, position, index}, first + i);
  values[i] = gumbel(words[i]);
}
