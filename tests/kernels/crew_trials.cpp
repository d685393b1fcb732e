// The number of threads on machines that are made up: what two threads cost is told, what Crew makes of it is checked.
#include "crew.h"

#include <stdio.h>

namespace {

int faults = 0;

void check(bool right, const char* what) {
  if (right) return;
  printf("%s\n", what);
  ++faults;
}

// Runs steps for `seconds`; f(size, now) gives a step's seconds and waited seconds. Returns the share of time at full
// size.
struct Step {
  double seconds, waited;
};

template <class F>
double run(Crew* crew, double* now, double seconds, uint32_t full, F&& f) {
  double at_full = 0;
  const double end = *now + seconds;
  while (*now < end) {
    const Step step = f(crew->size());
    if (crew->size() == full) at_full += step.seconds;
    *now += step.seconds;
    crew->learn(4, step.seconds, step.waited, *now);
  }
  return at_full / (*now - end + seconds);
}

}  // namespace

int main() {
  double now = 100;
  {
    Crew crew(2);
    const double share =
        run(&crew, &now, 30, 2, [](uint32_t size) { return size == 2 ? Step{0.01, 0.001} : Step{0.02, 0}; });
    check(share > 0.9999, "an idle machine: never fewer threads");
  }
  {
    // Another process has one processor for a minute, then it leaves.
    Crew crew(2);
    auto busy = [](uint32_t size) { return size == 2 ? Step{0.03, 0.02} : Step{0.013, 0}; };
    auto idle = [](uint32_t size) { return size == 2 ? Step{0.008, 0.0005} : Step{0.013, 0}; };
    check(run(&crew, &now, 60, 2, busy) < 0.2, "a busy processor: one thread for most of the time");
    run(&crew, &now, 61, 2, idle);
    check(run(&crew, &now, 30, 2, idle) > 0.9999, "the processor is free again: both threads");
  }
  {
    // Much waiting, yet two are faster: tries are few.
    Crew crew(2);
    const double share =
        run(&crew, &now, 300, 2, [](uint32_t size) { return size == 2 ? Step{0.012, 0.004} : Step{0.02, 0}; });
    check(share > 0.97, "uneven work: both threads");
  }
  {
    // Two of four processors are taken.
    Crew crew(4);
    auto step = [](uint32_t size) { return size > 2 ? Step{0.03, 0.015} : Step{0.02 / size, 0}; };
    check(run(&crew, &now, 60, 2, step) > 0.7, "half of the processors taken: half of the threads");
  }
  {
    Crew crew(1);
    check(run(&crew, &now, 5, 1, [](uint32_t) { return Step{0.01, 0.005}; }) > 0.9999, "one thread stays one");
  }
  return faults == 0 ? 0 : 1;
}
