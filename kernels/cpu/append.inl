// Keys and values of new positions: norm, rotary, and into the page.

namespace {

// Bytes.
inline size_t slot_size(const PhModel* m) {
  return m->kv_type == kPhKvInt8 ? m->head_dim + sizeof(float)
                                 : size_t{m->head_dim} * (m->kv_type == kPhKvBfloat16 ? 2 : 4);
}

// First of the slots [page_size] for one page, layer, half (0: K, 1: V) and head.
inline uint8_t* slots(const Attention* job, uint64_t entry, uint32_t half) {
  const PhModel* m = job->model;
  const size_t head = job->pool->page_size * slot_size(m);
  const size_t page = static_cast<uint32_t>(entry);
  return job->pool->base + (((page * m->layers + job->layer) * 2 + half) * m->kv_heads + job->kv_head) * head;
}

inline void rotate(float* x, const float* cosine, const float* sine, uint32_t half) {
  over(half, [&](uint32_t i, auto as) {
    const auto low = load_as(as, x + i), high = load_as(as, x + half + i);
    const auto c = load_as(as, cosine + i), s = load_as(as, sine + i);
    store(x + i, low * c - high * s);
    store(x + half + i, high * c + low * s);
  });
}

inline void head_norm(float* x, const float* weight, uint32_t n, float eps) {
  if (weight == nullptr) return;
  const float scale = inverse_rms(x, n, eps);
  over(n, [&](uint32_t i, auto as) { store(x + i, load_as(as, weight + i) * (load_as(as, x + i) * scale)); });
}

void append(const Attention* job, const Query* query) {
  const PhModel* m = job->model;
  const uint32_t position = query->position;
  const PhLayer* layer = m->layer + job->layer;
  const uint32_t d = m->head_dim, half = d / 2, group = m->heads / m->kv_heads;
  float* row = query->projected;
  const float* cosine = m->rope_cos + size_t{position} * half;
  const float* sine = m->rope_sin + size_t{position} * half;
  for (uint32_t g = 0; g < group; ++g) {
    float* q = row + size_t{job->kv_head * group + g} * d;
    head_norm(q, layer->q_norm, d, m->rms_norm_eps);
    rotate(q, cosine, sine, half);
  }
  if (!query->write) return;
  float* k = row + size_t{m->heads + job->kv_head} * d;
  const float* v = row + size_t{m->heads + m->kv_heads + job->kv_head} * d;
  head_norm(k, layer->k_norm, d, m->rms_norm_eps);
  rotate(k, cosine, sine, half);
  const uint32_t page_size = job->pool->page_size;
  const uint64_t entry = job->row[position / page_size];
  const float* sources[2] = {k, v};
  for (uint32_t which = 0; which < 2; ++which) {
    uint8_t* slot = slots(job, entry, which) + position % page_size * slot_size(m);
    if (m->kv_type == kPhKvInt8) {
      store_int8(sources[which], d, slot);
    } else if (m->kv_type == kPhKvBfloat16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(slot);
      over(d, [&](uint32_t i, auto as) { store(out + i, load_as(as, sources[which] + i)); });
    } else {
      memcpy(slot, sources[which], size_t{d} * 4);
    }
  }
}

}  // namespace
