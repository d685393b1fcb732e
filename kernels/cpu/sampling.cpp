#include "sampling.h"

#include <math.h>
#include <stddef.h>

#include <algorithm>
#include <limits>
#include <unordered_map>
#include <vector>

// token = argmax over the allowed v of z(v) + Gumbel(Philox(seed, (position, output index, v, 0))), where z is
// the logits after penalties, bias and mask, over the temperature, and top-k, top-p and min-p say what is allowed.
// Ties go to the lower id everywhere.
//
// Neither the noise nor the order of a whole vocabulary is ever made: a cheap bound on the noise leaves
// about one token in ten thousand to compute exactly, and candidates are ranked in batches, best first. Over computing
// and sorting all: 6 times as fast at temperature 1, 25 with top-p, 5 with top-k (`python -m tests.kernels.bench`).

namespace {

// Philox4x32-10 (Salmon et al., SC 2011): the first word.
uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{kPhiloxMultiplier0} * c0, b = uint64_t{kPhiloxMultiplier1} * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return c0;
}

float gumbel(const Noise& noise, uint32_t token) {
  const uint32_t word = philox(noise.seed, noise.position, noise.index, token, 0);
  const double u = ((word >> 8) + 0.5) * (1.0 / 16777216.0);
  return static_cast<float>(-log(-log(u)));
}

struct Candidate {
  float z;
  uint32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

// The lowest id of the largest; 0 where none is above -inf.
uint32_t argmax(const IsaTable& isa, const float* x, uint32_t n) {
  const float most = isa.largest(x, n);
  const float* found = std::find(x, x + n, most);
  return found == x + n ? 0 : static_cast<uint32_t>(found - x);
}

// The candidates above -inf, best first; sorted only as far as they are asked for.
class Ranking {
 public:
  Ranking(const IsaTable& isa, const float* z, uint32_t vocab, float most)
      : isa_(isa), z_(z), ids_(vocab), most_(most) {}

  // Null after the last.
  const Candidate* at(size_t rank) {
    while (rank >= sorted_) {
      if (sorted_ < found_.size()) {
        sort_more();
      } else if (reach_ < INFINITY) {
        find_more();
      } else {
        return nullptr;
      }
    }
    return &found_[rank];
  }

 private:
  // What lies within a larger distance of the best: a prefix of the whole order, not sorted yet.
  void find_more() {
    reach_ = reach_ == 0 ? 4 : reach_ < 64 ? reach_ * 2 : INFINITY;
    const float least = std::max(most_ - reach_, std::numeric_limits<float>::lowest());
    const uint32_t count = isa_.at_least(z_, static_cast<uint32_t>(ids_.size()), least, ids_.data());
    found_.clear();
    sorted_ = 0;
    for (uint32_t i = 0; i < count; ++i) found_.push_back({z_[ids_[i]], ids_[i]});
  }

  // The next best, as many as there are or 128.
  void sort_more() {
    const auto first = found_.begin() + static_cast<ptrdiff_t>(sorted_);
    sorted_ = std::min(found_.size(), std::max<size_t>(2 * sorted_, 128));
    const auto last = found_.begin() + static_cast<ptrdiff_t>(sorted_);
    if (last != found_.end()) std::nth_element(first, last, found_.end(), better);
    std::sort(first, last, better);
  }

