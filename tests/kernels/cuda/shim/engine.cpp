#include "engine.h"

#include <link.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <vector>

#include "types.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

void complete(Operand* const (&lanes)[32], unsigned present);  // collectives.cpp

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10, kGuardedTail = 0;  // the address sanitizer has its own red zones
#else
constexpr size_t kStackBytes = 64 << 10, kGuardedTail = 512;
#endif
constexpr size_t kPage = 4096;
constexpr int kWarpLanes = 32, kMaxWarps = 32, kStacksAtOnce = 64;
constexpr int kResident = 3;  // blocks among which the random schedule changes
constexpr uint64_t kStackEnd = 0x9E3779B97F4A7C15;

// Saves the callee-saved registers on the stack, then takes another stack's.
extern "C" void shim_switch(void** saved, void* next);
asm(R"(
.text
.p2align 4
.type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch, .-shim_switch
)");

struct Copy {
  void* target;
  const void* source;
  bool valid;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char *bottom = nullptr, *top = nullptr;
  std::vector<Copy> copies;  // issued and not yet waited for, in order
  int groups = 0;            // committed so far
};

struct Warp {
  unsigned alive, ready, arrived, at_barrier;  // one bit a lane
  Collective kind;                             // of the arrived
  Operand* operands[kWarpLanes];
};

struct Block {
  Fiber* fibers;  // of its threads
  uint3 index;
  Warp warps[kMaxWarps];
  unsigned ready_warps;
  int alive, at_barrier;
  int turn;                   // of the blocks that have not ended, the one with the highest runs
  char* shared;               // dynamic
  std::vector<char> statics;  // while another block runs
};

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  int bit_of(unsigned mask) {
    const unsigned by = next() & 31;
    return static_cast<int>((__builtin_ctz(mask >> by | mask << (32 - by & 31)) + by) & 31);
  }
};

std::mutex running;
std::vector<Fiber> fibers;
Block blocks[kResident];
Block* block;
int resident, last_turn;      // blocks at a time; the lowest turn so far
int current;                  // thread of the block
void *scheduler, *discarded;  // stack pointers: of run_blocks, and of fibers that will not go on
const Entry* entry;
void** kernel_arguments;
const Launch* launch;
char* statics;  // the static shared memory of the block that runs
size_t static_bytes;
Random random_source;
bool failed;
char failure[1024];

void add_fibers() {
  const size_t bytes = kStackBytes * kStacksAtOnce;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  for (int i = 0; i < kStacksAtOnce; ++i) {
    Fiber fiber;
    fiber.bottom = static_cast<char*>(memory) + kStackBytes * i;
    memcpy(fiber.bottom, &kStackEnd, sizeof kStackEnd);
    // Stacks that began at the same place of a page would all want the same few sets of the first cache.
    fiber.top = fiber.bottom + kStackBytes - fibers.size() * 320 % kPage;
    fibers.push_back(std::move(fiber));
  }
}

[[noreturn]] void leave() {
  shim_switch(&discarded, scheduler);
  __builtin_unreachable();
}

void deadlock() {
  char text[768];
  size_t length = 0;
  for (int w = 0; w < (launch->threads + 31) / 32 && length < sizeof text; ++w)
    if (const Warp& warp = block->warps[w]; warp.alive)
      length += snprintf(text + length, sizeof text - length,
                         " [warp %d: lanes %08x run, %08x at a collective (kind %d), %08x at a block barrier]", w,
                         warp.alive, warp.arrived, static_cast<int>(warp.kind), warp.at_barrier);
  fail("threads wait for each other for ever:%s", text);
}

void resume(Block& next) {
  if (&next == block) return;
  if (static_bytes) {
    memcpy(block->statics.data(), statics, static_bytes);
    memcpy(statics, next.statics.data(), static_bytes);
  }
  block = &next;
  blockIdx = block->index;
}

void resume_best_turn() {
  Block* best = nullptr;
  for (int i = 0; i < resident; ++i)
    if (blocks[i].alive && (!best || blocks[i].turn > best->turn)) best = &blocks[i];
  resume(*best);
}

// The thread of `block` to go on with.
int pick() {
  if (!block->ready_warps) {
    if (block->at_barrier != block->alive) deadlock();
    block->at_barrier = 0;
    for (int w = 0; w < kMaxWarps; ++w) {
      if (!block->warps[w].at_barrier) continue;
      block->warps[w].ready = block->warps[w].at_barrier;
      block->warps[w].at_barrier = 0;
      block->ready_warps |= 1u << w;
    }
  }
  int warp, lane;
  switch (launch->schedule) {
    case 0:
      warp = __builtin_ctz(block->ready_warps), lane = __builtin_ctz(block->warps[warp].ready);
      break;
    case 1:
      warp = 31 - __builtin_clz(block->ready_warps), lane = 31 - __builtin_clz(block->warps[warp].ready);
      break;
    default:
      warp = random_source.bit_of(block->ready_warps), lane = random_source.bit_of(block->warps[warp].ready);
  }
  return warp * kWarpLanes + lane;
}

