// The eight tile registers of AMX as this project uses them: a block of sums, 2 x 2 tiles, of two tiles of inputs by
// two of weights.
//
//              weights 6   weights 7
//   inputs 4     sums 0      sums 1        rows 0 to 15
//   inputs 5     sums 2      sums 3        rows 16 to 31
//
// A register has up to 16 rows of 64 bytes. How many rows the inputs and sums have is set by `shape_tiles`.

#ifndef PAGEHOLD_EMULATE
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t kTileRow = 64;  // bytes

#ifndef PAGEHOLD_EMULATE

struct alignas(64) TileShape {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row
  uint8_t rows[16];
};

thread_local uint32_t t_shaped;  // rows; 0: the registers are idle

// rows: of the block, 1 to 32. What the tiles hold is undefined.
inline void shape_tiles(uint32_t rows) {
  if (t_shaped == rows) return;
  t_shaped = rows;
  const uint8_t low = rows < 16 ? rows : 16, high = rows > 16 ? rows - 16 : 1;
  TileShape shape{};
  shape.palette = 1;
  for (uint32_t t = 0; t < 8; ++t) shape.bytes[t] = kTileRow;
  const uint8_t counts[8] = {low, low, high, high, low, high, 16, 16};
  memcpy(shape.rows, counts, sizeof counts);
  // GCC believes that only the first bytes of the shape are read, and may drop what is written behind them.
  __asm__ __volatile__("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
}

// The registers are idle again: nothing of them is saved when the thread changes.
inline void drop_tiles() {
  if (t_shaped == 0) return;
  t_shaped = 0;
  _tile_release();
}

// What is called now and then by work between products, for the multiplier of tiles falls asleep when it had nothing to
// do for 0.3 us and needs as long to wake up (650 and 570 ticks of 2.1 GHz on a Xeon of model 207; only a product keeps
// it awake). The registers are shaped, and hold no sums: sums 3 are lost.
inline void stay_awake() { _tile_dpbf16ps(3, 5, 7); }

// What is put between two instructions on tiles where no other work is: on a core whose other hyperthread is busy,
// those that follow each other at once wait for each other (10 % of a linear of 512 rows, and nothing lost elsewhere).
inline void keep_apart() { __asm__ __volatile__(".rept 10; nop; .endr"); }

// The intrinsics want literal numbers. What is written before a load reaches it: the compiler does not know that a
// load reads memory.
#define LOAD_TILE(T)                                         \
  inline void load_tile##T(const void* from, size_t bytes) { \
    __asm__ __volatile__("" ::: "memory");                   \
    _tile_loadd(T, from, bytes);                             \
  }
LOAD_TILE(0)
LOAD_TILE(1)
LOAD_TILE(2)
LOAD_TILE(3)
LOAD_TILE(4)
LOAD_TILE(5)
LOAD_TILE(6)
LOAD_TILE(7)
#undef LOAD_TILE

// What is not needed again soon, so that it does not drive out of the first-level cache what is.
#define STREAM_TILE(T)                                         \
  inline void stream_tile##T(const void* from, size_t bytes) { \
    __asm__ __volatile__("" ::: "memory");                     \
    _tile_stream_loadd(T, from, bytes);                        \
  }
STREAM_TILE(4)
STREAM_TILE(5)
#undef STREAM_TILE

#define SUM_TILE(T, A, B)                                     \
  inline void clear_tile##T() { _tile_zero(T); }              \
  inline void dot_bfloat16_##T() { _tile_dpbf16ps(T, A, B); } \
  inline void dot_int8_##T() { _tile_dpbssd(T, A, B); }       \
  inline void store_tile##T(float* to, size_t stride) { _tile_stored(T, to, 4 * stride); }
SUM_TILE(0, 4, 6)
SUM_TILE(1, 4, 7)
SUM_TILE(2, 5, 6)
SUM_TILE(3, 5, 7)
#undef SUM_TILE

#else

struct Tiles {
  uint32_t rows[8];
  uint8_t at[8][16][kTileRow];
};
thread_local Tiles t_tiles;

inline void shape_tiles(uint32_t rows) {
  const uint32_t low = rows < 16 ? rows : 16, high = rows > 16 ? rows - 16 : 1;
  const uint32_t counts[8] = {low, low, high, high, low, high, 16, 16};
  memset(&t_tiles, 0, sizeof t_tiles);
  memcpy(t_tiles.rows, counts, sizeof counts);
}

