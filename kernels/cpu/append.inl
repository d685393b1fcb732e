// Keys and values of new positions: norm, rotary, and into the page.

namespace {

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

// Of a query's row in place: of a kv head's queries and, where it is written, its key.
inline void turn(const Attention* job, uint32_t kv_head, const Query& query) {
  const PhModel* m = job->model;
  const PhLayer* layer = m->layer + job->layer;
  const uint32_t d = m->head_dim, half = d / 2, group = m->heads / m->kv_heads;
  const float* cosine = m->rope_cos + size_t{query.position} * half;
  const float* sine = m->rope_sin + size_t{query.position} * half;
  const auto turn_head = [&](uint32_t head, const float* norm) {
    float* x = query.projected + size_t{head} * d;
    head_norm(x, norm, d, m->rms_norm_eps);
    rotate(x, cosine, sine, half);
  };
  for (uint32_t g = 0; g < group; ++g) turn_head(kv_head * group + g, layer->q_norm);
  if (query.write) turn_head(m->heads + kv_head, layer->k_norm);
}

template <class Kv>
inline void append_as(const Attention* job, uint32_t kv_head) {
  constexpr uint32_t E = kWord<Kv>;
  const PhModel* m = job->model;
  const uint32_t d = m->head_dim, page_size = job->pool->page_size;
  for (uint32_t q = 0, together; q < job->count; q += together) {
    const Query& query = job->queries[q];
    // Positions that follow on each other, up to the end of a word of values.
    const auto follows = [&](uint32_t i) { return job->queries[q + i].position == query.position + i; };
    together = 1;
    if (query.position % E == 0 && q + E <= job->count && query.write && follows(E - 1)) together = E;
    for (uint32_t i = 0; i < together; ++i) turn(job, kv_head, job->queries[q + i]);
    if (!query.write) continue;
    const uint32_t slot = query.position % page_size;
    const uint64_t entry = job->row[query.position / page_size];
    const auto projected = [&](uint32_t i, uint32_t head) { return job->queries[q + i].projected + size_t{head} * d; };
    const uint32_t key = m->heads + kv_head, value = key + m->kv_heads;
    for (uint32_t i = 0; i < together; ++i)
      put_key<Kv>(plane(job, entry, 0, kv_head), page_size, slot + i, projected(i, key), d);
    const size_t stride = together == 1 ? 0 : static_cast<size_t>(projected(1, 0) - projected(0, 0));
    put_values<Kv>(plane(job, entry, 1, kv_head), page_size, slot, projected(0, value), stride, together, d);
  }
}

void append(const Attention* job) {
  const uint32_t type = job->model->kv_type;
  const auto use = type == kPhKvInt8       ? append_as<int8_t>
                   : type == kPhKvBfloat16 ? append_as<uint16_t>
                                           : append_as<float>;
  for (uint32_t head = 0; head < job->kv_heads; ++head) use(job, job->kv_head + head);
}

}  // namespace
