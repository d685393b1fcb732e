// Linear layers by tiles.
//
// An output adds 32 products at a time, in the order in which the tile instruction does, whatever the number of
// rows: a block of 32 rows and one of 1 row differ in how many rows the registers have, and in nothing else.

namespace {

constexpr uint32_t kBlockRows = 32;
constexpr uint32_t kCachedBytes = 3 << 18;  // of inputs, a part of the second-level cache
constexpr uint32_t kTilePairs = 16;         // pairs of inputs that one instruction takes
constexpr uint32_t kFetchAhead = 8192;      // bytes of weights, which come from memory one after the other

// Where a panel's weights come from, 16 pairs of inputs after 16 pairs.

// Bfloat16 that lies in memory, or was expanded before. Inputs are padded with zeros, panels end: the rest of the last
// pairs is zeros too.
class Ready {
 public:
  Ready(const uint16_t* weights, uint32_t pairs) : weights_(weights), pairs_(pairs) {}
  const uint16_t* next() {
    const uint16_t* w = weights_;
    if (pairs_ >= kTilePairs) {
      const char* ahead = reinterpret_cast<const char*>(w) + kFetchAhead;
      for (uint32_t line = 0; line < 2 * kBlockValues; line += 64) __builtin_prefetch(ahead + line, 0, 2);
      weights_ += kBlockValues;
      pairs_ -= kTilePairs;
      return w;
    }
    memset(rest_, 0, sizeof rest_);
    memcpy(rest_, w, size_t{pairs_} * 4 * kPanel);
    return rest_;
  }

 private:
  const uint16_t* weights_;
  uint32_t pairs_;
  alignas(64) uint16_t rest_[kBlockValues];
};

// Blocks that are expanded one ahead of the one that is multiplied: the two use different parts of a core. `to`: the
// whole panel where it is needed again, else two blocks in turns.
template <uint32_t encoding, bool Kept>
class Expanding {
 public:
  Expanding(const uint8_t* block, uint32_t blocks, uint16_t* to) : block_(block), blocks_(blocks), to_(to) {
    expand_next();
  }
  const uint16_t* next() {
    const uint16_t* w = ahead_;
    if (expanded_ != blocks_) expand_next();
    return w;
  }

 private:
  void expand_next() {
    ahead_ = to_ + size_t{Kept ? expanded_ : expanded_ % 2} * kBlockValues;
    block_ = expand<encoding>(block_, ahead_);
    ++expanded_;
  }

  const uint8_t* block_;
  uint32_t blocks_, expanded_ = 0;
  uint16_t *to_, *ahead_;
};

// Sums of a block of rows by one panel, left in the registers. `Both`: it has more than 16 rows.
template <bool Both, class Source>
inline void sum_block(const uint16_t* x, uint32_t stride, uint32_t pairs, Source& source) {
  clear_tile0();
  clear_tile1();
  if (Both) {
    clear_tile2();
    clear_tile3();
  }
  for (uint32_t k = 0; k < pairs; k += kTilePairs, x += 2 * kTilePairs) {
    const uint16_t* w = source.next();
    stream_tile4(x, size_t{stride} * 2);
    load_tile6(w, 4 * kPanel);
    load_tile7(w + 32, 4 * kPanel);
    if (Both) stream_tile5(x + size_t{16} * stride, size_t{stride} * 2);
    dot_bfloat16_0();
    dot_bfloat16_1();
    if (Both) {
      dot_bfloat16_2();
      dot_bfloat16_3();
    }
  }
}

template <uint32_t encoding, class F>
inline void sum_expanding(const Linear* job, Panels* panels, uint32_t p, uint32_t i, F&& sum) {
  const uint8_t* block = panels->packed(p, i);
  if (job->rows > kBlockRows) {
    panels->keep(p, i);
    return sum(Expanding<encoding, true>(block, panels->blocks(), panels->kept(i)));
  }
  alignas(64) uint16_t two[2 * kBlockValues];
  sum(Expanding<encoding, false>(block, panels->blocks(), two));
}

// Of the i-th panel that belongs to p.
inline void sum_block(const Linear* job, Panels* panels, uint32_t p, uint32_t i, uint32_t row, uint32_t rows) {
  const uint16_t* x = static_cast<const uint16_t*>(job->input) + size_t{row} * job->stride;
  auto sum = [&](auto&& source) {
    if (rows > 16) {
      sum_block<true>(x, job->stride, job->pairs, source);
    } else {
      sum_block<false>(x, job->stride, job->pairs, source);
    }
  };
  if (panels->expanded() || panels->keeps(p, i)) return sum(Ready(panels->at(p, i), job->pairs));
  if (job->weights.encoding == kPhInt4) return sum_expanding<kPhInt4>(job, panels, p, i, sum);
  sum_expanding<kPhInt8>(job, panels, p, i, sum);
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
  const uint32_t fitting = kCachedBytes / (job->stride * 2) / kBlockRows * kBlockRows;
  const uint32_t cached = fitting < kBlockRows ? kBlockRows : fitting;
  for (uint32_t start = 0; start < job->rows; start += cached) {
    const uint32_t end = job->rows - start < cached ? job->rows : start + cached;
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
    float* out = job->output + size_t{row} * job->output_stride + p * kPanel;
    sum_block(job, &panels, p, 0, row, rows);
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
    uint16_t* out = static_cast<uint16_t*>(job->product) + size_t{row} * job->output_stride + p * kPanel;
    alignas(64) float gates[kBlockRows * kPanel], ups[kBlockRows * kPanel];
    sum_block(job, &panels, p, 0, row, rows);
    store_block(gates, kPanel, rows);
    sum_block(job, &panels, p, 1, row, rows);
    store_block(ups, kPanel, rows);
    const auto product = [&](const float* gate, const float* up) { return silu(load(gate)) * load(up); };
    for (uint32_t r = 0; r < rows; ++r, out += job->output_stride)
      for (uint32_t n = 0; n < kPanel; n += 2 * W) {
        const float *gate = gates + r * kPanel + n, *up = ups + r * kPanel + n;
        store_both(out + n, product(gate, up), product(gate + W, up + W));
      }
  });
}

}  // namespace
