// Attention over paged keys and values.
//
// A sequence's positions are reduced in tiles of 64 counted from 0, in order, the same for a decode and for a
// prefill. Within a tile: a score sums its products in W lanes, then the lanes in one fixed tree; a
// weighted sum adds position after position, in a single accumulator. Which rows (a query of one head) share
// the loads changes nothing of that, and a position that a row does not see has weight 0, which adds nothing.
//
// v2: three rows share the loads, pages are read where they lie, lanes are added up for many scores at once, the next
// tile is fetched early. 2.7 to 3.0 times as fast as v1, decode and prefill (AVX2; `python -m tests.kernels.bench`).

namespace {

// --- sums of lanes for many vectors at once ---

// Vectors of segments of G lanes, each segment a partial sum: adds the halves of every segment; those of x and y
// alternate in the result, in segments of half the size.
template <uint32_t G, int... I>
inline vf fold(vf x, vf y, std::integer_sequence<int, I...>) {
  constexpr int half = G / 2;
  const vf low = SHUFFLE(x, y, (I / int(G) * int(G) + I % half + (I % int(G) < half ? 0 : W))...);
  const vf high = SHUFFLE(x, y, (I / int(G) * int(G) + I % half + half + (I % int(G) < half ? 0 : W))...);
  return low + high;
}

// v[0..N) into v[0]: lanes of segment i, of G / N lanes, belong to vector i.
template <uint32_t G, int N>
inline void fold_all(vf* v) {
  if constexpr (N > 1) {
    for (int i = 0; i < N / 2; ++i) v[i] = fold<G>(v[i], v[i + N / 2], std::make_integer_sequence<int, W>{});
    fold_all<G / 2, N / 2>(v);
  }
}

// --- one tile ---

constexpr int kAttentionRows = W == 16 ? 6 : 3;  // rows that share loads: with 4 vectors each, 24 or 12 accumulators
constexpr uint32_t kTogether = 4;                // positions scored at once

// Where the keys and values of a tile lie: in pages, or converted to float; zeros where nobody looks.
template <class Kv>
struct Tile {
  const Kv* keys[kTile];
  const Kv* values[kTile];
};

// The softmax of one row so far.
struct Running {
  float most, total;
};

// A row's part of a tile: sees positions [begin, end), and scales what it had by `scale`.
struct Seen {
  uint32_t begin, end;
  float scale;
};

// Scores of W positions from `first` on for R rows. queries: [R][padded].
template <int R, class Kv>
inline void score(const Tile<Kv>& tile, const Tile<Kv>& next, uint32_t first, const float* queries, uint32_t d,
                  uint32_t padded, float (*scores)[kTile]) {
  constexpr uint32_t groups = W / kTogether;
  vf sums[R][groups];
  for (uint32_t group = 0; group < groups; ++group) {
    vf acc[R][kTogether];
    for (int r = 0; r < R; ++r)
      for (uint32_t t = 0; t < kTogether; ++t) acc[r][t] = vf{};
    const Kv* const* keys = tile.keys + first + group;  // every `groups`-th position: so the lanes end in order
    for (uint32_t t = 0; t < kTogether; ++t)
      for (uint32_t i = 0; i < d; i += 64 / sizeof(Kv)) __builtin_prefetch(next.keys[first + group + t * groups] + i);
    for (uint32_t i = 0; i < d; i += W) {
      vf q[R];
      for (int r = 0; r < R; ++r) q[r] = load(queries + r * padded + i);
      for (uint32_t t = 0; t < kTogether; ++t) {
        const vf k = load(keys[t * groups] + i);
        for (int r = 0; r < R; ++r) acc[r][t] += q[r] * k;
      }
    }
    for (int r = 0; r < R; ++r) {
      fold_all<W, kTogether>(acc[r]);
      sums[r][group] = acc[r][0];
    }
  }
  for (int r = 0; r < R; ++r) {
    fold_all<groups, groups>(sums[r]);
    store(scores[r] + first, sums[r][0]);
  }
}

// Scores into weights, in place; 0 for positions that the row does not see.
inline void soften(const PhModel* m, float* scores, Seen* seen, Running* running) {
  if (seen->begin >= seen->end) {
    for (uint32_t t = 0; t < kTile; t += W) store(scores + t, vf{});
    seen->scale = 1.0f;
    return;
  }
  if (m->logit_softcap != 0.0f)
    for (uint32_t t = seen->begin; t < seen->end; ++t)
      scores[t] = m->logit_softcap * tanhf(scores[t] / m->logit_softcap);
  vf peak = splat(-INFINITY);
  for (uint32_t t = 0; t < kTile; t += W) {
    vi position;
    for (uint32_t i = 0; i < W; ++i) position[i] = static_cast<int32_t>(t + i);
    const vi visible = (position >= static_cast<int32_t>(seen->begin)) & (position < static_cast<int32_t>(seen->end));
    const vf s = visible ? load(scores + t) : splat(-INFINITY);
    store(scores + t, s);
    peak = s > peak ? s : peak;
  }
  const float most = running->most > largest(peak) ? running->most : largest(peak);
  vf total = vf{};
  for (uint32_t t = 0; t < kTile; t += W) {
    const vf p = exponential(load(scores + t) - most);
    store(scores + t, p);
    total += p;
  }
  float first[W];
  store(first, exponential(splat(running->most - most)));
  seen->scale = first[0];
  running->most = most;
  running->total = running->total * seen->scale + sum(total);
}

// acc [R][padded] = acc * scale + weights * values over positions [begin, end) of a tile, for V vectors from i on.
template <int R, int V, class Kv>
inline void weigh(const Tile<Kv>& tile, const Tile<Kv>& next, uint32_t begin, uint32_t end,
                  const float (*weights)[kTile], const Seen* seen, uint32_t i, uint32_t padded, float* acc) {
  vf sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load(acc + r * padded + i + v * W) * seen[r].scale;
  for (uint32_t t = begin; t < end; ++t) {
    const Kv* from = tile.values[t] + i;
    for (int line = 0; line < V * W; line += 64 / sizeof(Kv)) __builtin_prefetch(next.values[t] + i + line);
    float p[R];
    for (int r = 0; r < R; ++r) p[r] = weights[r][t];
    for (int v = 0; v < V; ++v) {
      const vf value = load(from + v * W);
      for (int r = 0; r < R; ++r) sums[r][v] += p[r] * value;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(acc + r * padded + i + v * W, sums[r][v]);
}

template <int R, class Kv>
inline void attend_rows(const PhModel* m, const Tile<Kv>& tile, const Tile<Kv>& next, const float* queries, uint32_t d,
                        uint32_t padded, Seen* seen, Running* running, float* acc) {
  alignas(64) float scores[R][kTile];
  uint32_t begin = kTile, end = 0;
  for (int r = 0; r < R; ++r) {
    if (seen[r].begin >= seen[r].end) continue;
    begin = seen[r].begin < begin ? seen[r].begin : begin;
    end = seen[r].end > end ? seen[r].end : end;
  }
  if (begin >= end) return;
  for (uint32_t t = begin / W * W; t < end; t += W) score<R>(tile, next, t, queries, d, padded, scores);
  for (int r = 0; r < R; ++r) soften(m, scores[r], seen + r, running + r);
  uint32_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) weigh<R, 4>(tile, next, begin, end, scores, seen, i, padded, acc);
  for (; i + 2 * W <= d; i += 2 * W) weigh<R, 2>(tile, next, begin, end, scores, seen, i, padded, acc);
  for (; i < d; i += W) weigh<R, 1>(tile, next, begin, end, scores, seen, i, padded, acc);
}

// --- a block of queries ---

struct Scratch {
  float* zeros;    // [padded]
  float* keys;     // [64][padded]
  float* values;   // [64][padded]
  float* queries;  // [rows][padded], scaled
  float* acc;      // [rows][padded]
  Running* running;
};

// Positions [begin, end) of the tile from `start` on; the others are zeros.
template <class Kv>
inline void find_tile(const Attention* job, uint32_t start, uint32_t begin, uint32_t end, const void* zeros,
                      Tile<Kv>* tile) {
  const uint32_t d = job->model->head_dim, page_size = job->pool->page_size;
  for (uint32_t t = 0; t < kTile; ++t) tile->keys[t] = tile->values[t] = static_cast<const Kv*>(zeros);
  for (uint32_t position = begin; position < end;) {
    const uint32_t in_page = position % page_size;
    const uint32_t count = end - position < page_size - in_page ? end - position : page_size - in_page;
    const uint64_t entry = job->chunk->row[position / page_size];
    const Kv* keys = reinterpret_cast<const Kv*>(slots(job, entry, 0)) + size_t{in_page} * d;
    const Kv* values = reinterpret_cast<const Kv*>(slots(job, entry, 1)) + size_t{in_page} * d;
    for (uint32_t t = position - start; t < position - start + count; ++t, keys += d, values += d) {
      tile->keys[t] = keys;
      tile->values[t] = values;
    }
    position += count;
  }
}

// The seen part of a tile as floats, each position padded with zeros.
template <class Kv>
inline void convert_tile(const Tile<Kv>& tile, uint32_t first, uint32_t last, uint32_t d, uint32_t padded,
                         const Scratch& scratch, Tile<float>* converted) {
  for (uint32_t t = 0; t < kTile; ++t) {
    converted->keys[t] = converted->values[t] = scratch.zeros;
    if (t < first || t >= last) continue;
    for (uint32_t which = 0; which < 2; ++which) {
      const Kv* from = which ? tile.values[t] : tile.keys[t];
      float* to = (which ? scratch.values : scratch.keys) + size_t{t} * padded;
      uint32_t i = 0;
      for (; i + W <= d; i += W) store(to + i, load(from + i));
      for (; i < padded; ++i) to[i] = i < d ? to_float(from[i]) : 0.0f;
      (which ? converted->values[t] : converted->keys[t]) = to;
    }
  }
}

template <class Kv>
inline void attend_tiles(const Attention* job, const Scratch& scratch, uint32_t rows, uint32_t padded) {
  const PhModel* m = job->model;
  const uint32_t d = m->head_dim, group = m->heads / m->kv_heads, window = m->sliding_window;
  const uint32_t from = job->chunk->start + job->first, until = job->chunk->start + job->last;
  const uint32_t seen_from = window != 0 && from + 1 > window ? from + 1 - window : 0;
  // Few rows read pages as they are; many rows are worth one conversion, as are heads that are no whole vectors.
  const bool convert = d % W != 0 || (sizeof(Kv) == 2 && rows > 2 * kAttentionRows);
  Tile<Kv> tiles[2];
  Tile<float> converted;
  const uint32_t first = seen_from / kTile * kTile;
  find_tile(job, first, seen_from, first + kTile < until ? first + kTile : until, scratch.zeros, tiles);
  for (uint32_t start = first; start < until; start += kTile) {
    const uint32_t begin = start > seen_from ? start : seen_from;
    const uint32_t end = start + kTile < until ? start + kTile : until;
    const Tile<Kv>& tile = tiles[(start - first) / kTile % 2];
    const Tile<Kv>& next = tiles[end < until ? (end - first) / kTile % 2 : (start - first) / kTile % 2];
    if (end < until)
      find_tile(job, end, end, end + kTile < until ? end + kTile : until, scratch.zeros,
                tiles + (end - first) / kTile % 2);
    if (convert) convert_tile(tile, begin - start, end - start, d, padded, scratch, &converted);
    in_blocks<kAttentionRows>(rows, [&](uint32_t h, auto count) {
      constexpr int R = decltype(count)::value;
      Seen seen[R];
      for (int r = 0; r < R; ++r) {
        const uint32_t position = from + (h + r) / group;
        const uint32_t lowest = window != 0 && position + 1 > window ? position + 1 - window : 0;
        seen[r].begin = lowest > start ? lowest - start : 0;
        seen[r].end = position < start ? 0 : (position + 1 < end ? position + 1 : end) - start;
      }
      const float* queries = scratch.queries + h * padded;
      float* acc = scratch.acc + h * padded;
      if (convert) {
        attend_rows<R>(m, converted, converted, queries, padded, padded, seen, scratch.running + h, acc);
      } else {
        attend_rows<R>(m, tile, next, queries, d, padded, seen, scratch.running + h, acc);
      }
    });
  }
}

template <class Input>
void attend(const Attention* job, float* memory) {
  const PhModel* m = job->model;
  const uint32_t d = m->head_dim, group = m->heads / m->kv_heads, padded = pad16(d);
  Scratch scratch;
  scratch.zeros = memory;
  scratch.keys = scratch.zeros + padded;
  scratch.values = scratch.keys + kTile * padded;
  scratch.queries = scratch.values + kTile * padded;
  scratch.acc = scratch.queries + kQueryBlock * group * padded;
  scratch.running = reinterpret_cast<Running*>(scratch.acc + kQueryBlock * group * padded);
  const uint32_t rows = (job->last - job->first) * group;
  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  memset(scratch.zeros, 0, padded * sizeof(float));
  memset(scratch.acc, 0, size_t{rows} * padded * sizeof(float));
  for (uint32_t h = 0; h < rows; ++h) {
    const float* from =
        job->qkv + size_t{job->first + h / group} * job->qkv_stride + size_t{job->kv_head * group + h % group} * d;
    for (uint32_t i = 0; i < padded; ++i) scratch.queries[h * padded + i] = i < d ? from[i] * scale : 0.0f;
    scratch.running[h] = {-INFINITY, 0.0f};
  }
  if (m->kv_bfloat16) {
    attend_tiles<uint16_t>(job, scratch, rows, padded);
  } else {
    attend_tiles<float>(job, scratch, rows, padded);
  }
  typedef typename Input::type T;
  for (uint32_t h = 0; h < rows; ++h) {
    T* out = static_cast<T*>(job->output) + size_t{job->first + h / group} * job->output_stride +
             size_t{job->kv_head * group + h % group} * d;
    // Adding 0 makes a -0 a 0: an unseen position can turn one into the other, and another chunking have none.
    for (uint32_t i = 0; i < d; ++i)
      out[i] = Input::convert(scratch.acc[h * padded + i] / scratch.running[h].total + 0.0f);
  }
}

}  // namespace