inline void drop_tiles() { memset(&t_tiles, 0, sizeof t_tiles); }

inline void stay_awake() {}
inline void keep_apart() {}

inline void load_tile(uint32_t t, const void* from, size_t bytes) {
  for (uint32_t r = 0; r < t_tiles.rows[t]; ++r)
    memcpy(t_tiles.at[t][r], static_cast<const uint8_t*>(from) + r * bytes, kTileRow);
}

inline float widen(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// As TDPBF16PS: the products of even and of odd inputs are summed apart, then both are added to the sum.
inline void dot_bfloat16(uint32_t t, uint32_t a, uint32_t b) {
  for (uint32_t r = 0; r < t_tiles.rows[t]; ++r) {
    uint16_t x[32];
    float sums[16];
    memcpy(x, t_tiles.at[a][r], kTileRow);
    memcpy(sums, t_tiles.at[t][r], kTileRow);
    for (uint32_t n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (uint32_t k = 0; k < 16; ++k) {
        uint16_t w[2];
        memcpy(w, t_tiles.at[b][k] + 4 * n, 4);
        even += widen(x[2 * k]) * widen(w[0]);
        odd += widen(x[2 * k + 1]) * widen(w[1]);
      }
      sums[n] += even + odd;
    }
    memcpy(t_tiles.at[t][r], sums, kTileRow);
  }
}

// As TDPBSSD: int32 sums of products of four int8.
inline void dot_int8(uint32_t t, uint32_t a, uint32_t b) {
  for (uint32_t r = 0; r < t_tiles.rows[t]; ++r) {
    int8_t x[kTileRow];
    int32_t sums[16];
    memcpy(x, t_tiles.at[a][r], kTileRow);
    memcpy(sums, t_tiles.at[t][r], kTileRow);
    for (uint32_t n = 0; n < 16; ++n) {
      for (uint32_t k = 0; k < 16; ++k) {
        int8_t w[4];
        memcpy(w, t_tiles.at[b][k] + 4 * n, 4);
        for (uint32_t i = 0; i < 4; ++i) sums[n] += x[4 * k + i] * w[i];
      }
    }
    memcpy(t_tiles.at[t][r], sums, kTileRow);
  }
}

#define LOAD_TILE(T) \
  inline void load_tile##T(const void* from, size_t bytes) { load_tile(T, from, bytes); }
LOAD_TILE(0)
LOAD_TILE(1)
LOAD_TILE(2)
LOAD_TILE(3)
LOAD_TILE(4)
LOAD_TILE(5)
LOAD_TILE(6)
LOAD_TILE(7)
#undef LOAD_TILE
inline void stream_tile4(const void* from, size_t bytes) { load_tile4(from, bytes); }
inline void stream_tile5(const void* from, size_t bytes) { load_tile5(from, bytes); }

#define SUM_TILE(T, A, B)                                                                               \
  inline void clear_tile##T() { memset(t_tiles.at[T], 0, sizeof t_tiles.at[T]); }                       \
  inline void dot_bfloat16_##T() { dot_bfloat16(T, A, B); }                                             \
  inline void dot_int8_##T() { dot_int8(T, A, B); }                                                     \
  inline void store_tile##T(float* to, size_t stride) {                                                 \
    for (uint32_t r = 0; r < t_tiles.rows[T]; ++r) memcpy(to + r * stride, t_tiles.at[T][r], kTileRow); \
  }
SUM_TILE(0, 4, 6)
SUM_TILE(1, 4, 7)
SUM_TILE(2, 5, 6)
SUM_TILE(3, 5, 7)
#undef SUM_TILE

#endif

// By what is multiplied: bfloat16, or int8.
inline void dot_0(uint16_t) { dot_bfloat16_0(); }
inline void dot_1(uint16_t) { dot_bfloat16_1(); }
inline void dot_2(uint16_t) { dot_bfloat16_2(); }
inline void dot_3(uint16_t) { dot_bfloat16_3(); }
inline void dot_0(int8_t) { dot_int8_0(); }
inline void dot_1(int8_t) { dot_int8_1(); }
inline void dot_2(int8_t) { dot_int8_2(); }
inline void dot_3(int8_t) { dot_int8_3(); }

}  // namespace