void enter(int thread) {
  current = thread;
  threadIdx.x = static_cast<unsigned>(thread);
}

void go_on_from(Fiber& from) {
  const int next = pick();
  Fiber& to = block->fibers[next];
  enter(next);
  if (&to != &from) shim_switch(&from.stack_pointer, to.stack_pointer);
}

void yield() { go_on_from(block->fibers[current]); }

void pause(Warp& warp, unsigned bit) {
  warp.ready &= ~bit;
  if (!warp.ready) block->ready_warps &= ~(1u << (&warp - block->warps));
}

void complete_if_all_came(Warp& warp) {
  if (!warp.arrived || warp.arrived != warp.alive) return;
  if (warp.kind >= Collective::kLdmatrix && warp.alive != 0xFFFFFFFFu)
    fail("a matrix instruction without the lanes %08x, which have ended", ~warp.alive);
  complete(warp.operands, warp.arrived);
  warp.ready |= warp.arrived;
  warp.arrived = 0;
  block->ready_warps |= 1u << (&warp - block->warps);
}

void fiber_main() {
  entry->call(kernel_arguments);
  Fiber& fiber = block->fibers[current];
  fiber.copies.clear();
  if (memcmp(fiber.bottom, &kStackEnd, sizeof kStackEnd)) abort();
  Warp& warp = block->warps[current / kWarpLanes];
  const unsigned bit = 1u << current % kWarpLanes;
  pause(warp, bit);
  warp.alive &= ~bit;
  --block->alive;
  if (!block->alive) leave();
  complete_if_all_came(warp);
  const int next = pick();
  enter(next);
  shim_switch(&discarded, block->fibers[next].stack_pointer);
  __builtin_unreachable();
}

void start(Block& started, uint3 index, int threads) {
  started.index = index;
  started.turn = 0;
  started.alive = threads, started.at_barrier = 0, started.ready_warps = 0;
  started.statics.assign(static_bytes, static_cast<char>(kPoison));
  memset(started.warps, 0, sizeof started.warps);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = started.fibers[t];
    auto** frame = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.top) & ~uintptr_t{15}) - 2;
    *frame = reinterpret_cast<void*>(fiber_main);  // where shim_switch returns to
    fiber.stack_pointer = frame - 6;
    memset(fiber.stack_pointer, 0, 6 * sizeof(void*));
    fiber.copies.clear();
    fiber.groups = 0;
    started.warps[t / kWarpLanes].alive |= 1u << t % kWarpLanes;
  }
  for (int w = 0; w * kWarpLanes < threads; ++w) {
    started.warps[w].ready = started.warps[w].alive;
    started.ready_warps |= 1u << w;
  }
}

// Runs until a block has ended, or failed.
void run_blocks() {
  resume_best_turn();
  enter(pick());
  shim_switch(&scheduler, block->fibers[current].stack_pointer);
}

// Dynamic shared memory, and behind it some that must stay as it is.
char* allocate(size_t bytes) {
  const size_t rounded = (bytes + kGuardedTail + 127) & ~size_t{127};
  char* memory = static_cast<char*>(aligned_alloc(128, rounded));
#ifdef __SANITIZE_ADDRESS__
  ASAN_POISON_MEMORY_REGION(memory + bytes, rounded - bytes);
#endif
  return memory;
}

void release(char* memory, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory, (bytes + 127) & ~size_t{127});
#endif
  free(memory);
}

void check_tail(const Block& ended, size_t bytes) {
  for (size_t i = 0; i < kGuardedTail && !failed; ++i)
    if (static_cast<unsigned char>(ended.shared[bytes + i]) != kPoison) {
      snprintf(failure, sizeof failure, "%s, block (%u, %u, %u): wrote past the %zu bytes of dynamic shared memory",
               entry->name, ended.index.x, ended.index.y, ended.index.z, bytes);
      failed = true;
    }
}

struct Segment {
  const char* inside;  // any address of the library
  char* begin;
  size_t bytes;
};

int find_thread_local(dl_phdr_info* library, size_t, void* result) {
  auto& segment = *static_cast<Segment*>(result);
  bool ours = false;
  size_t bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const auto& header = library->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(library->dlpi_addr + header.p_vaddr);
    if (header.p_type == PT_LOAD) ours |= segment.inside >= begin && segment.inside < begin + header.p_memsz;
    if (header.p_type == PT_TLS) bytes = header.p_memsz;
  }
  if (!ours) return 0;
  segment.begin = static_cast<char*>(library->dlpi_tls_data);
  segment.bytes = bytes;
  return 1;
}

// This library's thread-local memory of the calling thread, which holds the static shared arrays and nothing else.
Segment static_shared(char* place) {
  static ptrdiff_t offset = -1;
  static size_t bytes;
  if (offset < 0) {
    Segment segment{reinterpret_cast<const char*>(&failure), nullptr, 0};
    dl_iterate_phdr(find_thread_local, &segment);
    offset = place - segment.begin, bytes = segment.bytes;
  }
  return {nullptr, place - offset, bytes};
}

}  // namespace

