// Linear layers by tiles.
//
// An output adds 32 products at a time, in the order in which the tile instruction does, whatever the number of
// rows: a block of 32 rows and one of 1 row differ in how many rows the registers have, and in nothing else.

namespace {

constexpr uint32_t kBlockRows = 32;
constexpr uint32_t kCachedRows = 16 * kBlockRows;
constexpr uint32_t kTilePairs = 16;     // pairs of inputs that one instruction takes
constexpr uint32_t kFetchAhead = 8192;  // bytes of weights, which come from memory one after the other

// Sums of a block of rows by one panel, left in the registers. `Both`: it has more than 16 rows.
template <bool Both>
inline void sum_block(const uint16_t* x, uint32_t stride, uint32_t pairs, const uint16_t* w) {
  clear_tile0();
  clear_tile1();
  if (Both) {
    clear_tile2();
    clear_tile3();
  }
  auto dot = [&](const uint16_t* inputs, const uint16_t* weights) {
    load_tile6(weights, 4 * kPanel);
    load_tile7(weights + 32, 4 * kPanel);
    load_tile4(inputs, size_t{stride} * 2);
    dot_bfloat16_0();
    dot_bfloat16_1();
    if (Both) {
      load_tile5(inputs + size_t{16} * stride, size_t{stride} * 2);
      dot_bfloat16_2();
      dot_bfloat16_3();
    }
  };
  uint32_t k = 0;
  for (; k + kTilePairs <= pairs; k += kTilePairs, w += kTilePairs * 2 * kPanel) {
    const char* ahead = reinterpret_cast<const char*>(w) + kFetchAhead;
    for (uint32_t line = 0; line < kTilePairs * 4 * kPanel; line += 64) __builtin_prefetch(ahead + line, 0, 2);
    dot(x + 2 * k, w);
  }
  if (k == pairs) return;
  // Inputs are padded with zeros, panels end.
  alignas(64) uint16_t rest[kTilePairs * 2 * kPanel] = {};
  memcpy(rest, w, size_t{pairs - k} * 4 * kPanel);
  dot(x + 2 * k, rest);
}

inline void sum_block(const uint16_t* x, uint32_t stride, uint32_t pairs, const uint16_t* w, uint32_t rows) {
  if (rows > 16) {
    sum_block<true>(x, stride, pairs, w);
  } else {
    sum_block<false>(x, stride, pairs, w);
  }
}

// The sums of a block into memory [rows][stride].
inline void store_block(float* to, uint32_t stride, uint32_t rows) {
  store_tile0(to, stride);
  store_tile1(to + 16, stride);
  if (rows <= 16) return;
  store_tile2(to + size_t{16} * stride, stride);
  store_tile3(to + size_t{16} * stride + 16, stride);
}

// f(first row, rows, panel) over all rows and panels [first, last): all blocks of rows over one panel, then the next
// panel, and so many rows before that as stay in the cache.
template <class F>
inline void over_blocks(const Linear* job, uint32_t first, uint32_t last, F&& f) {
  uint32_t shaped = 0;
  for (uint32_t start = 0; start < job->rows; start += kCachedRows) {
    const uint32_t end = job->rows - start < kCachedRows ? job->rows : start + kCachedRows;
    for (uint32_t p = first; p < last; ++p) {
      for (uint32_t row = start; row < end; row += kBlockRows) {
        const uint32_t rows = end - row < kBlockRows ? end - row : kBlockRows;
        if (rows != shaped) shape_tiles(rows);
        shaped = rows;
        f(row, rows, p);
      }
    }
  }
  drop_tiles();
}

template <Then then>
void linear_tiles(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  Panels panels(job, 1, expanded);
  over_blocks(job, first, last, [&](uint32_t row, uint32_t rows, uint32_t p) {
    const uint16_t* x = static_cast<const uint16_t*>(job->input) + size_t{row} * job->stride;
    float* out = job->output + size_t{row} * job->output_stride + p * kPanel;
    sum_block(x, job->stride, job->pairs, panels.at(p), rows);
    if (then == Then::kStore) {
      store_block(out, job->output_stride, rows);
      return;
    }
    alignas(64) float sums[kBlockRows * kPanel];
    store_block(sums, kPanel, rows);
    for (uint32_t r = 0; r < rows; ++r, out += job->output_stride)
      for (uint32_t n = 0; n < kPanel; n += W) store(out + n, load(out + n) + load(sums + r * kPanel + n));
  });
  if (then == Then::kStore) add_bias(job, first, last);
}

void gate_up_tiles(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  Panels panels(job, 2, expanded);
  over_blocks(job, first, last, [&](uint32_t row, uint32_t rows, uint32_t p) {
    const uint16_t* x = static_cast<const uint16_t*>(job->input) + size_t{row} * job->stride;
    const uint16_t* gate = panels.at(p);
    uint16_t* out = static_cast<uint16_t*>(job->product) + size_t{row} * job->output_stride + p * kPanel;
    alignas(64) float gates[kBlockRows * kPanel], ups[kBlockRows * kPanel];
    sum_block(x, job->stride, job->pairs, gate, rows);
    store_block(gates, kPanel, rows);
    sum_block(x, job->stride, job->pairs, gate + panels.stride(), rows);
    store_block(ups, kPanel, rows);
    for (uint32_t r = 0; r < rows; ++r, out += job->output_stride)
      for (uint32_t n = 0; n < kPanel; n += W)
        store(out + n, silu(load(gates + r * kPanel + n)) * load(ups + r * kPanel + n));
  });
}

}  // namespace
