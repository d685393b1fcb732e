// Runs CUDA blocks on one CPU thread, one fiber for each of their threads: one block after another, or, under the
// random schedule, a few at a time.
//
// A fiber runs until it waits: at a barrier of the block, or at a collective of its warp, which is computed at once
// when the last lane has come. The schedule says which of the ready fibers goes on: the lowest, the highest or any.
// Little else interleaves, so a missing barrier does not fail at random: under one of these schedules the reader
// comes first, and finds poison, or the writer comes first, and overwrites what is still to be read.
#pragma once

#include <cstddef>

namespace shim {

constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating-point format, and no valid page id

enum class Collective : int {
  kSync,
  kBallot,
  kShuffle,
  kLdmatrix,
  kMmaBf16,
  kMmaF16,
};

// What one lane brings to a collective, and takes from it.
struct Operand {
  Collective kind;
  int source = 0;                 // shuffle: lane to read. ldmatrix: matrices, negative when transposed
  unsigned value = 0;             // ballot, shuffle: in; both: out
  const void* address = nullptr;  // ldmatrix: of one row
  unsigned* registers = nullptr;  // ldmatrix: out
  float* d = nullptr;             // mma
  const unsigned* a = nullptr;
  const unsigned* b = nullptr;
};

void collective(Operand& operand);
void sync_block();
// Where the random schedule may let another thread come between. At an atomic operation it may also put the block off
// until all others have ended or been put off: what a block has not yet written when it says that it has is then
// missed.
void interleave();
void interleave_blocks();

// Asynchronous copies of the calling thread: they happen at the wait, the target is poisoned at the issue.
void issue_copy(void* target, const void* source, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);

char* dynamic_shared();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

struct Launch {
  int grid[3];
  int threads;
  int shared_bytes;
  int schedule;  // 0 forward, 1 reverse, 2 random
  unsigned long long seed;
};

struct Entry {
  const char* name;
  void (*call)(void** arguments);
  char* static_shared;  // any place in this library's thread-local memory, where the static shared arrays lie
};

// Returns 0, or -1 with what went wrong in message[0:size].
int run(const Launch& launch, const Entry& entry, void** arguments, char* message, size_t size);

}  // namespace shim