void fail(const char* format, ...) {
  char text[sizeof failure - 160];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  snprintf(failure, sizeof failure, "%s, block (%u, %u, %u), thread %d: %s", entry->name, blockIdx.x, blockIdx.y,
           blockIdx.z, current, text);
  failed = true;
  leave();
}

void collective(Operand& operand) {
  Warp& warp = block->warps[current / kWarpLanes];
  const int lane = current % kWarpLanes;
  if (warp.arrived && warp.kind != operand.kind)
    fail("divergence: this lane is at a collective of kind %d, the lanes %08x at one of kind %d",
         static_cast<int>(operand.kind), warp.arrived, static_cast<int>(warp.kind));
  warp.kind = operand.kind;
  warp.operands[lane] = &operand;
  warp.arrived |= 1u << lane;
  pause(warp, 1u << lane);
  complete_if_all_came(warp);
  yield();
}

void sync_block() {
  Warp& warp = block->warps[current / kWarpLanes];
  const unsigned bit = 1u << current % kWarpLanes;
  warp.at_barrier |= bit;
  ++block->at_barrier;
  pause(warp, bit);
  yield();
}

void interleave() {
  if (launch->schedule == 2 && !(random_source.next() & 3)) yield();
}

void interleave_blocks() {
  if (launch->schedule != 2) return;
  Fiber& from = block->fibers[current];
  if (resident > 1 && !(random_source.next() & 7)) {
    block->turn = --last_turn;
    resume_best_turn();
  } else if (random_source.next() & 3) {
    return;
  }
  go_on_from(from);
}

void issue_copy(void* target, const void* source, bool valid) {
  if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) & 15)
    fail("cp.async from %p to %p, which are not multiples of 16", source, target);
  memset(target, kPoison, 16);
  Fiber& fiber = block->fibers[current];
  fiber.copies.push_back({target, source, valid, fiber.groups});
  interleave();
}

void commit_copies() { ++block->fibers[current].groups; }

void wait_for_copies(int groups_left) {
  auto& copies = block->fibers[current].copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < block->fibers[current].groups - groups_left; ++done) {
    const Copy& copy = copies[done];
    if (copy.valid)
      memcpy(copy.target, copy.source, 16);
    else
      memset(copy.target, 0, 16);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

char* dynamic_shared() { return block->shared; }

int run(const Launch& what, const Entry& kernel, void** arguments, char* message, size_t size) {
  const std::lock_guard<std::mutex> lock(running);
  launch = &what, entry = &kernel, kernel_arguments = arguments, failed = false, last_turn = 0;
  random_source.state = what.seed * 0x9E3779B97F4A7C15ull | 1;
  const auto bytes = static_cast<size_t>(what.shared_bytes);
  const Segment segment = static_shared(kernel.static_shared);
  statics = segment.begin, static_bytes = segment.bytes;
  const auto [nx, ny, nz] = what.grid;
  gridDim = {static_cast<unsigned>(nx), static_cast<unsigned>(ny), static_cast<unsigned>(nz)};
  blockDim = {static_cast<unsigned>(what.threads), 1, 1};
  const int count = nx * ny * nz;
  resident = what.schedule == 2 && count > 1 ? (count < kResident ? count : kResident) : 1;
  std::vector<int> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < count; ++i) {
    if (what.schedule == 1) order[i] = count - 1 - i;
    if (what.schedule == 2) std::swap(order[i], order[i + random_source.next() % (count - i)]);
  }
  while (static_cast<int>(fibers.size()) < resident * what.threads) add_fibers();
  int started = 0;
  const auto start_next = [&](Block& free) {
    const int index = order[started++];
    start(free, {unsigned(index % nx), unsigned(index / nx % ny), unsigned(index / nx / ny)}, what.threads);
    memset(free.shared, kPoison, bytes + kGuardedTail);
  };
  for (int i = 0; i < resident; ++i) {
    blocks[i].fibers = &fibers[i * what.threads], blocks[i].shared = allocate(bytes);
    start_next(blocks[i]);
  }
  block = blocks, blockIdx = block->index;
  if (static_bytes) memcpy(statics, block->statics.data(), static_bytes);
  for (int ended = 0; ended < count && !failed; ++ended) {
    run_blocks();
    check_tail(*block, bytes);
    if (failed || started == count) continue;
    start_next(*block);
    blockIdx = block->index;
    if (static_bytes) memcpy(statics, block->statics.data(), static_bytes);
  }
#ifdef __SANITIZE_ADDRESS__
  if (failed)  // frames that will not return
    for (const Fiber& fiber : fibers) ASAN_UNPOISON_MEMORY_REGION(fiber.bottom, kStackBytes);
#endif
  for (int i = 0; i < resident; ++i) release(blocks[i].shared, bytes);
  if (failed) snprintf(message, size, "%s", failure);
  return failed ? -1 : 0;
}

}  // namespace shim
