// A pool of threads that claim pieces of a job by an atomic counter.
#pragma once
#include <stdint.h>

#include <atomic>
#include <thread>
#include <vector>

class ThreadPool {
 public:
  using Piece = void (*)(void* job, uint32_t piece, uint32_t thread);

  explicit ThreadPool(uint32_t threads);
  ~ThreadPool();

  // Runs piece(job, 0..pieces-1, thread) and returns when all are done; the caller takes part as thread 0.
  void run(uint32_t pieces, Piece piece, void* job);
  uint32_t size() const { return static_cast<uint32_t>(workers_.size()) + 1; }
  // How many of them take part from the next job on, 1 to size(). The others sleep.
  void use(uint32_t threads);
  uint32_t used() const { return used_.load(std::memory_order_relaxed); }
  // Ticks of the time stamp counter that run() waited for other threads, since the last call.
  uint64_t take_waited();

 private:
  void work(uint32_t thread);
  bool claim_and_run(uint32_t thread);
  void wait_for_turn(uint32_t thread);
  void wait_for_job(uint32_t seen);

  // One word, so that a late worker can never mix two jobs: epoch, number of pieces, next piece.
  std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<uint32_t> sleepers_{0};
  std::atomic<uint32_t> used_;
  std::atomic<bool> stop_{false};
  uint64_t waited_ = 0;
  Piece piece_ = nullptr;
  void* job_ = nullptr;
  std::vector<std::thread> workers_;
};
