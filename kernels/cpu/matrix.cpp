#include "matrix.h"

#include <string.h>

#include "isa.h"

namespace {

float half_to_float(uint16_t half) {
  const uint32_t bits = (half & 0x7fffu) << 13;
  float x;
  memcpy(&x, &bits, 4);
  x *= 0x1p112f;  // the difference of the exponents' biases; right for subnormals too
  return half & 0x8000u ? -x : x;
}

float round_to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

// The code of output n and input k within a block.
uint32_t code4(const uint8_t* codes, uint32_t n, uint32_t k) {
  uint32_t word;
  memcpy(&word, codes + (((n / 16 * 2 + k / 16) * 2 + n / 8 % 2) * 16 + n % 8 * 2 + k % 2) * 4, 4);
  return word >> (k % 16 / 2 * 4) & 15;
}

int32_t code8(const uint8_t* codes, uint32_t n, uint32_t k) {
  return static_cast<int8_t>(codes[(((n / 16 * 4 + k / 8) * 2 + n / 8 % 2) * 16 + n % 8 * 2 + k % 2) * 4 + k % 8 / 2]);
}

int32_t code_at(uint32_t encoding, const uint8_t* block, uint32_t n, uint32_t k) {
  const uint8_t* codes = block + (has_least(encoding) ? 4 : 2) * kPanel;
  switch (encoding) {  // the orders of blocks.py and integer_blocks.py
    case kPhInt4:
      return static_cast<int32_t>(code4(codes, n, k));
    case kPhInt8:
      return code8(codes, n, k);
    case kPhIntegerBlocks4:
      return codes[(k / 8 * kPanel + n) * 4 + k % 4] >> k % 8 / 4 * 4 & 15;
    default:
      return codes[(k / 4 * kPanel + n) * 4 + k % 4] - 128;
  }
}

}  // namespace

float bfloat16_to_float(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

void read_row(const PhMatrix& matrix, uint32_t columns, uint32_t row, float* out) {
  const uint32_t together = inputs_in_word(matrix.encoding);
  const uint32_t pairs = (columns + together - 1) / together, n = row % kPanel;
  const uint8_t* panel = static_cast<const uint8_t*>(matrix.panels) + row / kPanel * panel_size(matrix.encoding, pairs);
  if (matrix.encoding == kPhBfloat16) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(panel);
    for (uint32_t k = 0; k < columns; ++k) out[k] = bfloat16_to_float(values[k / 2 * 2 * kPanel + 2 * n + k % 2]);
    return;
  }
  if (matrix.encoding == kPhIntegers) {
    float scale;
    memcpy(&scale, panel + 4 * n, 4);
    const int8_t* codes = reinterpret_cast<const int8_t*>(panel) + kPanelHead;
    for (uint32_t k = 0; k < columns; ++k)
      out[k] = round_to_bfloat16(scale * static_cast<float>(codes[k / 4 * 4 * kPanel + 4 * n + k % 4]));
    return;
  }
  for (uint32_t k = 0; k < columns; ++k) {
    const uint8_t* block = panel + k / kBlock * packed_block_size(matrix.encoding);
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(block);
    const float scale = half_to_float(factors[n]);
    const float least = has_least(matrix.encoding) ? half_to_float(factors[kPanel + n]) : 0.0f;
    out[k] = round_to_bfloat16(static_cast<float>(code_at(matrix.encoding, block, n, k % kBlock)) * scale + least);
  }
}
