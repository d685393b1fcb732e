// How many threads a step uses: fewer where other work takes their processors away. Pure: times are told to it.
//
//   settled at n --waits at joins pass 15 % of the time--> trying n - 1 --no slower--> settled at n - 1
//   settled at n, fewer than all --after a while--> trying n + 1 --faster--> settled at n + 1
//   trying --otherwise--> settled where it was, and twice as long until the next try
//
// Results do not depend on it: pieces of work are the same for any number of threads.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <cmath>

class Crew {
 public:
  explicit Crew(uint32_t most) : most_(most), size_(most), before_(most) {}

  // For the next step.
  uint32_t size() const { return size_; }

  // A step of so many rows took so many seconds, of which the first thread waited for the others; it ended at `now`.
  void learn(uint32_t rows, double seconds, double waited, double now) {
    if (most_ == 1 || seconds <= 0) return;
    // One row costs as much as kFreeRows more: weights are read for all of them.
    const double cost = seconds / (rows + kFreeRows);
    const double weight = 1 - std::exp(-seconds / kHorizon);
    cost_ = steps_ == 0 ? cost : cost_ + weight * (cost - cost_);
    share_ += weight * (waited / seconds - share_);
    ++steps_;
    spent_ += seconds;
    if (steps_ < kEnoughSteps || spent_ < kHorizon) return;
    if (size_ != before_) {
      judge(now);
    } else if (now >= next_) {
      const bool fewer = share_ > kMostWaiting && size_ > 1, more = size_ < most_;
      if (fewer && !(more && tried_fewer_)) {
        begin(size_ - 1);
      } else if (more) {
        begin(size_ + 1);
      }
    }
  }

 private:
  static constexpr double kFreeRows = 8;
  static constexpr double kHorizon = 0.25;  // seconds
  static constexpr uint32_t kEnoughSteps = 8;
  static constexpr double kMostWaiting = 0.15;
  static constexpr double kGain = 0.97;  // a try of more threads wins if it costs less than this part
  static constexpr double kTie = 1.001;  // one of fewer threads wins if it does not cost more
  static constexpr double kFirstHold = 2, kLongestHold = 60;

  void begin(uint32_t size) {
    cost_before_ = cost_;
    tried_fewer_ = size < size_;
    size_ = size;
    start();
  }

  void judge(double now) {
    const bool better = cost_ < (size_ > before_ ? kGain * cost_before_ : cost_before_ * kTie);
    hold_ = better ? kFirstHold : std::min(2 * hold_, kLongestHold);
    next_ = now + hold_;
    if (better) {
      before_ = size_;
    } else {
      size_ = before_;
    }
    start();
  }

  void start() {
    steps_ = 0;
    spent_ = cost_ = share_ = 0;
  }

  uint32_t most_, size_, before_;  // before_: the size that a try is held against
  uint32_t steps_ = 0;             // of this size
  bool tried_fewer_ = false;       // in the last try: where both ways are open they take turns
  double cost_ = 0, cost_before_ = 0, share_ = 0, spent_ = 0;
  double hold_ = kFirstHold, next_ = 0;
};
