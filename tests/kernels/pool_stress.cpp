// Many tiny jobs on a thread pool: every piece runs exactly once, no thread has two at once, idle threads sleep.
#include <stdio.h>
#include <time.h>

#include <atomic>
#include <memory>

#include "threads.h"

namespace {

constexpr uint32_t kMostPieces = 97;
constexpr uint32_t kJobs = 30000;

struct Job {
  std::atomic<uint32_t> runs[kMostPieces];
  std::atomic<uint32_t> inside[8];
  std::atomic<uint32_t> faults;
  uint32_t pieces, threads;
};

void piece(void* pointer, uint32_t index, uint32_t thread) {
  Job* job = static_cast<Job*>(pointer);
  if (index >= job->pieces || thread >= job->threads) {
    ++job->faults;
    return;
  }
  if (job->inside[thread].fetch_add(1) != 0) ++job->faults;
  job->runs[index].fetch_add(1, std::memory_order_relaxed);
  job->inside[thread].fetch_sub(1);
}

double processor_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

void sleep_ms(long ms) {
  const timespec t{0, ms * 1000000};
  nanosleep(&t, nullptr);
}

}  // namespace

int main() {
  for (uint32_t threads = 1; threads <= 4; ++threads) {
    ThreadPool pool(threads);
    if (pool.size() != threads) return 1;
    // Two jobs in turn: a late worker that mixed them up would count in the wrong one.
    const std::unique_ptr<Job> jobs[2] = {std::make_unique<Job>(), std::make_unique<Job>()};
    for (uint32_t n = 0; n < kJobs; ++n) {
      if (n % 500 == 0) pool.use(1 + n / 500 % threads);
      Job* job = jobs[n % 2].get();
      job->pieces = n * 31 % (kMostPieces + 1);
      job->threads = threads;
      for (auto& runs : job->runs) runs.store(0, std::memory_order_relaxed);
      pool.run(job->pieces, piece, job);
      for (uint32_t i = 0; i < kMostPieces; ++i) {
        const uint32_t runs = job->runs[i].load(std::memory_order_relaxed);
        if (runs != (i < job->pieces ? 1 : 0)) {
          printf("%u threads, job %u: piece %u of %u ran %u times\n", threads, n, i, job->pieces, runs);
          return 1;
        }
      }
      if (n % 3000 == 0) sleep_ms(2);  // long enough for the workers to fall asleep
    }
    if (jobs[0]->faults + jobs[1]->faults != 0) {
      printf("%u threads: a piece out of range, or two at once on one thread\n", threads);
      return 1;
    }
    pool.use(threads);
    sleep_ms(20);
    const double before = processor_seconds();
    sleep_ms(200);
    const double idle = processor_seconds() - before;
    printf("%u threads: %u jobs, %.1f ms of processor time in 200 ms idle\n", threads, kJobs, idle * 1e3);
    if (idle > 0.005) return 1;
  }
  return 0;
}
