// What lies between the QKV product and attention, in one launch: the norms of Q and K (Qwen3), the rotary embedding,
// the conversion of K and V to the pages' type, and their scatter into the pages.
//
// A group of LANES threads has one head of one token. Each of them has eight neighbouring elements of the head's lower
// half and the eight they are rotated with in the upper half: accesses of 16 bytes (8 for one-byte pages), and a warp
// covers whole lines. A group is a power of two, so that the sum of the norm stays within it; of heads that are no
// power of two some lanes are idle.

#include "packet.cuh"

#ifndef DTYPE  // of qkv and q_out
#define DTYPE bf16
#endif
#ifndef KV_DTYPE  // of the pages
#define KV_DTYPE bf16
#endif
#ifndef HEADS
#define HEADS 32
#endif
#ifndef KV_HEADS
#define KV_HEADS 8
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef PAGE_SIZE
#define PAGE_SIZE 16
#endif
#ifndef QK_NORM
#define QK_NORM 0
#endif

constexpr int THREADS = 128;
constexpr int HALF = HEAD_DIM / 2;
constexpr int WIDTH = 8;
constexpr int USED_LANES = HALF / WIDTH;
constexpr int LANES = USED_LANES <= 4 ? 4 : USED_LANES <= 8 ? 8 : USED_LANES <= 16 ? 16 : 32;
constexpr int ROWS = HEADS + 2 * KV_HEADS;  // heads of a token: Q, K, V

static_assert(HALF % WIDTH == 0 && USED_LANES <= 32);

// As the norm of `norm.cu`, over the head that the group holds. Idle lanes hold zeros.
DEVICE void normalise(float (&low)[WIDTH], float (&high)[WIDTH], const float* weight, float epsilon) {
  float squares = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) squares += low[i] * low[i] + high[i] * high[i];
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) squares += shuffle_xor(squares, distance);
  if (weight == nullptr) return;
  const float factor = 1.0f / sqrt_accurate(squares / HEAD_DIM + epsilon);
  float low_weight[WIDTH], high_weight[WIDTH];
  load(low_weight, weight);
  load(high_weight, weight + HALF);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) low[i] *= factor, high[i] *= factor;
  round_to<DTYPE>(low);
  round_to<DTYPE>(high);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) low[i] *= low_weight[i], high[i] *= high_weight[i];
  round_to<DTYPE>(low);
  round_to<DTYPE>(high);
}

DEVICE void rotate(float (&low)[WIDTH], float (&high)[WIDTH], const float* cosines, const float* sines) {
  float cosine[WIDTH], sine[WIDTH];
  load(cosine, cosines);
  load(sine, sines);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    const float first = low[i], second = high[i];
    low[i] = first * cosine[i] - second * sine[i];
    high[i] = second * cosine[i] + first * sine[i];
  }
}

// qkv: [tokens, ROWS, HEAD_DIM]. q_out: [tokens, HEADS, HEAD_DIM]. cosines, sines: [positions, HALF].
// positions: [tokens]. slots: [tokens], page * PAGE_SIZE + slot, or negative: K and V are not written.
// pool: the layer's part of page 0; strides in bytes. Scales: [KV_HEADS] or null for ones. Norms: [HEAD_DIM] or null.
KERNEL(rope_append, THREADS, 1)
(const DTYPE* __restrict__ qkv, DTYPE* __restrict__ q_out, const float* __restrict__ cosines,
 const float* __restrict__ sines, const i32* __restrict__ positions, const i64* __restrict__ slots, u8* pool,
 i64 page_stride, i64 half_stride, const float* __restrict__ k_scale, const float* __restrict__ v_scale,
 const float* __restrict__ q_norm, const float* __restrict__ k_norm, float epsilon, i32 tokens) {
  const i64 group = (static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x) / LANES;
  const i64 token = group / ROWS;
  const int row = static_cast<int>(group - token * ROWS);
  const int column = static_cast<int>(threadIdx.x) % LANES * WIDTH;
  const bool used = token < tokens && column < HALF;
  const bool query = row < HEADS, value = row >= HEADS + KV_HEADS;

  // All that the memory is asked for first is asked for at once.
  float low[WIDTH] = {}, high[WIDTH] = {};
  i64 rotation = 0, slot = -1;
  if (used) {
    const DTYPE* head = qkv + group * HEAD_DIM + column;
    load(low, head);
    load(high, head + HALF);
    rotation = static_cast<i64>(positions[token]) * HALF + column;
    if (!query) slot = slots[token];
  }
  if constexpr (QK_NORM) {  // every lane of the warp takes part in the shuffles
    const float* weight = query ? q_norm : k_norm;
    normalise(low, high, used && !value ? weight + column : nullptr, epsilon);
  }
  if (!used) return;
  if (!value) rotate(low, high, cosines + rotation, sines + rotation);
  if (query) {
    DTYPE* head = q_out + (token * HEADS + row) * HEAD_DIM + column;
    store(head, low);
    store(head + HALF, high);
    return;
  }

  if (slot < 0) return;
  const int kv_head = value ? row - HEADS - KV_HEADS : row - HEADS;
  const float* scale = value ? v_scale : k_scale;
  if (scale != nullptr) {
    const float inverse = 1.0f / scale[kv_head];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) low[i] *= inverse, high[i] *= inverse;
  }
  u8* block = pool + slot / PAGE_SIZE * page_stride + (value ? half_stride : 0);
  KV_DTYPE* head = reinterpret_cast<KV_DTYPE*>(block) + (kv_head * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM + column;
  store(head, low);
  store(head + HALF, high);
}
