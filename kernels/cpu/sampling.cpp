#include "sampling.h"

#include <math.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

// token = argmax over the allowed v of z(v) + Gumbel(Philox(seed, (position, output index, v, 0))), where z is
// the logits after penalties, bias and mask, over the temperature, and top-k, top-p and min-p say what is allowed.
// Ties go to the lower id everywhere.

namespace {

// Noise lies in [-2.86, 17.33]: a 24-bit uniform is at least 2^-25 away from 0 and 1.
constexpr float kReach = 20.2f;

struct Philox {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., SC 2011).
uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    const uint32_t n0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c0;
}

float gumbel(uint64_t seed, uint32_t position, uint32_t index, uint32_t token) {
  const double u = ((philox(seed, position, index, token, 0) >> 8) + 0.5) * (1.0 / 16777216.0);
  return static_cast<float>(-log(-log(u)));
}

struct Candidate {
  float z;
  uint32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.id < b.id); }

uint32_t argmax(const float* x, uint32_t n) {
  uint32_t best = 0;
  float most = -INFINITY;
  for (uint32_t i = 0; i < n; ++i) {
    if (x[i] > most) {
      most = x[i];
      best = i;
    }
  }
  return best;
}

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

// The allowed candidates after top-k, top-p and min-p, best first.
std::vector<Candidate> filter(const float* z, uint32_t vocab, const PhSampling& p) {
  std::vector<Candidate> all;
  all.reserve(vocab);
  for (uint32_t v = 0; v < vocab; ++v)
    if (z[v] > -INFINITY) all.push_back({z[v], v});
  if (p.top_k != 0 && p.top_k < all.size()) {
    std::nth_element(all.begin(), all.begin() + p.top_k, all.end(), better);
    all.resize(p.top_k);
  }
  std::sort(all.begin(), all.end(), better);
  if (all.empty()) return all;
  const float most = all[0].z;
  if (p.top_p < 1.0f) {
    double total = 0;
    for (const Candidate& c : all) total += exp(double{c.z} - double{most});
    double before = 0;
    size_t kept = 0;
    // A token stays while those before it hold less than top_p: the first always does.
    while (kept < all.size() && before < double{p.top_p} * total) before += exp(double{all[kept++].z} - double{most});
    all.resize(kept);
  }
  if (p.min_p > 0.0f) {
    size_t kept = 1;
    while (kept < all.size() && exp(double{all[kept].z} - double{most}) >= double{p.min_p}) ++kept;
    all.resize(kept);
  }
  return all;
}

float logprob_of(const float* logits, uint32_t vocab, float chosen) {
  float most = -INFINITY;
  for (uint32_t v = 0; v < vocab; ++v) most = logits[v] > most ? logits[v] : most;
  double total = 0;
  for (uint32_t v = 0; v < vocab; ++v) total += exp(double{logits[v]} - double{most});
  return static_cast<float>(double{chosen} - double{most} - log(total));
}

uint32_t draw(const float* z, uint32_t vocab, const PhSampling& p, uint32_t position) {
  uint32_t best = 0;
  float most = -INFINITY;
  bool found = false;
  auto consider = [&](uint32_t v, float value) {
    const float noisy = value + gumbel(p.seed, position, p.output_index, v);
    if (!found || noisy > most || (noisy == most && v < best)) {
      most = noisy;
      best = v;
      found = true;
    }
  };
  if (p.top_k != 0 || p.top_p < 1.0f || p.min_p > 0.0f) {
    for (const Candidate& c : filter(z, vocab, p)) consider(c.id, c.z);
    return best;
  }
  float top = -INFINITY;
  for (uint32_t v = 0; v < vocab; ++v) top = z[v] > top ? z[v] : top;
  for (uint32_t v = 0; v < vocab; ++v)
    if (z[v] >= top - kReach) consider(v, z[v]);
  return best;
}

}  // namespace

Sampled sample(float* logits, uint32_t vocab, const PhSampling& params, const uint32_t* tokens, uint32_t known) {
  std::vector<float> raw;
  if (params.want_logprob) raw.assign(logits, logits + vocab);
  penalize(logits, vocab, params, tokens, known);
  uint32_t token;
  if (params.temperature == 0.0f) {
    token = argmax(logits, vocab);
  } else {
    for (uint32_t v = 0; v < vocab; ++v) logits[v] /= params.temperature;
    token = draw(logits, vocab, params, known);
  }
  return {token, params.want_logprob ? logprob_of(raw.data(), vocab, raw[token]) : 0.0f};
}
