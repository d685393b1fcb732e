// Products of attention, by vectors of words: what product_tiles.inl does with tiles.
//
// Codes that have signs are stored kStoredShift more than they are (codes.inl); what that adds to a sum is taken off
// again.

namespace {

// What tiles want now and then.
inline void shape_tiles(uint32_t) {}
inline void stay_awake() {}

// So many rows take values from pages, run by run. More have them side by side: pages may lie so that their runs drive
// each other out of the first-level cache.
constexpr uint32_t kRowsFromPages = kTileRows;

// The sums of products of words of such elements.
template <class Element>
struct Dots {
  typedef vf Sum;
  static vf add(vf sum, uint32_t a, vu b) { return bfloat16_dot(sum, a, b); }
  static vf result(vf sum, vf) { return sum; }
};
template <>
struct Dots<int8_t> {
  typedef vi Sum;
  static vi add(vi sum, uint32_t a, vu b) { return integer_dot(sum, a, b); }
  // totals: sums of the products of 1 and b.
  static vf result(vi sum, vi totals) { return reinterpret_cast<vf>(sum - totals * kStoredShift); }
};

// R rows and columns [i, i + 32).
template <bool Signed, int R, class Element, class At>
__attribute__((noinline)) void product_rows(const Element* a, uint32_t a_stride, uint32_t stride, const At& at,
                                            Ahead<Element>& ahead, float* c, uint32_t c_stride, uint32_t i,
                                            uint32_t k) {
  typedef Dots<Element> Dot;
  constexpr uint32_t E = kWord<Element>, kRows = kRun / E;
  constexpr bool kShifted = Signed && sizeof(Element) == 1 && kStoredShift != 0;
  typename Dot::Sum sums[R][2], totals[2] = {};
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = typename Dot::Sum{};
  for (uint32_t j = 0; j < k; j += kRun) {
    ahead.fetch(2 * kRows);
    const Element *low = at(i, j), *high = at(i + W, j);
    for (uint32_t w = 0; w < kRows; ++w, a += E, low += size_t{stride} * E, high += size_t{stride} * E) {
      const vu left = load_words(low), right = load_words(high);
      for (int r = 0; r < R; ++r) {
        uint32_t word;
        memcpy(&word, a + size_t(r) * a_stride, 4);
        sums[r][0] = Dot::add(sums[r][0], word, left);
        sums[r][1] = Dot::add(sums[r][1], word, right);
      }
      if (!kShifted) continue;
      totals[0] = Dot::add(totals[0], 0x01010101, left);
      totals[1] = Dot::add(totals[1], 0x01010101, right);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(c + r * c_stride + v * W, Dot::result(sums[r][v], totals[v]));
}

template <bool Signed, class Element, class At>
inline void product(const Element* a, uint32_t a_stride, uint32_t stride, const At& at, Ahead<Element>& ahead, float* c,
                    uint32_t c_stride, uint32_t rows, uint32_t n, uint32_t k) {
  for (uint32_t i = 0; i < n; i += 2 * W)
    in_blocks<kTileRows>(rows, [&](uint32_t row, auto count) {
      product_rows<Signed, decltype(count)::value>(a + size_t{row} * a_stride, a_stride, stride, at, ahead,
                                                   c + size_t{row} * c_stride + i, c_stride, i, k);
    });
}

}  // namespace
