// What the instructions of a whole warp compute, in the layouts of the PTX manual.

#include <cstdint>
#include <cstring>

#include "engine.h"

namespace shim {
namespace {

using Row = float __attribute__((vector_size(32)));  // 8 columns

template <Collective kKind>
float widen(unsigned bits) {
  float value;
  if constexpr (kKind == Collective::kMmaBf16) {
    const uint32_t wide = bits << 16;
    memcpy(&value, &wide, 4);
  } else {
    const auto narrow = static_cast<uint16_t>(bits);
    _Float16 half;
    memcpy(&half, &narrow, 2);
    value = static_cast<float>(half);
  }
  return value;
}

// d[16, 8] += a[16, 16] b[16, 8]: float sums, columns of a ascending, one rounding for each product and sum.
template <Collective kKind>
void multiply(Operand* const (&lanes)[32]) {
  float a[16][16];
  Row b[16], d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4 * 2;
    const Operand& operand = *lanes[lane];
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = t + i / 2 * 8;
      a[row][column] = widen<kKind>(operand.a[i] & 0xFFFF);
      a[row][column + 1] = widen<kKind>(operand.a[i] >> 16);
      d[g + i / 2 * 8][t + i % 2] = operand.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[t + i * 8][g] = widen<kKind>(operand.b[i] & 0xFFFF);
      b[t + i * 8 + 1][g] = widen<kKind>(operand.b[i] >> 16);
    }
  }
  for (int row = 0; row < 16; ++row) {
    Row sum = d[row];
    for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
    d[row] = sum;
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void load_matrices(Operand* const (&lanes)[32]) {
  const bool transposed = lanes[0]->source < 0;
  const int matrices = transposed ? -lanes[0]->source : lanes[0]->source;
  for (int m = 0; m < matrices; ++m) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* address = lanes[m * 8 + row]->address;
      if (reinterpret_cast<uintptr_t>(address) & 15) fail("ldmatrix: the row at %p is no multiple of 16", address);
      memcpy(elements[row], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const uint16_t low = transposed ? elements[t][g] : elements[g][t];
      const uint16_t high = transposed ? elements[t + 1][g] : elements[g][t + 1];
      lanes[lane]->registers[m] = low | static_cast<unsigned>(high) << 16;
    }
  }
}

void shuffle(Operand* const (&lanes)[32], unsigned present) {
  unsigned values[32];
  memset(values, kPoison, sizeof values);
  for (int lane = 0; lane < 32; ++lane)
    if (present >> lane & 1) values[lane] = lanes[lane]->value;
  for (int lane = 0; lane < 32; ++lane)
    if (present >> lane & 1) lanes[lane]->value = values[lanes[lane]->source & 31];
}

void vote(Operand* const (&lanes)[32], unsigned present) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (present >> lane & 1 && lanes[lane]->value) votes |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (present >> lane & 1) lanes[lane]->value = votes;
}

}  // namespace

void complete(Operand* const (&lanes)[32], unsigned present) {
  switch (lanes[__builtin_ctz(present)]->kind) {
    case Collective::kSync:
      return;
    case Collective::kBallot:
      return vote(lanes, present);
    case Collective::kShuffle:
      return shuffle(lanes, present);
    case Collective::kLdmatrix:
      return load_matrices(lanes);
    case Collective::kMmaBf16:
      return multiply<Collective::kMmaBf16>(lanes);
    case Collective::kMmaF16:
      return multiply<Collective::kMmaF16>(lanes);
  }
}

}  // namespace shim
