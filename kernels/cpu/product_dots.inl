// Products of attention, by vectors of words: what product_tiles.inl does with tiles.
//
// Digits are stored kStoredShift more than they are (integers.inl); what that adds to a sum is taken off again.

namespace {

// What tiles want now and then.
inline void shape_tiles(uint32_t) {}
inline void stay_awake() {}

constexpr uint32_t kWordRows = 8;  // that are multiplied between two fetches

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

// R rows and 32 columns, whose words begin at `low` and at `high`; `words` rows of them, a multiple of kWordRows.
template <int R, class Element>
__attribute__((noinline)) void product_rows(const Element* a, uint32_t a_stride, const Element* low,
                                            const Element* high, uint32_t stride, Ahead<Element>& ahead, float* c,
                                            uint32_t c_stride, uint32_t words) {
  typedef Dots<Element> Dot;
  constexpr uint32_t E = kWord<Element>;
  constexpr bool kShifted = sizeof(Element) == 1 && kStoredShift != 0;
  typename Dot::Sum sums[R][2], totals[2] = {};
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = typename Dot::Sum{};
  for (uint32_t some = 0; some < words; some += kWordRows) {
    ahead.fetch_some();
    for (uint32_t w = 0; w < kWordRows; ++w, a += E, low += size_t{stride} * E, high += size_t{stride} * E) {
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

template <class Element, class At>
inline void product(const Element* a, uint32_t a_stride, uint32_t stride, At&& at, Ahead<Element>& ahead, float* c,
                    uint32_t c_stride, uint32_t rows, uint32_t n, uint32_t k) {
  for (uint32_t i = 0; i < n; i += 2 * W)
    in_blocks<kTileRows>(rows, [&](uint32_t row, auto count) {
      product_rows<decltype(count)::value>(a + size_t{row} * a_stride, a_stride, at(i, 0), at(i + W, 0), stride, ahead,
                                           c + size_t{row} * c_stride + i, c_stride, k / kWord<Element>);
    });
}

}  // namespace
