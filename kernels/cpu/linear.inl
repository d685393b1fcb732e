// Linear layers over packed weights: bfloat16, or codes (integers.inl, integer_blocks.inl).
//
// An output adds its products one after the other in K order, in a single accumulator, whatever the
// number of rows: how rows and outputs are grouped below changes what is loaded, never what is added.
//
// v2: no spilled accumulator, rows in even blocks, the next panel fetched early. Over v1 on AVX2, one thread of a Zen
// 3: 1.45 times as fast from 16 rows on (three quarters of the peak of its multipliers), 1.4 at 6 to 8 rows, no change
// at 1 row, which memory bounds. Whole steps: 1.1 at batch 1, 1.4 at 8, 1.7 at 32 and 64, 1.6 for a prompt of 512
// (`python -m tests.kernels.bench LIBRARY-OF-BEFORE`).

namespace {

// Rows of one register tile. 16 registers hold 12 accumulators, 2 vectors of weights and one input; AVX-512 has 32.
constexpr int kTileRows = W == 16 ? 12 : 6;
constexpr int tile_vectors(int rows) { return W == 16 || rows > 2 ? 2 : 4; }

// Inputs that one pass over a piece's panels keeps in the second-level cache, beside the panels.
constexpr uint32_t kInputBytes = 160 << 10;

// Sums are outputs. Sum is the type in which they are added: the compiler spills an array that is read as another one.
struct Plain {
  typedef vf Sum;
  static inline vf output(vf sums, const Linear*, uint32_t, const uint8_t*, uint32_t) { return sums; }
};

#ifdef BFLOAT16_DOT
struct Bf16Input : Plain {
  typedef uint16_t type;
  template <int R, int V>
  static inline void pair(const uint16_t* x, uint32_t stride, const uint16_t* w, vf (&acc)[R][V]) {
    vu weights[V];
    for (int v = 0; v < V; ++v) weights[v] = *reinterpret_cast<const vu_unaligned*>(w + 2 * W * v);
    for (int r = 0; r < R; ++r) {
      uint32_t both;
      memcpy(&both, x + size_t(r) * stride, 4);
      for (int v = 0; v < V; ++v) acc[r][v] = bfloat16_dot(acc[r][v], both, weights[v]);
    }
  }
};
#endif

// What products take.
template <class A>
inline void store_input(float* to, A x) {
  store(to, x);
}
inline void store_input(uint16_t* to, float x) { store(to, x); }
#ifdef BFLOAT16_DOT
inline void store_input(uint16_t* to, vf x) { store_bfloat16(to, x); }
#endif

// As exact as what it is stored as.
inline vf silu_for(const float*, vf x) { return silu(x); }
#ifdef BFLOAT16_DOT
inline vf silu_for(const uint16_t*, vf x) { return coarse_silu(x); }
#endif

constexpr vu kUpper = vu{} + 0xffff0000u;

struct FloatInput : Plain {
  typedef float type;
  // Adds the products of inputs 0 and 1, in that order. First one for all rows, then the other, and the mask from
  // memory: 12 accumulators leave four of 16 registers, and a spilled accumulator costs a third of the speed.
  template <int R, int V>
  static inline void pair(const float* x, uint32_t stride, const uint16_t* w, vf (&acc)[R][V]) {
    for (int odd = 0; odd < 2; ++odd) {
      const vu* upper = &kUpper;
      __asm__("" : "+r"(x), "+r"(upper));  // or the compiler loads them early, into registers that it lacks
      vf weights[V];
      for (int v = 0; v < V; ++v) {
        const vu both = *reinterpret_cast<const vu_unaligned*>(w + 2 * W * v);
        weights[v] = reinterpret_cast<vf>(odd ? both & *upper : both << 16);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) acc[r][v] += x[size_t(r) * stride + odd] * weights[v];
    }
  }
};

// R rows by V vectors of outputs into sums [R][kPanelVectors]; w points at the first of these outputs within its panel.
// The next panel is fetched meanwhile: the stride of half a panel defeats the hardware's own prefetch, and reading and
// multiplying would take turns. Not inlined: the three kinds of linear share the code.
template <class Input, int R, int V>
__attribute__((noinline)) void tile(const typename Input::type* x, uint32_t stride, uint32_t pairs, const uint16_t* w,
                                    typename Input::Sum* sums) {
  typename Input::Sum acc[R][V];  // apart from the sums, which lie in memory
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = typename Input::Sum{};
  const uint16_t* next = w + size_t{pairs} * 2 * kPanel;
  for (uint32_t k = 0; k < pairs; ++k, x += 2, w += 2 * kPanel, next += 2 * kPanel) {
    __asm__("" : "+r"(next));  // or it is an index for each line, and rows lack registers for theirs
    for (int line = 0; line < 2 * W * V; line += 32) __builtin_prefetch(next + line, 0, 2);
    Input::template pair<R, V>(x, stride, w, acc);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r * kPanelVectors + v] = acc[r][v];
}

// How R rows from `row` on and V vectors of outputs from `n` on have their sums, by the i-th of the panels that belong
// to p.
template <class Input>
struct Tile {
  static constexpr int kRows = kTileRows;
  static constexpr int vectors(int rows) { return tile_vectors(rows); }
  template <int R, int V>
  static inline void sum(const Linear* job, uint32_t row, Panels& panels, uint32_t p, uint32_t i, uint32_t n,
                         typename Input::Sum* sums) {
    const auto* x = static_cast<const typename Input::type*>(job->at) + size_t{row} * job->stride;
    tile<Input, R, V>(x, job->stride, job->pairs, panels.at(p, i) + 2 * n, sums);
  }
};
template <uint32_t encoding>
struct Tile<BlockInput<encoding>> {
  static constexpr int kRows = 6;  // sums of codes and of floats are in registers
  static constexpr int vectors(int) { return W == 16 ? 2 : 1; }
  template <int R, int V>
  static inline void sum(const Linear* job, uint32_t row, Panels& panels, uint32_t p, uint32_t i, uint32_t n,
                         vf* sums) {
    block_tile<encoding, R, V>(job, row, panels.packed(p, i), n, sums);
  }
};

#ifdef BFLOAT16_DOT
constexpr uint32_t kFewRows = 8;  // by which weights are multiplied as soon as they are expanded

// R rows by a panel of blocks into sums [R][kPanelVectors].
template <uint32_t encoding, int R>
__attribute__((noinline)) void expand_and_multiply(const uint16_t* x, uint32_t stride, uint32_t pairs,
                                                   const uint8_t* block, vf* sums) {
  vf acc[kPanelVectors][R] = {};
  for (uint32_t k = 0; k < pairs; k += kBlock / 2, x += kBlock) {
    block = over_weights<encoding>(block, [&](uint32_t pair, uint32_t column, vf low, vf high) {
      const dot_u weights = to_bfloat16_pairs(low, high);
      for (int r = 0; r < R; ++r) {
        uint32_t both;
        memcpy(&both, x + size_t(r) * stride + 2 * pair, 4);
        acc[column / (2 * W)][r] = bfloat16_dot(acc[column / (2 * W)][r], both, weights);
      }
    });
  }
  for (int r = 0; r < R; ++r)
    for (uint32_t v = 0; v < kPanelVectors; ++v) sums[r * kPanelVectors + v] = acc[v][r];
}

// The same by the i-th of the panels that belong to p.
template <int R>
inline void multiply(const Linear* job, const Panels& panels, uint32_t p, uint32_t i, vf* sums) {
  const bool four = job->weights.encoding == kPhInt4;
  const auto use = four ? expand_and_multiply<kPhInt4, R> : expand_and_multiply<kPhInt8, R>;
  use(static_cast<const uint16_t*>(job->at), job->stride, job->pairs, panels.packed(p, i), sums);
}

// f(row, panel, sums) as over_tiles() calls it, for a few rows by blocks.
template <uint32_t Together, class F>
inline void over_blocks(const Linear* job, const Panels& panels, uint32_t first, uint32_t last, F&& f) {
  with_count<kFewRows>(job->rows, [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (uint32_t p = first; p < last; ++p) {
      vf sums[Together][R][kPanelVectors];
      for (uint32_t i = 0; i < Together; ++i) multiply<R>(job, panels, p, i, sums[i][0]);
      for (int r = 0; r < R; ++r) f(r, p, [&](uint32_t i, uint32_t v) { return sums[i][r][v]; });
    }
  });
}
#endif

// f(row, panel, sums) for all rows and panels [first, last); sums(i, v): vector v by the i-th of the panels that belong
// to it. A few rows over one panel, then the next rows over it, and so many rows before the next panel as stay in the
// cache.
template <class Input, uint32_t Together, class F>
inline void over_tiles(const Linear* job, Panels& panels, uint32_t first, uint32_t last, F&& f) {
  typedef typename Input::type T;
#ifdef BFLOAT16_DOT
  if constexpr (std::is_same_v<Input, Bf16Input>)
    if (!panels.ready() && job->rows <= kFewRows) return over_blocks<Together>(job, panels, first, last, f);
#endif
  constexpr uint32_t kRows = Tile<Input>::kRows;
  const uint32_t fit = kInputBytes / (job->stride * sizeof(T)) / kRows * kRows;
  const uint32_t most = fit > kRows ? fit : kRows;
  for (uint32_t start = 0; start < job->rows; start += most) {
    const uint32_t rows = job->rows - start < most ? job->rows - start : most;
    for (uint32_t p = first; p < last; ++p)
      in_blocks<kRows>(rows, [&](uint32_t row, auto count) {
        constexpr int R = decltype(count)::value, V = Tile<Input>::vectors(R);
        typename Input::Sum sums[Together][R][kPanelVectors];
        for (uint32_t part = 0; part < kPanelVectors; part += V)
          for (uint32_t i = 0; i < Together; ++i)
            Tile<Input>::template sum<R, V>(job, start + row, panels, p, i, part * W, &sums[i][0][part]);
        for (int r = 0; r < R; ++r) f(start + row + r, p, [&](uint32_t i, uint32_t v) { return sums[i][r][v]; });
      });
  }
}

enum class Then { kStore, kAdd };

inline void add_bias(const Linear* job, uint32_t first, uint32_t last) {
  if (job->bias == nullptr) return;
  const uint32_t end = last * kPanel < job->outputs ? last * kPanel : job->outputs;
  for (uint32_t row = 0; row < job->rows; ++row)
    for (uint32_t n = first * kPanel; n < end; ++n) job->output[size_t{row} * job->output_stride + n] += job->bias[n];
}

template <class Input, Then then>
void linear_panels(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  Panels panels(job, 1, expanded);
  over_tiles<Input, 1>(job, panels, first, last, [&](uint32_t row, uint32_t p, auto&& sums) {
    float* out = job->output + size_t{row} * job->output_stride + p * kPanel;
    for (uint32_t v = 0; v < kPanelVectors; ++v, out += W) {
      const vf y = Input::output(sums(0, v), job, row, panels.packed(p, 0), v * W);
      store(out, then == Then::kAdd ? load(out) + y : y);
    }
  });
  if (then == Then::kStore) add_bias(job, first, last);
}

template <class Input, class Product>
void gate_up_panels(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  Panels panels(job, 2, expanded);
  over_tiles<Input, 2>(job, panels, first, last, [&](uint32_t row, uint32_t p, auto&& sums) {
    Product* out = static_cast<Product*>(job->product) + size_t{row} * job->output_stride + p * kPanel;
    for (uint32_t v = 0; v < kPanelVectors; ++v, out += W) {
      const vf gate = Input::output(sums(0, v), job, row, panels.packed(p, 0), v * W);
      const vf up = Input::output(sums(1, v), job, row, panels.packed(p, 1), v * W);
      store_input(out, silu_for(out, gate) * up);
    }
  });
}

template <class Input>
struct As {
  typedef Input type;
};

// f(As<what the weights are multiplied by>).
template <class Input, class F>
inline void with_input(uint32_t encoding, F&& f) {
  switch (encoding) {
    case kPhIntegers:
      return f(As<IntegerInput>{});
    case kPhIntegerBlocks4:
      return f(As<BlockInput<kPhIntegerBlocks4>>{});
    case kPhIntegerBlocks8:
      return f(As<BlockInput<kPhIntegerBlocks8>>{});
    default:
      f(As<Input>{});
  }
}

template <class Input, Then then>
void linear(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  with_input<Input>(job->weights.encoding,
                    [&](auto as) { linear_panels<typename decltype(as)::type, then>(job, first, last, expanded); });
}

template <class Input>
void linear_gate_up(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  with_input<Input>(job->weights.encoding, [&](auto as) {
    gate_up_panels<typename decltype(as)::type, typename Input::type>(job, first, last, expanded);
  });
}

inline float inverse_rms(const float* x, uint32_t n, float eps) {
  vf squares[4] = {};  // four sums, or each addition waits for the one before
  uint32_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (uint32_t v = 0; v < 4; ++v) squares[v] += load(x + i + v * W) * load(x + i + v * W);
  float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / sqrtf(total / static_cast<float>(n) + eps);
}

template <class Input>
void norm(const float* x, const float* weight, uint32_t n, uint32_t padded, float eps, void* out) {
  typename Input::type* y = static_cast<typename Input::type*>(out);
  const float scale = inverse_rms(x, n, eps);
  over(n, [&](uint32_t i, auto as) { store_input(y + i, load_as(as, weight + i) * (load_as(as, x + i) * scale)); });
  memset(y + n, 0, (padded - n) * sizeof *y);
}

}  // namespace
