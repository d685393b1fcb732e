// Passes over the logits of one position, which sampling is made of.

namespace {

// The largest of x, -inf for none; NaN is passed over.
float largest_of(const float* x, uint32_t n) {
  vf most = splat(-INFINITY);
  uint32_t i = 0;
  for (; i + W <= n; i += W) most = load(x + i) > most ? load(x + i) : most;
  float result = largest(most);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Ids of [first, n) with x >= least, in order. Returns how many; ids has room for all.
uint32_t at_least(const float* x, uint32_t n, float least, uint32_t* ids) {
  uint32_t count = 0, i = 0;
  for (; i + W <= n; i += W) {
    if (!any(load(x + i) >= splat(least))) continue;
    for (uint32_t v = i; v < i + W; ++v)
      if (x[v] >= least) ids[count++] = v;
  }
  for (; i < n; ++i)
    if (x[i] >= least) ids[count++] = i;
  return count;
}

// The sum of exp(x - most) in double; most is at least the largest of x.
double weight_of(const float* x, uint32_t n, float most) {
  vd total = vd{};
  uint32_t i = 0;
  for (; i + W / 2 <= n; i += W / 2) {
    const vf_half part = *reinterpret_cast<const vf_half_unaligned*>(x + i);
    total += exponential(__builtin_convertvector(part, vd) - double{most});
  }
  double lanes[W / 2];
  memcpy(lanes, &total, sizeof lanes);
  for (; i < n; ++i) lanes[0] += exponential(vd{} + (double{x[i]} - double{most}))[0];
  double result = 0;
  for (uint32_t lane = 0; lane < W / 2; ++lane) result += lanes[lane];
  return result;
}

// The first word of Philox4x32-10 for each of 64 tokens from `first` on. A word is the low half of a 64-bit lane:
// what a multiplication takes, so that nothing needs to be moved between lanes.
inline void philox(const Noise* noise, uint32_t first, uint32_t (&words)[kNoiseBlock]) {
  vq lane;
  for (uint32_t i = 0; i < W / 2; ++i) lane[i] = i;
  for (uint32_t i = 0; i < kNoiseBlock; i += W / 2) {
    vq c0 = vq{} + noise->position, c1 = vq{} + noise->index, c2 = lane + (first + i), c3 = vq{};
    uint32_t k0 = static_cast<uint32_t>(noise->seed), k1 = static_cast<uint32_t>(noise->seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1) {
      const vq a = multiply(c0, kPhiloxMultiplier0), b = multiply(c2, kPhiloxMultiplier1);
      c0 = (b >> 32) ^ c1 ^ k0;
      c1 = b;
      c2 = (a >> 32) ^ c3 ^ k1;
      c3 = a;
    }
    for (uint32_t t = 0; t < W / 2; ++t) words[i + t] = static_cast<uint32_t>(c0[t]);
  }
}

// Of ids [first, first + count), count <= 64: those that their noise may lift to `most` or above. Gumbel noise g of a
// uniform u reaches c only if 1 - u <= exp(-c), because 1 - u <= -log u; the margins outweigh all rounding.
uint32_t contenders(const Noise* noise, const float* z, uint32_t first, uint32_t count, float most, uint32_t* ids) {
  alignas(64) uint32_t words[kNoiseBlock];
  alignas(64) float gaps[kNoiseBlock];
  philox(noise, first, words);
  const float margin = 1e-4f + fabsf(most) * 1e-6f;
  for (uint32_t i = 0; i < kNoiseBlock; ++i) gaps[i] = i < count ? z[first + i] - most + margin : -INFINITY;
  uint32_t found = 0;
  for (uint32_t i = 0; i < kNoiseBlock; i += W) {
    const vf gap = load(gaps + i);
    const vf chance = exponential(gap > splat(1.0f) ? splat(1.0f) : gap);
    const vu above = 0xffffffu - (*reinterpret_cast<const vu_unaligned*>(words + i) >> 8);
    const vf rest = (__builtin_convertvector(reinterpret_cast<vi>(above), vf) + 0.5f) * (1.0f / 16777216.0f);
    const vi possible = rest <= chance;
    if (!any(possible)) continue;
    for (uint32_t lane = 0; lane < W; ++lane)
      if (possible[lane]) ids[found++] = first + i + lane;
  }
  return found;
}

}  // namespace
