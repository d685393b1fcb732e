// Pages: keys and values in the order in which they are multiplied.
//
// A plane is the keys or the values of one page, layer and kv head, in words of 32 bits. A word holds E elements: 1
// float, 2 bfloat16, 4 codes of int8.
//
//   keys    [head_dim / E][page_size] words, each E dimensions of one position
//   values  [page_size / E][head_dim] words, each E positions of one dimension
//   scales  [page_size] floats, behind codes alone
//
// So tiles and vectors of positions take keys, and vectors of dimensions take values, as they lie.
//
// A code is value / scale, to nearest even; the scale is the largest |value| of the head / 127. Both are divisions that
// every instruction set rounds alike, and nothing here can be contracted: equal values have equal bytes wherever and
// whenever they are stored.

namespace {

template <class Kv>
constexpr uint32_t kWord = 4 / sizeof(Kv);  // elements

// --- where things lie ---

// Bytes of one position's keys or values of a head.
inline size_t slot_size(const PhModel* m) {
  return m->kv_type == kPhKvInt8 ? m->head_dim + sizeof(float)
                                 : size_t{m->head_dim} * (m->kv_type == kPhKvBfloat16 ? 2 : 4);
}

inline size_t plane_size(const Attention* job) { return job->pool->page_size * slot_size(job->model); }

// Of one page, layer, half (0: keys, 1: values) and head.
inline uint8_t* plane(const Attention* job, uint64_t entry, uint32_t half, uint32_t kv_head) {
  const PhModel* m = job->model;
  const size_t page = static_cast<uint32_t>(entry);
  return job->pool->base + (((page * m->layers + job->layer) * 2 + half) * m->kv_heads + kv_head) * plane_size(job);
}

inline float* scales_of(uint8_t* plane, uint32_t page_size, uint32_t d) {
  return reinterpret_cast<float*>(plane + size_t{page_size} * d);
}

// --- elements ---

inline vu load_words(const void* p) { return *static_cast<const vu_unaligned*>(p); }

// Element e of each word, as floats; of codes without their scale.
inline vf element(const float*, vu words, uint32_t) { return reinterpret_cast<vf>(words); }
inline vf element(const uint16_t*, vu words, uint32_t e) {
  return reinterpret_cast<vf>(e == 0 ? words << 16 : words & 0xffff0000u);
}
inline vf element(const int8_t*, vu words, uint32_t e) {
  return __builtin_convertvector(reinterpret_cast<vi>(words << (24 - 8 * e)) >> 24, vf);
}

// --- positions into a page ---

// Elements of W floats, in the low bits of lanes, the others 0. divisor: of codes.
inline vu rounded(const float*, vf values, float) { return reinterpret_cast<vu>(values); }
inline vu rounded(const uint16_t*, vf values, float) { return to_halves(values); }
inline vu rounded(const int8_t*, vf values, float divisor) {
  return reinterpret_cast<vu>(values / divisor + kRounder) & 0xffu;
}

constexpr float kLeastStored = 1e-30f;  // a head whose largest value is less is stored as zeros

// NaN and infinity end as a scale that is one.
inline float int8_scale(const float* values, uint32_t n) {
  uint32_t most = 0;  // as bits, which are ordered as the values are, NaN above all
  for (uint32_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, values + i, 4);
    bits &= 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  float scale;
  memcpy(&scale, &most, 4);
  return scale < kLeastStored ? 0.0f : scale / 127.0f;
}

inline float divisor_of(float scale) { return scale == 0.0f ? 1.0f : scale; }

// f(i, vector, how many) over n floats; what is missing of the last vector is 0.
template <class F>
inline void over_vectors(const float* values, uint32_t n, F&& f) {
  uint32_t i = 0;
  for (; i + W <= n; i += W) f(i, load(values + i), W);
  if (i == n) return;
  alignas(64) float some[W] = {};
  memcpy(some, values + i, (n - i) * 4);
  f(i, load(some), n - i);
}

// The key [d] of a slot.
template <class Kv>
inline void put_key(uint8_t* keys, uint32_t page_size, uint32_t slot, const float* key, uint32_t d) {
  constexpr uint32_t E = kWord<Kv>;
  uint32_t* to = reinterpret_cast<uint32_t*>(keys) + slot;
  const float scale = sizeof(Kv) == 1 ? int8_scale(key, d) : 0.0f;
  if (sizeof(Kv) == 1) scales_of(keys, page_size, d)[slot] = scale;
  over_vectors(key, d, [&](uint32_t i, vf values, uint32_t n) {
    alignas(64) uint32_t lanes[W];
    *reinterpret_cast<vu*>(lanes) = rounded(static_cast<const Kv*>(nullptr), values, divisor_of(scale));
    for (uint32_t j = 0; j < n; j += E) {
      uint32_t word = lanes[j];
      for (uint32_t e = 1; e < E; ++e) word |= lanes[j + e] << (32 / E * e);
      to[size_t{i + j} / E * page_size] = word;
    }
  });
}

// The values of slots [slot, slot + count), `from` [d] and every `stride` floats. count: 1, or as many as share words.
// Of one alone, elements are stored one by one: those beside them are another position's, which another thread may be
// storing.
template <class Kv>
inline void put_values(uint8_t* values, uint32_t page_size, uint32_t slot, const float* from, size_t stride,
                       uint32_t count, uint32_t d) {
  constexpr uint32_t E = kWord<Kv>;
  float divisors[E];
  for (uint32_t e = 0; e < count; ++e) {
    const float scale = sizeof(Kv) == 1 ? int8_scale(from + e * stride, d) : 0.0f;
    if (sizeof(Kv) == 1) scales_of(values, page_size, d)[slot + e] = scale;
    divisors[e] = divisor_of(scale);
  }
  const Kv* type = nullptr;
  uint8_t* words = values + size_t{slot / E} * d * 4;
  over_vectors(from, d, [&](uint32_t i, vf first, uint32_t n) {
    vu lanes = rounded(type, first, divisors[0]);
    if (count == E) {
      for (uint32_t e = 1; e < E; ++e) {
        alignas(64) float some[W] = {};
        memcpy(some, from + e * stride + i, n * 4);
        lanes |= rounded(type, load(some), divisors[e]) << (32 / E * e);
      }
      memcpy(words + i * 4, &lanes, n * 4);
      return;
    }
    Kv* to = reinterpret_cast<Kv*>(words) + size_t{i} * E + slot % E;
    for (uint32_t j = 0; j < n; ++j) to[size_t{j} * E] = static_cast<Kv>(lanes[j]);
  });
}

}  // namespace
