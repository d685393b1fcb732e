// The arithmetic of a step, written once over vectors of W floats and compiled for each instruction set.
//
// One order of summation: an output of a linear adds its products one after the other in K order,
// in a single accumulator, whatever the number of rows; attention reduces tiles of 64 positions
// counted from 0, in order, the same for a decode and for a prefill; nothing is summed across threads.
//
// The includer defines W, TABLE, NAME and, where the machine multiplies bfloat16, BFLOAT16_DOT.

#include <math.h>
#include <string.h>

#include "isa.h"

namespace {

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_unaligned __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_unaligned __attribute__((vector_size(W * 2), aligned(2), may_alias));

constexpr uint32_t kPanel = 32;
constexpr uint32_t kPanelVectors = kPanel / W;

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline vf load_bf16(const uint16_t* p) {
  const vh raw = *reinterpret_cast<const vh_unaligned*>(p);
  return reinterpret_cast<vf>(__builtin_convertvector(raw, vu) << 16);
}

// Lanes are added in halves: one fixed tree.
inline float sum(vf v) {
  float lanes[W];
  store(lanes, v);
  for (uint32_t half = W / 2; half > 0; half /= 2)
    for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float largest(vf v) {
  float lanes[W];
  store(lanes, v);
  float most = lanes[0];
  for (uint32_t i = 1; i < W; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

// exp to about 1 ulp (Cephes' polynomial); 0 below -87.3, so that masked scores vanish; x is at most 88.
inline vf exponential(vf x) {
  const vi none = x < splat(-87.3f);
  const vf clamped = none ? splat(-87.3f) : x;
  const vf shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const vf n = shifted - 12582912.0f;
  vf r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const vi exponent = __builtin_convertvector(n, vi) << 23;
  const vf scaled = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
  return none ? vf{} : scaled;
}

inline vf silu(vf x) {
  const vf low = -x > splat(88.0f) ? splat(88.0f) : -x;
  return x / (exponential(low) + 1.0f);
}

// --- inputs of linears: float, or bfloat16 ---

#ifdef BFLOAT16_DOT
struct Bf16Input {
  typedef uint16_t type;
  static inline uint16_t convert(float x) { return float_to_bf16(x); }
  template <int V>
  static inline void pair(const uint16_t* x, const vu (&w)[V], vf (&acc)[V]) {
    uint32_t both;
    memcpy(&both, x, 4);
    for (int v = 0; v < V; ++v) acc[v] = bfloat16_dot(acc[v], both, w[v]);
  }
};
#endif

struct FloatInput {
  typedef float type;
  static inline float convert(float x) { return x; }
  // Adds the products of inputs k and k + 1, in that order.
  template <int V>
  static inline void pair(const float* x, const vu (&w)[V], vf (&acc)[V]) {
    for (int v = 0; v < V; ++v) acc[v] += x[0] * reinterpret_cast<vf>(w[v] << 16);
    for (int v = 0; v < V; ++v) acc[v] += x[1] * reinterpret_cast<vf>(w[v] & 0xffff0000u);
  }
};

// R rows by V vectors of outputs; w points at the first of these outputs within its panel.
template <class Input, int R, int V>
inline void tile(const typename Input::type* x, uint32_t stride, uint32_t pairs, const uint16_t* w, vf (&acc)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = vf{};
  for (uint32_t k = 0; k < pairs; ++k, w += 2 * kPanel) {
    vu weights[V];
    for (int v = 0; v < V; ++v) weights[v] = *reinterpret_cast<const vu_unaligned*>(w + 2 * W * v);
    for (int r = 0; r < R; ++r) Input::template pair<V>(x + r * stride + 2 * k, weights, acc[r]);
  }
}

enum class Then { kStore, kAdd };

template <class Input, Then then, int R, int V>
inline void outputs(const Linear* job, uint32_t row, const uint16_t* w, uint32_t column) {
  typedef typename Input::type T;
  vf acc[R][V];
  tile<Input, R, V>(static_cast<const T*>(job->input) + size_t{row} * job->stride, job->stride, job->pairs, w, acc);
  for (int r = 0; r < R; ++r) {
    float* out = job->output + size_t{row + r} * job->output_stride + column;
    for (int v = 0; v < V; ++v) store(out + v * W, then == Then::kAdd ? load(out + v * W) + acc[r][v] : acc[r][v]);
  }
}

// Rows are taken in blocks that keep the accumulators in registers; the order within an output is always the same.
constexpr int kWide = kPanelVectors;                            // all of a panel: few rows
constexpr int kNarrow = kPanelVectors > 2 ? 2 : kPanelVectors;  // part of it: many rows
constexpr int kManyRows = W == 16 ? 12 : 6;
constexpr int kFewRows = W == 16 ? 6 : 3;

template <class Input, Then then>
inline void panel(const Linear* job, const uint16_t* w, uint32_t column) {
  uint32_t row = 0;
  for (; row + kManyRows <= job->rows; row += kManyRows)
    for (uint32_t v = 0; v < kPanelVectors; v += kNarrow)
      outputs<Input, then, kManyRows, kNarrow>(job, row, w + 2 * W * v, column + W * v);
  for (; row + kFewRows <= job->rows; row += kFewRows) outputs<Input, then, kFewRows, kWide>(job, row, w, column);
  for (; row < job->rows; ++row) outputs<Input, then, 1, kWide>(job, row, w, column);
}

template <class Input, Then then>
void linear_panels(const Linear* job, uint32_t first, uint32_t last) {
  for (uint32_t p = first; p < last; ++p) {
    panel<Input, then>(job, job->weights + size_t{p} * job->pairs * 2 * kPanel, p * kPanel);
    if (then == Then::kStore && job->bias != nullptr) {
      const uint32_t end = (p + 1) * kPanel < job->outputs ? (p + 1) * kPanel : job->outputs;
      for (uint32_t row = 0; row < job->rows; ++row)
        for (uint32_t n = p * kPanel; n < end; ++n) job->output[size_t{row} * job->output_stride + n] += job->bias[n];
    }
  }
}

template <class Input, int R, int V>
inline void gate_up_rows(const Linear* job, uint32_t row, const uint16_t* gate, const uint16_t* up, uint32_t column) {
  typedef typename Input::type T;
  const T* x = static_cast<const T*>(job->input) + size_t{row} * job->stride;
  for (uint32_t part = 0; part < kPanelVectors; part += V) {
    vf g[R][V], u[R][V];
    tile<Input, R, V>(x, job->stride, job->pairs, gate + 2 * W * part, g);
    tile<Input, R, V>(x, job->stride, job->pairs, up + 2 * W * part, u);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float values[W];
        store(values, silu(g[r][v]) * u[r][v]);
        T* out = static_cast<T*>(job->product) + size_t{row + r} * job->output_stride + column + (part + v) * W;
        for (uint32_t i = 0; i < W; ++i) out[i] = Input::convert(values[i]);
      }
  }
}

template <class Input>
void linear_gate_up(const Linear* job, uint32_t first, uint32_t last) {
  const size_t size = size_t{job->pairs} * 2 * kPanel;
  for (uint32_t p = first; p < last; ++p) {
    const uint16_t* gate = job->weights + 2 * p * size;
    uint32_t row = 0;
    for (; row + kManyRows <= job->rows; row += kManyRows)
      gate_up_rows<Input, kManyRows, kNarrow>(job, row, gate, gate + size, p * kPanel);
    for (; row + kFewRows <= job->rows; row += kFewRows)
      gate_up_rows<Input, kFewRows, kWide>(job, row, gate, gate + size, p * kPanel);
    for (; row < job->rows; ++row) gate_up_rows<Input, 1, kWide>(job, row, gate, gate + size, p * kPanel);
  }
}

// --- norms ---

inline float inverse_rms(const float* x, uint32_t n, float eps) {
  vf squares = vf{};
  uint32_t i = 0;
  for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / sqrtf(total / static_cast<float>(n) + eps);
}

template <class Input>
void norm(const float* x, const float* weight, uint32_t n, uint32_t padded, float eps, void* out) {
  typename Input::type* y = static_cast<typename Input::type*>(out);
  const float scale = inverse_rms(x, n, eps);
  for (uint32_t i = 0; i < n; ++i) y[i] = Input::convert(weight[i] * (x[i] * scale));
  for (uint32_t i = n; i < padded; ++i) y[i] = Input::convert(0.0f);
}

// --- K/V ---

inline size_t element_size(const PhModel* model) { return model->kv_bfloat16 ? 2 : 4; }

// First slot of [page_size][head_dim] for one page, layer, half (0: K, 1: V) and head.
inline uint8_t* slots(const Attention* job, uint64_t entry, uint32_t half) {
  const PhModel* m = job->model;
  const size_t head = size_t{job->pool->page_size} * m->head_dim * element_size(m);
  const size_t page = static_cast<uint32_t>(entry);
  return job->pool->base + (((page * m->layers + job->layer) * 2 + half) * m->kv_heads + job->kv_head) * head;
}

inline void rotate(float* x, const float* cosine, const float* sine, uint32_t half) {
  for (uint32_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    x[i] = low * cosine[i] - high * sine[i];
    x[i + half] = high * cosine[i] + low * sine[i];
  }
}

inline void head_norm(float* x, const float* weight, uint32_t n, float eps) {
  if (weight == nullptr) return;
  const float scale = inverse_rms(x, n, eps);
  for (uint32_t i = 0; i < n; ++i) x[i] = weight[i] * (x[i] * scale);
}

void append(const Attention* job, uint32_t position) {
  const PhModel* m = job->model;
  const PhLayer* layer = m->layer + job->layer;
  const uint32_t d = m->head_dim, half = d / 2, group = m->heads / m->kv_heads;
  float* row = const_cast<float*>(job->qkv) + size_t{position - job->chunk->start} * job->qkv_stride;
  const float* cosine = m->rope_cos + size_t{position} * half;
  const float* sine = m->rope_sin + size_t{position} * half;
  for (uint32_t g = 0; g < group; ++g) {
    float* q = row + size_t{job->kv_head * group + g} * d;
    head_norm(q, layer->q_norm, d, m->rms_norm_eps);
    rotate(q, cosine, sine, half);
  }
  if (position < job->chunk->write_from) return;
  float* k = row + size_t{m->heads + job->kv_head} * d;
  const float* v = row + size_t{m->heads + m->kv_heads + job->kv_head} * d;
  head_norm(k, layer->k_norm, d, m->rms_norm_eps);
  rotate(k, cosine, sine, half);
  const uint32_t page_size = job->pool->page_size;
  const uint64_t entry = job->chunk->row[position / page_size];
  const size_t slot = size_t{position % page_size} * d;
  const float* sources[2] = {k, v};
  for (uint32_t which = 0; which < 2; ++which) {
    if (m->kv_bfloat16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(slots(job, entry, which)) + slot;
      for (uint32_t i = 0; i < d; ++i) out[i] = float_to_bf16(sources[which][i]);
    } else {
      memcpy(reinterpret_cast<float*>(slots(job, entry, which)) + slot, sources[which], d * 4);
    }
  }
}

// Positions [begin, end) of one tile into keys and values, float [64][padded]; others keep what they held.
inline void load_tile(const Attention* job, uint32_t tile_start, uint32_t begin, uint32_t end, uint32_t padded,
                      float* keys, float* values) {
  const PhModel* m = job->model;
  const uint32_t d = m->head_dim, page_size = job->pool->page_size;
  for (uint32_t position = begin; position < end;) {
    const uint32_t in_page = position % page_size;
    const uint32_t count = end - position < page_size - in_page ? end - position : page_size - in_page;
    const uint64_t entry = job->chunk->row[position / page_size];
    for (uint32_t which = 0; which < 2; ++which) {
      float* out = (which ? values : keys) + size_t{position - tile_start} * padded;
      const uint8_t* in = slots(job, entry, which) + size_t{in_page} * d * element_size(m);
      for (uint32_t t = 0; t < count; ++t, out += padded) {
        if (m->kv_bfloat16) {
          const uint16_t* from = reinterpret_cast<const uint16_t*>(in) + size_t{t} * d;
          uint32_t i = 0;
          for (; i + W <= d; i += W) store(out + i, load_bf16(from + i));
          for (; i < d; ++i) out[i] = bf16_to_float(from[i]);
        } else {
          memcpy(out, reinterpret_cast<const float*>(in) + size_t{t} * d, d * 4);
        }
        for (uint32_t i = d; i < padded; ++i) out[i] = 0.0f;
      }
    }
    position += count;
  }
}

// The running softmax of one query head.
struct Running {
  float most, total;
};

// Scores, softmax and weighted sum over positions [begin, end) of a tile, for one query head.
inline void attend_tile(const PhModel* m, const float* query, const float* keys, const float* values, uint32_t begin,
                        uint32_t end, uint32_t padded, Running* running, float* acc) {
  alignas(64) float scores[kTile];
  const vf lowest = splat(-INFINITY);
  for (uint32_t t = 0; t < kTile; t += W) store(scores + t, lowest);
  for (uint32_t t = begin; t < end; ++t) {
    vf dot = vf{};
    for (uint32_t i = 0; i < padded; i += W) dot += load(query + i) * load(keys + size_t{t} * padded + i);
    scores[t] = sum(dot);
  }
  if (m->logit_softcap != 0.0f)
    for (uint32_t t = begin; t < end; ++t) scores[t] = m->logit_softcap * tanhf(scores[t] / m->logit_softcap);
  vf peak = lowest;
  for (uint32_t t = 0; t < kTile; t += W) {
    const vf s = load(scores + t);
    peak = s > peak ? s : peak;
  }
  const float most = running->most > largest(peak) ? running->most : largest(peak);
  vf total = vf{};
  for (uint32_t t = 0; t < kTile; t += W) {
    const vf p = exponential(load(scores + t) - most);
    store(scores + t, p);
    total += p;
  }
  const float scale = sum(exponential(splat(running->most - most))) / W;
  running->most = most;
  running->total = running->total * scale + sum(total);
  for (uint32_t i = 0; i < padded; i += W) {
    vf a = load(acc + i) * scale;
    for (uint32_t t = begin; t < end; ++t) a += scores[t] * load(values + size_t{t} * padded + i);
    store(acc + i, a);
  }
}

template <class Input>
void attend(const Attention* job, float* scratch) {
  const PhModel* m = job->model;
  const uint32_t d = m->head_dim, group = m->heads / m->kv_heads, padded = (d + 15) / 16 * 16;
  float* keys = scratch;
  float* values = keys + kTile * padded;
  float* queries = values + kTile * padded;  // [queries * group][padded], scaled
  float* acc = queries + kQueryBlock * group * padded;
  Running* running = reinterpret_cast<Running*>(acc + kQueryBlock * group * padded);
  const uint32_t count = job->last - job->first, heads = count * group;
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  for (uint32_t h = 0; h < heads; ++h) {
    const float* from =
        job->qkv + size_t{job->first + h / group} * job->qkv_stride + size_t{job->kv_head * group + h % group} * d;
    for (uint32_t i = 0; i < padded; ++i) {
      queries[h * padded + i] = i < d ? from[i] * scale : 0.0f;
      acc[h * padded + i] = 0.0f;
    }
    running[h] = {-INFINITY, 0.0f};
  }
  const uint32_t from = job->chunk->start + job->first, until = job->chunk->start + job->last;
  const uint32_t window = m->sliding_window;
  const uint32_t seen_from = window != 0 && from + 1 > window ? from + 1 - window : 0;
  for (uint32_t start = seen_from / kTile * kTile; start < until; start += kTile) {
    const uint32_t tile_end = start + kTile < until ? start + kTile : until;
    load_tile(job, start, start > seen_from ? start : seen_from, tile_end, padded, keys, values);
    for (uint32_t h = 0; h < heads; ++h) {
      const uint32_t position = from + h / group;
      const uint32_t lowest = window != 0 && position + 1 > window ? position + 1 - window : 0;
      const uint32_t begin = lowest > start ? lowest - start : 0;
      const uint32_t end = position + 1 < tile_end ? position + 1 : tile_end;
      if (end <= start + begin) continue;
      attend_tile(m, queries + h * padded, keys, values, begin, end - start, padded, running + h, acc + h * padded);
    }
  }
  typedef typename Input::type T;
  for (uint32_t h = 0; h < heads; ++h) {
    T* out = static_cast<T*>(job->output) + size_t{job->first + h / group} * job->output_stride +
             size_t{job->kv_head * group + h % group} * d;
    for (uint32_t i = 0; i < d; ++i) out[i] = Input::convert(acc[h * padded + i] / running[h].total);
  }
}

template <class Input>
constexpr IsaTable make_table(const char* name) {
  return {name,
          sizeof(typename Input::type),
          linear_panels<Input, Then::kStore>,
          linear_panels<Input, Then::kAdd>,
          linear_gate_up<Input>,
          norm<Input>,
          append,
          attend<Input>};
}

constexpr IsaTable kFloatTable = make_table<FloatInput>(NAME);
#ifdef BFLOAT16_DOT
constexpr IsaTable kBf16Table = make_table<Bf16Input>(NAME);
#endif

}  // namespace

const IsaTable* TABLE(bool bfloat16_inputs) {
#ifdef BFLOAT16_DOT
  if (bfloat16_inputs) return &kBf16Table;
#endif
  (void)bfloat16_inputs;
  return &kFloatTable;
}
