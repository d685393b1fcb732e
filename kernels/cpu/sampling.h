// Sampling: one pure function of logits, tokens and parameters.
#pragma once
#include "isa.h"

struct Sampled {
  uint32_t token;
  float logprob;
};

// Whether the token at position `known` is that of the largest logit, and nothing more is asked for.
bool takes_largest(const PhSampling& params, uint32_t known);

// logits: float [vocab], changed in place. tokens: by position, `known` of them; the result is the token at `known`.
Sampled sample(const IsaTable& isa, float* logits, uint32_t vocab, const PhSampling& params, const uint32_t* tokens,
               uint32_t known);
