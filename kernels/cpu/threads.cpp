#include "threads.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr uint32_t kPieceBits = 22;
constexpr uint64_t kPieceMask = (1ull << kPieceBits) - 1;
// About 50 us: longer than the gaps within a step, much shorter than the gaps between requests.
constexpr int kSpins = 2000;

void futex_wait(std::atomic<uint32_t>* word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

ThreadPool::ThreadPool(uint32_t threads) : used_(threads) {
  for (uint32_t thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
    pthread_setname_np(workers_.back().native_handle(), "kernel");
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  use(size());
  epoch_.fetch_add(1);
  futex_wake_all(&epoch_);
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::use(uint32_t threads) {
  used_.store(threads);
  futex_wake_all(&used_);
}

uint64_t ThreadPool::take_waited() {
  const uint64_t waited = waited_;
  waited_ = 0;
  return waited;
}

void ThreadPool::run(uint32_t pieces, Piece piece, void* job) {
  if (pieces == 0) return;
  if (used() == 1 || pieces == 1) {
    for (uint32_t i = 0; i < pieces; ++i) piece(job, i, 0);
    return;
  }
  piece_ = piece;
  job_ = job;
  done_.store(0, std::memory_order_relaxed);
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  ticket_.store(uint64_t{epoch} << (2 * kPieceBits) | uint64_t{pieces} << kPieceBits, std::memory_order_release);
  epoch_.store(epoch, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&epoch_);
  while (claim_and_run(0)) {
  }
  // Only pieces are waited for, not threads: a worker that lost its processor before it
  // claimed one holds up nobody.
  if (done_.load(std::memory_order_acquire) == pieces) return;
  const uint64_t start = __builtin_ia32_rdtsc();
  for (int spins = 0; done_.load(std::memory_order_acquire) != pieces; ++spins) {
    if (spins < kSpins) {
      _mm_pause();
    } else {
      sched_yield();
    }
  }
  waited_ += __builtin_ia32_rdtsc() - start;
}

bool ThreadPool::claim_and_run(uint32_t thread) {
  uint64_t seen = ticket_.load(std::memory_order_relaxed);
  if ((seen & kPieceMask) >= (seen >> kPieceBits & kPieceMask)) return false;
  const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const uint32_t mine = ticket & kPieceMask;
  if (mine >= (ticket >> kPieceBits & kPieceMask)) return false;
  // The claim pins the job: it cannot end, and so the fields cannot change, before `done_` counts this piece.
  piece_(job_, mine, thread);
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void ThreadPool::wait_for_turn(uint32_t thread) {
  for (uint32_t used = used_.load(); used <= thread; used = used_.load()) futex_wait(&used_, used);
}

void ThreadPool::wait_for_job(uint32_t seen) {
  for (int spins = 0; spins < kSpins; ++spins) {
    if (epoch_.load(std::memory_order_acquire) != seen) return;
    _mm_pause();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (epoch_.load(std::memory_order_seq_cst) == seen) futex_wait(&epoch_, seen);
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void ThreadPool::work(uint32_t thread) {
  uint32_t seen = 0;
  while (!stop_.load(std::memory_order_acquire)) {
    wait_for_turn(thread);
    wait_for_job(seen);
    seen = epoch_.load(std::memory_order_acquire);
    while (claim_and_run(thread)) {
    }
  }
}
