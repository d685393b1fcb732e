// A step's attention as pieces of work.
//
// Pieces differ in which parts of a context they read, and for which queries. Whatever they are, the bits are the same
// (attention.inl), so a plan may follow the number of threads, the mates in the batch, and costs.
#pragma once
#include <stddef.h>

#include <vector>

#include "isa.h"

// Parts [first, last) of a block table for queries [query, query + count), and that for each kv head.
struct Piece {
  const uint64_t* row;
  uint32_t query, count, first, last;
  bool leading;   // what the queries see begins here
  uint64_t cost;  // of one kv head
};

// A query whose pieces are to be put together.
struct Merge {
  uint32_t query, slots;
  size_t slot;  // the first
  const float* partials;
};

class AttentionPlan {
 public:
  // Rows of activations lie in the order of chunks.
  struct Step {
    const PhModel* model;
    const PhChunk* chunks;
    uint32_t count, page_size, threads;
    float* projected;  // [rows, projected_stride]
    uint32_t projected_stride;
    uint8_t* output;  // [rows, output_stride], in bytes
    size_t output_stride;
  };

  void make(const Step& step);
  // What pieces leave for merges: so many floats, and where.
  size_t partial_floats() const { return slots_ * slot_size_; }
  void place(float* partials);

  const std::vector<Piece>& pieces() const { return pieces_; }  // the costliest first
  const std::vector<Piece>& blocks() const { return blocks_; }  // every position once: what to append
  const std::vector<Merge>& merges() const { return merges_; }
  const Query* queries() const { return queries_.data(); }
  // No piece reads what another one appends.
  bool appends_alone() const { return appends_alone_; }

 private:
  struct Kept {
    uint32_t query, count;
  };

  void read_chunks(const Step& step);
  void share(const Step& step);
  void share(uint32_t first, uint32_t last, uint32_t done);
  void take_together(uint32_t first, uint32_t last, uint32_t done, uint32_t common);
  void cut(const Piece& block, uint64_t fair);
  void allot(const Piece& block);
  void add(const Piece& block, uint32_t first, uint32_t last);

  size_t slot_size_ = 0, slots_ = 0;
  bool appends_alone_ = false;
  uint32_t group_ = 0;
  std::vector<Query> queries_;    // of all positions; then of pieces that leave partial results
  std::vector<size_t> slot_;      // of part 0 of each query, or kNone; of kept ones, of their piece
  std::vector<Piece> blocks_;     // every position once
  std::vector<Piece> sharers_;    // blocks that may share a prefix, sorted by block table
  std::vector<uint32_t> common_;  // parts that a sharer has in common with the next
  std::vector<Piece> todo_;       // blocks and shared prefixes, before they are cut
  std::vector<Piece> pieces_;
  std::vector<Kept> kept_;  // queries that leave partial results
  std::vector<Merge> merges_;
};
