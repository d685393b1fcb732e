#include "plan.h"

#include <algorithm>

namespace {

constexpr uint64_t kReadCost = 16;  // of the keys and values of a part, in rows that attend to it
constexpr uint32_t kPiecesOfThread = 4;
constexpr uint32_t kLeastParts = 4;                // of a piece that a context is cut into
constexpr size_t kMostPartials = size_t{4} << 20;  // floats that a block may leave

uint64_t cost_of(uint32_t parts, uint32_t rows) { return parts * (kReadCost + rows); }

uint32_t first_part(const PhModel& model, uint32_t position) {
  const uint32_t window = model.sliding_window;
  return (window != 0 && position + 1 > window ? position + 1 - window : 0) / kPart;
}

uint32_t ceil_div(uint64_t a, uint64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

}  // namespace

void AttentionPlan::make(const Step& step) {
  pieces_.clear();
  merges_.clear();
  slots_ = 0;
  slot_size_ = size_t{step.model->heads} * partial_size(step.model->head_dim);
  group_ = step.model->heads / step.model->kv_heads;
  read_chunks(step);
  uint64_t total = 0;
  for (const Piece& block : blocks_) total += block.cost * step.model->kv_heads;
  const uint64_t fair = step.threads == 1 ? total : ceil_div(total, step.threads * kPiecesOfThread);
  for (const Piece& block : blocks_) {
    const uint32_t parts = block.last - block.first, cuts = std::min(ceil_div(block.cost, fair), parts / kLeastParts);
    if (cuts <= 1 || block.count * parts * slot_size_ > kMostPartials) {
      pieces_.push_back(block);
      continue;
    }
    allot(block, parts / cuts);
    for (uint32_t cut = 0; cut < cuts; ++cut)
      add(block, block.first + parts * cut / cuts, block.first + parts * (cut + 1) / cuts);
  }
  appends_alone_ = appends_alone_ && merges_.empty();
  std::stable_sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

// Every position once, in blocks of one chunk.
void AttentionPlan::read_chunks(const Step& step) {
  const PhModel& model = *step.model;
  const uint32_t most = attention_queries(group_);
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
  slot_.assign(queries_.size(), 0);
}

// Slots for the queries of a block, a slot a part; its leading piece ends after `next` parts.
void AttentionPlan::allot(const Piece& block, uint32_t next) {
  const uint32_t parts = block.last - block.first;
  for (uint32_t query = block.query; query < block.query + block.count; ++query, slots_ += parts) {
    slot_[query] = slots_;
    merges_.push_back({query, next, parts, nullptr});
  }
}

// A piece of a block that has slots.
void AttentionPlan::add(const Piece& block, uint32_t first, uint32_t last) {
  const auto query = static_cast<uint32_t>(queries_.size());
  for (uint32_t q = block.query; q < block.query + block.count; ++q) {
    queries_.push_back(Query(queries_[q]));
    slot_.push_back(slot_[q] + first - block.first);
  }
  pieces_.push_back(
      {block.row, query, block.count, first, last, first == block.first, cost_of(last - first, block.count * group_)});
}

void AttentionPlan::place(float* partials) {
  const size_t positions = blocks_.empty() ? 0 : blocks_.back().query + blocks_.back().count;
  for (size_t query = positions; query < queries_.size(); ++query)
    queries_[query].partials = partials + slot_[query] * slot_size_;
  for (Merge& merge : merges_) merge.partials = partials + slot_[merge.query] * slot_size_;
}
