// Linear layers by tiles.
//
// An output adds 32 products of bfloat16 at a time, in the order in which the tile instruction does, whatever the
// number of rows: a block of 32 rows and one of 1 row differ in how many rows the registers have, and in nothing else.

namespace {

constexpr uint32_t kBlockRows = 32;
constexpr uint32_t kCachedBytes = 3 << 18;  // of inputs, a part of the second-level cache
constexpr uint32_t kMostRows = 512;         // whose sums by one panel are kept
constexpr uint32_t kTilePairs = 16;         // pairs of inputs that one instruction takes, or fours of codes
constexpr uint32_t kSlicePairs = 320;       // whose weights of a panel stay in the first-level cache
constexpr uint32_t kFetchAhead = 8192;      // bytes of weights, which come from memory one after the other
constexpr uint32_t kLine = 64;              // bytes
constexpr uint32_t kBlockLines = kBlock * kPanel * sizeof(uint16_t) / kLine;

// Pairs of inputs [first, first + count); `first` is a multiple of kTilePairs.
struct Slice {
  uint32_t first, count;
};

// Weights that are multiplied later, fetched a few lines at a time between products: all turns by a slice fetch as much
// as it has, one after the other and none in a burst, so that the memory is never idle and what is multiplied now gets
// through to the first-level cache meanwhile.
class Coming {
 public:
  // From `at` on; what comes after `end` begins at `next`. turn: of `turns` that take a slice of so many lines.
  Coming(const char* at, const char* end, const char* next, uint32_t lines, uint32_t turn, uint32_t turns)
      : at_(at), end_(end), next_(next), turns_(turns), due_(lines * turn % turns) {
    at_ += lines * turn / turns * kLine;
    if (at_ >= end_) at_ = next_ + (at_ - end_);
  }
  // This turn's share of so many lines.
  void fetch(uint32_t lines) {
    for (due_ += lines; due_ >= turns_; due_ -= turns_, at_ += kLine) {
      if (at_ == end_) at_ = next_;
      __builtin_prefetch(at_, 0, 2);
    }
  }

 private:
  const char *at_, *end_, *next_;
  uint32_t turns_, due_;  // due_: what is left of shares, in parts of a line
};

struct NothingComes {
  void fetch(uint32_t) {}
};

// Where a panel's weights come from, 16 pairs of inputs after 16 pairs.

// What lies in memory as it is multiplied, or was expanded before. Inputs are padded with zeros, panels end: the rest
// of the last pairs is zeros too.
template <class E, class Later>
class Ready {
 public:
  typedef E Element;

  Ready(const uint16_t* panel, Slice slice, Later later)
      : weights_(panel + size_t{slice.first} * 2 * kPanel), pairs_(slice.count), later_(later) {}
  const uint16_t* next() {
    const uint16_t* w = weights_;
    if (pairs_ >= kTilePairs) {
      weights_ += kBlockValues;
      pairs_ -= kTilePairs;
      return w;
    }
    memset(rest_, 0, sizeof rest_);
    memcpy(rest_, w, size_t{pairs_} * 4 * kPanel);
    return rest_;
  }
  void fetch(uint32_t lines) { later_.fetch(lines); }

 private:
  const uint16_t* weights_;
  uint32_t pairs_;
  Later later_;
  alignas(64) uint16_t rest_[kBlockValues];
};

// Blocks that are expanded one ahead of the one that is multiplied: the two use different parts of a core. `to`: where
// they are kept if they are needed again, else two blocks in turns.
template <uint32_t encoding, bool Kept>
class Expanding {
 public:
  typedef uint16_t Element;

