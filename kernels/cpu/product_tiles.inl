// Products of attention, by tiles.
//
// c [rows][c_stride] = a [rows][a_stride] b, columns [0, n); n and k are multiples of 32, rows at most 32. Of int8 a
// word holds four elements, k is a multiple of 64, and c holds the bits of int32. at(i, j): where the words of b for
// columns [i, i + 16) and for elements from j on lie, a multiple of a run; from one row of words to the next it is
// `stride` words. Signed: codes of `a` have signs.

namespace {

// A tile takes more positions than a run has.
constexpr uint32_t kRowsFromPages = 0;

template <bool Signed, class Element, class At>
inline void product(const Element* a, uint32_t a_stride, uint32_t stride, const At& at, Ahead<Element>& ahead, float* c,
                    uint32_t c_stride, uint32_t rows, uint32_t n, uint32_t k) {
  constexpr uint32_t row = kTileRow / sizeof(Element);
  const bool both = rows > 16;
  const auto apart = [&] {
    if (both) keep_apart();  // few rows wait for memory, not for each other
  };
  for (uint32_t i = 0; i < n; i += 32) {
    clear_tile0();
    clear_tile1();
    clear_tile2();
    clear_tile3();
    for (uint32_t j = 0; j < k; j += row) {
      load_tile6(at(i, j), size_t{stride} * 4);
      apart();
      load_tile7(at(i + 16, j), size_t{stride} * 4);
      ahead.fetch(kFetched);
      load_tile4(a + j, a_stride * sizeof(Element));
      apart();
      dot_0(Element{});
      apart();
      dot_1(Element{});
      if (!both) continue;
      apart();
      load_tile5(a + size_t{16} * a_stride + j, a_stride * sizeof(Element));
      apart();
      dot_2(Element{});
      apart();
      dot_3(Element{});
      apart();
    }
    store_tile0(c + i, c_stride);
    store_tile1(c + i + 16, c_stride);
    if (!both) continue;
    store_tile2(c + size_t{16} * c_stride + i, c_stride);
    store_tile3(c + size_t{16} * c_stride + i + 16, c_stride);
  }
}

}  // namespace