  const IsaTable& isa_;
  const float* z_;
  std::vector<uint32_t> ids_;
  std::vector<Candidate> found_;
  size_t sorted_ = 0;
  float most_, reach_ = 0;
};

void penalize(float* logits, uint32_t vocab, const PhSampling& p, const uint32_t* tokens, uint32_t known) {
  if (p.repetition_penalty != 1.0f) {
    std::vector<bool> seen(vocab);
    for (uint32_t i = 0; i < known; ++i) {
      const uint32_t v = tokens[i];
      if (v >= vocab || seen[v]) continue;
      seen[v] = true;
      logits[v] = logits[v] > 0 ? logits[v] / p.repetition_penalty : logits[v] * p.repetition_penalty;
    }
  }
  if (p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f) {
    std::unordered_map<uint32_t, uint32_t> counts;
    for (uint32_t i = p.prompt_length; i < known; ++i) ++counts[tokens[i]];
    for (const auto& [v, count] : counts) {
      if (v < vocab) logits[v] -= p.presence_penalty + p.frequency_penalty * static_cast<float>(count);
    }
  }
  for (uint32_t i = 0; i < p.biases; ++i)
    if (p.bias_ids[i] < vocab) logits[p.bias_ids[i]] += p.bias_values[i];
  if (known - p.prompt_length < p.min_tokens)
    for (uint32_t i = 0; i < p.suppressed; ++i)
      if (p.suppressed_ids[i] < vocab) logits[p.suppressed_ids[i]] = -INFINITY;
}

// How many of the best candidates top-k, top-p and min-p leave: each cuts the order somewhere, but never before the
// first.
size_t allowed(const IsaTable& isa, const float* z, uint32_t vocab, float most, const PhSampling& p, Ranking* ranking) {
  const size_t limit = p.top_k != 0 ? p.top_k : vocab;
  double enough = INFINITY;
  if (p.top_p < 1.0f) {
    double total = 0;
    if (p.top_k != 0 && p.top_k < vocab) {
      for (size_t rank = 0; rank < limit; ++rank) {
        const Candidate* c = ranking->at(rank);
        if (c == nullptr) break;
        total += exp(double{c->z} - double{most});
      }
    } else {
      total = isa.weight(z, vocab, most);
    }
    enough = double{p.top_p} * total;
  }
  // A token stays while those before it hold less than top_p, and while its own weight is at least min_p.
  double before = 0;
  size_t kept = 0;
  for (; kept < limit; ++kept) {
    const Candidate* c = ranking->at(kept);
    if (c == nullptr) break;
    const double weight = exp(double{c->z} - double{most});
    if (kept > 0 && (before >= enough || weight < double{p.min_p})) break;
    before += weight;
  }
  return kept;
}

// The best noisy candidate so far; a tie goes to the lower id.
struct Best {
  float value;
  uint32_t id;

  void consider(const Noise& noise, float z, uint32_t v) {
    const float noisy = z + gumbel(noise, v);
    if (noisy > value || (noisy == value && v < id)) *this = {noisy, v};
  }
};

uint32_t draw(const IsaTable& isa, const float* z, uint32_t vocab, const PhSampling& p, uint32_t position) {
  const float most = isa.largest(z, vocab);
  if (!(most > -INFINITY)) return 0;
  if (most == INFINITY) return argmax(isa, z, vocab);  // noise tells no two infinities apart: the lowest id
  const Noise noise{p.seed, position, p.output_index};
  Best best{-INFINITY, UINT32_MAX};
  if (p.top_k != 0 || p.top_p < 1.0f || p.min_p > 0.0f) {
    Ranking ranking(isa, z, vocab, most);
    const size_t count = allowed(isa, z, vocab, most, p, &ranking);
    for (size_t rank = 0; rank < count; ++rank) best.consider(noise, ranking.at(rank)->z, ranking.at(rank)->id);
    return best.id;
  }
  best.consider(noise, most, argmax(isa, z, vocab));
  uint32_t ids[kNoiseBlock];
  for (uint32_t first = 0; first < vocab; first += kNoiseBlock) {
    const uint32_t count = isa.contenders(&noise, z, first, std::min(kNoiseBlock, vocab - first), best.value, ids);
    for (uint32_t i = 0; i < count; ++i) best.consider(noise, z[ids[i]], ids[i]);
  }
  return best.id;
}

}  // namespace

bool takes_largest(const PhSampling& p, uint32_t known) {
  const bool suppressed = p.suppressed > 0 && known - p.prompt_length < p.min_tokens;
  return p.temperature == 0.0f && p.repetition_penalty == 1.0f && p.presence_penalty == 0.0f &&
         p.frequency_penalty == 0.0f && p.biases == 0 && !suppressed && !p.want_logprob;
}

Sampled sample(const IsaTable& isa, float* logits, uint32_t vocab, const PhSampling& params, const uint32_t* tokens,
               uint32_t known) {
  std::vector<float> raw;
  if (params.want_logprob) raw.assign(logits, logits + vocab);
  penalize(logits, vocab, params, tokens, known);
  uint32_t token;
  if (params.temperature == 0.0f) {
    token = argmax(isa, logits, vocab);
  } else {
    for (uint32_t v = 0; v < vocab; ++v) logits[v] /= params.temperature;
    token = draw(isa, logits, vocab, params, known);
  }
  float logprob = 0.0f;
  if (params.want_logprob) {
    const float most = isa.largest(raw.data(), vocab);
    logprob = static_cast<float>(double{raw[token]} - double{most} - log(isa.weight(raw.data(), vocab, most)));
  }
  return {token, logprob};
}