  Expanding(const uint8_t* block, uint32_t blocks, uint16_t* to) : block_(block), blocks_(blocks), to_(to) {
    expand_next();
  }
  const uint16_t* next() {
    const uint16_t* w = ahead_;
    if (expanded_ != blocks_) expand_next();
    return w;
  }
  void fetch(uint32_t) {}  // expand() does

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

// Adds a block of rows by one panel to the sums in the registers. `Both`: it has more than 16 rows.
//
// A register is loaded for the next step right after the last product that takes it, and other products follow: a core
// whose other hyperthread is busy does not rename these registers, so that a load waits for products and they for it.
// Loads, products and fetches in turns, apart: 20 % faster there than all loads first, 2 to 9 % elsewhere.
template <bool Both, class Source>
inline void add_slice(const uint16_t* x, uint32_t stride, uint32_t pairs, Source& source) {
  typedef typename Source::Element Element;
  constexpr uint32_t kShare = kBlockLines / (Both ? 4 : 2);
  const size_t bytes = size_t{stride} * 2;
  const uint16_t* w = source.next();
  stream_tile4(x, bytes);
  load_tile6(w, 4 * kPanel);
  load_tile7(w + 32, 4 * kPanel);
  if (Both) stream_tile5(x + size_t{16} * stride, bytes);
  for (uint32_t k = kTilePairs; k < pairs; k += kTilePairs) {
    x += 2 * kTilePairs;
    w = source.next();
    dot_0(Element{});
    keep_apart();
    if (!Both) load_tile6(w, 4 * kPanel);
    dot_1(Element{});
    keep_apart();
    stream_tile4(x, bytes);
    source.fetch(kShare);
    if (Both) {
      dot_2(Element{});
      keep_apart();
      load_tile6(w, 4 * kPanel);
      source.fetch(kShare);
      dot_3(Element{});
      keep_apart();
    }
    load_tile7(w + 32, 4 * kPanel);
    source.fetch(kShare);
    if (!Both) continue;
    stream_tile5(x + size_t{16} * stride, bytes);
    source.fetch(kShare);
  }
  dot_0(Element{});
  dot_1(Element{});
  if (!Both) return;
  dot_2(Element{});
  dot_3(Element{});
}

template <uint32_t encoding, class F>
inline void add_expanding(const Linear* job, const Panels& panels, uint32_t p, uint32_t i, Slice slice, F&& add) {
  const uint32_t first = slice.first / kTilePairs, blocks = (slice.count + kTilePairs - 1) / kTilePairs;
  const uint8_t* block = panels.packed(p, i) + first * packed_block_size(encoding);
  if (job->rows > kBlockRows)
    return add(Expanding<encoding, true>(block, blocks, panels.kept(i) + size_t{first} * kBlockValues));
  alignas(64) uint16_t two[2 * kBlockValues];
  add(Expanding<encoding, false>(block, blocks, two));
}

// Of the i-th panel that belongs to p: for rows of the turn-th block of `turns` that take the slice one after the
// other.
inline void add_slice(const Linear* job, const Panels& panels, uint32_t p, uint32_t i, Slice slice, uint32_t row,
                      uint32_t rows, uint32_t turn, uint32_t turns, const void* following) {
  const uint16_t* x = static_cast<const uint16_t*>(job->at) + size_t{row} * job->stride + 2 * slice.first;
  const auto add = [&](auto&& source) {
    if (rows > 16) {
      add_slice<true>(x, job->stride, slice.count, source);
    } else {
      add_slice<false>(x, job->stride, slice.count, source);
    }
  };
  if (panels.ready()) {
    const uint16_t* weights = panels.weights(p, i);
    const char* start = reinterpret_cast<const char*>(weights + size_t{slice.first} * 2 * kPanel);
    const size_t size = size_t{slice.count} * 4 * kPanel;
    const char *end = start + size, *next = following == nullptr ? end : static_cast<const char*>(following);
    const auto lines = static_cast<uint32_t>(size / kLine);
    const Coming coming(start + (turns == 1 ? kFetchAhead : size), end, next, lines, turn, turns);
    if (job->weights.encoding == kPhIntegers) return add(Ready<int8_t, Coming>(weights, slice, coming));
    return add(Ready<uint16_t, Coming>(weights, slice, coming));
  }
  if (turn > 0) return add(Ready<uint16_t, NothingComes>(panels.kept(i), slice, {}));
  if (job->weights.encoding == kPhInt4) return add_expanding<kPhInt4>(job, panels, p, i, slice, add);
  add_expanding<kPhInt8>(job, panels, p, i, slice, add);
}

inline void clear_sums() {
  clear_tile0();
  clear_tile1();
  clear_tile2();
  clear_tile3();
}

// The sums of a block into memory [rows][stride].
inline void store_sums(float* to, uint32_t stride, uint32_t rows) {
  store_tile0(to, stride);
  store_tile1(to + 16, stride);
  if (rows <= 16) return;
  store_tile2(to + size_t{16} * stride, stride);
  store_tile3(to + size_t{16} * stride + 16, stride);
}

inline void load_sums(const float* from, uint32_t rows) {
  load_tile0(from, 4 * kPanel);
  load_tile1(from + 16, 4 * kPanel);
  if (rows <= 16) return;
  load_tile2(from + 16 * kPanel, 4 * kPanel);
  load_tile3(from + 16 * kPanel + 16, 4 * kPanel);
}

// Panels of a job by rows [start, end), at most kMostRows.
class Block {
 public:
  Block(const Linear* job, const Panels& panels, uint32_t start, uint32_t end)
      : job_(job), panels_(panels), start_(start), end_(end) {}

