#include "plan.h"

#include <algorithm>

namespace {

constexpr size_t kNone = ~size_t{0};
constexpr uint64_t kReadCost = 16;  // of the keys and values of a part, in rows that attend to it
constexpr uint32_t kPiecesOfThread = 4;
constexpr uint32_t kLeastParts = 4;                // of a piece that a context is cut into
constexpr size_t kMostPartials = size_t{4} << 20;  // floats that queries of one block may leave
constexpr size_t kMostShared = size_t{16} << 20;   // floats that all who share may leave
constexpr uint32_t kMostRows = 32;                 // of a block that gains by sharing what it reads
constexpr uint32_t kLeastRows = 96;                // of a block that is one of many of its chunk
constexpr uint32_t kLeastSaved = 4;                // parts not read: what a join is worth
constexpr uint32_t kMergedPerRead = 16;            // parts that are merged in the time in which one is read

uint64_t cost_of(uint32_t parts, uint32_t rows) { return parts * (kReadCost + rows); }

uint32_t first_part(const PhModel& model, uint32_t position) {
  const uint32_t window = model.sliding_window;
  return (window != 0 && position + 1 > window ? position + 1 - window : 0) / kPart;
}

uint32_t page_of(const Piece& piece, uint32_t entry) { return static_cast<uint32_t>(piece.row[entry]); }

uint32_t ceil_div(uint64_t a, uint64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

}  // namespace

void AttentionPlan::make(const Step& step) {
  pieces_.clear();
  merges_.clear();
  kept_.clear();
  slots_ = 0;
  slot_size_ = size_t{step.model->heads} * partial_size(step.model->head_dim);
  group_ = step.model->heads / step.model->kv_heads;
  read_chunks(step);
  todo_.clear();
  share(step);
  uint64_t total = 0;
  for (const Piece& block : todo_) total += block.cost * step.model->kv_heads;
  const uint64_t fair = step.threads == 1 ? total : ceil_div(total, step.threads * kPiecesOfThread);
  for (const Piece& block : todo_) cut(block, fair);
  appends_alone_ = appends_alone_ && merges_.empty();
  std::stable_sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

// A block as one piece, or as several that cost no more than is fair.
void AttentionPlan::cut(const Piece& block, uint64_t fair) {
  const uint32_t parts = block.last - block.first;
  uint32_t cuts = std::max(1u, std::min(ceil_div(block.cost, fair), parts / kLeastParts));
  if (slot_[block.query] == kNone) {
    if (block.count * parts * slot_size_ > kMostPartials) cuts = 1;
    if (cuts == 1) {
      pieces_.push_back(block);
      return;
    }
    allot(block);
  }
  for (uint32_t i = 0; i < cuts; ++i) add(block, block.first + parts * i / cuts, block.first + parts * (i + 1) / cuts);
}

// Every position once, in blocks of one chunk: as large as they can be, for a block takes a part out of its pages once,
// but so small that there are pieces enough for all threads even where one takes all heads of a block.
void AttentionPlan::read_chunks(const Step& step) {
  const PhModel& model = *step.model;
  uint64_t rows = 0;
  for (uint32_t c = 0; c < step.count; ++c) rows += uint64_t{step.chunks[c].count} * group_;
  const uint32_t fair = std::max(kLeastRows, ceil_div(rows, step.threads * kPiecesOfThread));
  const uint32_t most = std::min(attention_queries(group_), ceil_div(fair, group_));
  queries_.clear();
  blocks_.clear();
  appends_alone_ = true;
  for (uint32_t c = 0; c < step.count; ++c) {
    const PhChunk& chunk = step.chunks[c];
    appends_alone_ = appends_alone_ && chunk.count == 1;
    for (uint32_t done = 0; done < chunk.count; done += most) {
      const uint32_t count = std::min(chunk.count - done, most), start = chunk.start + done;
      const uint32_t first = first_part(model, start), last = (start + count - 1) / kPart + 1;
      blocks_.push_back({chunk.row, static_cast<uint32_t>(queries_.size()), count, first, last, true,
                         cost_of(last - first, count * group_)});
      for (uint32_t position = start; position < start + count; ++position) {
        const size_t row = queries_.size();
        queries_.push_back({position, position >= chunk.write_from, step.projected + row * step.projected_stride,
                            step.output + row * step.output_stride, nullptr});
      }
    }
  }
  slot_.assign(queries_.size(), kNone);
}

// Slots for the queries of a block, one a part.
void AttentionPlan::allot(const Piece& block) {
  const uint32_t parts = block.last - block.first;
  for (uint32_t query = block.query; query < block.query + block.count; ++query, slots_ += parts) {
    slot_[query] = slots_ - block.first;
    merges_.push_back({query, parts, slots_, nullptr});
  }
}

// A piece of a block that has slots: queries of its own, since they leave their results elsewhere.
void AttentionPlan::add(const Piece& block, uint32_t first, uint32_t last) {
  const auto query = static_cast<uint32_t>(queries_.size());
  for (uint32_t q = block.query; q < block.query + block.count; ++q) {
    queries_.push_back(Query(queries_[q]));
    slot_.push_back(slot_[q] + first);
  }
  pieces_.push_back({block.row, query, block.count, first, last, block.leading && first == block.first,
                     cost_of(last - first, block.count * group_)});
  kept_.push_back({query, block.count});
}

void AttentionPlan::place(float* partials) {
  for (const Kept& kept : kept_)
    for (uint32_t query = kept.query; query < kept.query + kept.count; ++query)
      queries_[query].partials = partials + slot_[query] * slot_size_;
  for (Merge& merge : merges_) merge.partials = partials + merge.slot * slot_size_;
}

// --- shared prefixes ---
//
// Sequences whose block tables begin with the same pages read those once, for all their queries. Chunks sorted by
// their tables are a tree of such prefixes: neighbours share the most.

void AttentionPlan::share(const Step& step) {
  const auto shared_parts = [&](const Piece& a, const Piece& b) {
    const uint32_t most = std::min(queries_[a.query].position, queries_[b.query].position) / kPart;
    uint32_t entries = 0;
    while (entries * step.page_size < most * kPart && page_of(a, entries) == page_of(b, entries)) ++entries;
    return std::min(entries * step.page_size / kPart, most);
  };
  sharers_.clear();
  for (const Piece& block : blocks_) {
    const bool may = block.count * group_ <= kMostRows && queries_[block.query].position >= kPart;
    (may && step.model->sliding_window == 0 && blocks_.size() > 1 ? sharers_ : todo_).push_back(block);
  }
  // As words are sorted. What a table holds beyond a block's last position may change meanwhile: it is not looked at.
  const auto entries_of = [&](const Piece& block) {
    return queries_[block.query + block.count - 1].position / step.page_size + 1;
  };
  std::sort(sharers_.begin(), sharers_.end(), [&](const Piece& a, const Piece& b) {
    const uint32_t of_a = entries_of(a), of_b = entries_of(b);
    for (uint32_t entry = 0; entry < std::min(of_a, of_b); ++entry)
      if (page_of(a, entry) != page_of(b, entry)) return page_of(a, entry) < page_of(b, entry);
    return of_a != of_b ? of_a < of_b : a.query < b.query;
  });
  common_.clear();
  for (size_t i = 0; i + 1 < sharers_.size(); ++i) common_.push_back(shared_parts(sharers_[i], sharers_[i + 1]));
  if (!sharers_.empty()) share(0, static_cast<uint32_t>(sharers_.size()), 0);
}

// Sharers [first, last), whose first `done` parts are taken care of.
void AttentionPlan::share(uint32_t first, uint32_t last, uint32_t done) {
  if (last - first == 1) {
    Piece own = sharers_[first];
    own.first = done;
    own.leading = done == 0;
    own.cost = cost_of(own.last - done, own.count * group_);
    todo_.push_back(own);
    return;
  }
  const uint32_t common = *std::min_element(common_.begin() + first, common_.begin() + last - 1);
  uint64_t left = 0, slots = slots_;
  for (uint32_t i = first; i < last; ++i) {
    left += sharers_[i].last - common;
    if (done == 0) slots += uint64_t{sharers_[i].count} * sharers_[i].last;
  }
  const uint64_t saved = uint64_t{last - first - 1} * (common - done);
  if (saved >= kLeastSaved && saved * kMergedPerRead >= left && slots * slot_size_ <= kMostShared) {
    take_together(first, last, done, common);
    done = common;
  }
  for (uint32_t start = first, i = first; i < last; ++i) {
    if (i + 1 < last && common_[i] != common) continue;
    share(start, i + 1, done);
    start = i + 1;
  }
}

// Parts [done, common) for all queries of the sharers [first, last).
void AttentionPlan::take_together(uint32_t first, uint32_t last, uint32_t done, uint32_t common) {
  Piece together{};
  const auto flush = [&] {
    together.cost = cost_of(common - done, together.count * group_);
    if (together.count != 0) todo_.push_back(together);
  };
  for (uint32_t i = first; i < last; ++i) {
    const Piece& block = sharers_[i];
    if (done == 0) allot(block);
    if (together.count == 0 || together.count + block.count > attention_queries(group_)) {
      flush();
      together = {block.row, static_cast<uint32_t>(queries_.size()), 0, done, common, done == 0, 0};
    }
    for (uint32_t q = block.query; q < block.query + block.count; ++q, ++together.count) {
      queries_.push_back(Query(queries_[q]));
      slot_.push_back(slot_[q]);
    }
  }
  flush();
}