  // f(first row, rows) with their sums in the registers: of the i-th panel that belongs to p. A slice of it after the
  // other goes by all rows, so that it comes from the first-level cache; sums wait in memory meanwhile. last: no other
  // panel of the job comes after it.
  template <class F>
  void sum(uint32_t p, uint32_t i, bool last, F&& f) {
    const uint32_t pairs = job_->pairs;
    const uint32_t turns = (end_ - start_ + kBlockRows - 1) / kBlockRows;
    const uint32_t slices = turns > 1 ? (pairs + kSlicePairs - 1) / kSlicePairs : 1;
    const uint32_t size = ((pairs + slices - 1) / slices + kTilePairs - 1) / kTilePairs * kTilePairs;
    for (uint32_t first = 0; first < pairs; first += size) {
      const Slice slice = {first, pairs - first < size ? pairs - first : size};
      for (uint32_t row = start_; row < end_; row += kBlockRows) {
        const uint32_t rows = end_ - row < kBlockRows ? end_ - row : kBlockRows;
        shape_tiles(rows);
        float* sums = sums_ + size_t{row - start_} * kPanel;
        if (first == 0) {
          clear_sums();
        } else {
          load_sums(sums, rows);
        }
        add_slice(job_, panels_, p, i, slice, row, rows, (row - start_) / kBlockRows, turns,
                  last && first + size >= pairs ? job_->following : nullptr);
        if (first + size < pairs) {
          store_sums(sums, kPanel, rows);
        } else {
          f(row, rows);
        }
      }
    }
  }

 private:
  const Linear* job_;
  const Panels& panels_;
  uint32_t start_, end_;
  alignas(64) float sums_[kMostRows * kPanel];
};

// f(first row, Block): all rows of a job, as many at once as stay in the cache.
template <class F>
inline void over_rows(const Linear* job, const Panels& panels, F&& f) {
  const uint32_t fitting = kCachedBytes / (job->stride * 2) / kBlockRows * kBlockRows;
  const uint32_t size = fitting < kBlockRows ? kBlockRows : fitting > kMostRows ? kMostRows : fitting;
  for (uint32_t start = 0; start < job->rows; start += size) {
    Block block(job, panels, start, job->rows - start < size ? job->rows : start + size);
    f(start, block);
  }
  drop_tiles();
}

// A block's outputs [rows][kPanel] from its sums in the registers. panel: whose sums they are.
inline void store_outputs(const Linear* job, const uint8_t* panel, uint32_t row, uint32_t rows, float* to) {
  store_sums(to, kPanel, rows);
  if (job->weights.encoding != kPhIntegers) return;
  for (uint32_t r = 0; r < rows; ++r, to += kPanel)
    for (uint32_t n = 0; n < kPanel; n += W)
      store(to + n, scaled(reinterpret_cast<vi>(load(to + n)), job, row + r, head_of(panel), n));
}

template <Then then>
void linear_tiles(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  if (is_integer_blocks(job->weights.encoding)) return linear<Bf16Input, then>(job, first, last, expanded);
  const Panels panels(job, 1, expanded);
  over_rows(job, panels, [&](uint32_t, Block& block) {
    for (uint32_t p = first; p < last; ++p)
      block.sum(p, 0, p + 1 == last, [&](uint32_t row, uint32_t rows) {
        float* out = job->output + size_t{row} * job->output_stride + p * kPanel;
        if (then == Then::kStore && job->weights.encoding != kPhIntegers)
          return store_sums(out, job->output_stride, rows);
        alignas(64) float sums[kBlockRows * kPanel];
        store_outputs(job, panels.packed(p, 0), row, rows, sums);
        for (uint32_t r = 0; r < rows; ++r, out += job->output_stride) {
          for (uint32_t n = 0; n < kPanel; n += W) {
            const vf y = load(sums + r * kPanel + n);
            store(out + n, then == Then::kAdd ? load(out + n) + y : y);
          }
        }
      });
  });
  if (then == Then::kStore) add_bias(job, first, last);
}

void gate_up_tiles(const Linear* job, uint32_t first, uint32_t last, uint16_t* expanded) {
  if (is_integer_blocks(job->weights.encoding)) return linear_gate_up<Bf16Input>(job, first, last, expanded);
  const Panels panels(job, 2, expanded);
  alignas(64) float gates[kMostRows * kPanel];
  over_rows(job, panels, [&](uint32_t start, Block& block) {
    for (uint32_t p = first; p < last; ++p) {
      block.sum(p, 0, false, [&](uint32_t row, uint32_t rows) {
        store_outputs(job, panels.packed(p, 0), row, rows, gates + size_t{row - start} * kPanel);
      });
      block.sum(p, 1, p + 1 == last, [&](uint32_t row, uint32_t rows) {
        alignas(64) float ups[kBlockRows * kPanel];
        store_outputs(job, panels.packed(p, 1), row, rows, ups);
        const float *gate = gates + size_t{row - start} * kPanel, *up = ups;
        uint16_t* out = static_cast<uint16_t*>(job->product) + size_t{row} * job->output_stride + p * kPanel;
        const auto product = [&](uint32_t n) { return coarse_silu(load(gate + n)) * load(up + n); };
        for (uint32_t r = 0; r < rows; ++r, out += job->output_stride, gate += kPanel, up += kPanel)
          for (uint32_t n = 0; n < kPanel; n += 2 * W) store_both(out + n, product(n), product(n + W));
      });
    }
  });
}

}  // namespace
