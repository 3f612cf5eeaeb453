// Turns of a block's threads. Built without sanitizers: what it does itself is no kernel's.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime.h"

// ThreadSanitizer's, where the module is built for it: a thread of a block is a fibre there.
extern "C" {
#define OPTIONAL __attribute__((weak))
OPTIONAL void* __tsan_get_current_fiber();
OPTIONAL void* __tsan_create_fiber(unsigned flags);
OPTIONAL void __tsan_switch_to_fiber(void* fibre, unsigned flags);
OPTIONAL void __tsan_acquire(void* address);
OPTIONAL void __tsan_release(void* address);
#undef OPTIONAL
}

uint3 threadIdx, blockIdx;

namespace on_host {

bool reversed = false;

namespace {

// What one thread did before it came, another sees after it left: ThreadSanitizer is told so.
void leave_to_others(void* address) {
  if (__tsan_release) __tsan_release(address);
}
void take_from_others(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}

// A turn alone orders nothing.
void switch_to(void* watched) {
  constexpr unsigned kNoSync = 1;
  if (watched) __tsan_switch_to_fiber(watched, kNoSync);
}

// Threads that wait for each other.
struct Meeting {
  unsigned size, come = 0, times = 0;
  char places[2];  // one in turns: nobody leaves at the second what others find at the first
};

class Fibre {
  std::unique_ptr<char[]> stack_{new char[kStack]};
  ucontext_t context_;
  void* watched_ = nullptr;

 public:
  static constexpr size_t kStack = 256 << 10;
  bool done = false;

  void begin(void (*function)(), ucontext_t* then) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = then;
    makecontext(&context_, function, 0);
    done = false;
    if (!watched_ && __tsan_create_fiber) watched_ = __tsan_create_fiber(0);
  }
  void enter(ucontext_t* from) {
    switch_to(watched_);
    swapcontext(from, &context_);
  }
  ucontext_t* context() { return &context_; }
};

class Block {
  std::vector<Fibre> fibres_;
  Meeting block_;
  std::vector<Meeting> warps_;
  bool moved_ = false;
  ucontext_t scheduler_;
  void* watched_scheduler_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  size_t current_ = 0;
  char begin_, end_;  // places of what is before a block's threads, and of what they leave

  static void thread();

  void meet(Meeting& meeting) {
    const unsigned times = meeting.times;
    char* place = &meeting.places[times % 2];
    leave_to_others(place);
    moved_ = true;
    if (++meeting.come == meeting.size) {
      meeting.come = 0;
      ++meeting.times;
    }
    do {
      switch_to(watched_scheduler_);
      swapcontext(fibres_[current_].context(), &scheduler_);
    } while (meeting.times == times);
    take_from_others(place);
  }

 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    if (__tsan_get_current_fiber) watched_scheduler_ = __tsan_get_current_fiber();
    if (fibres_.size() < threads) fibres_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) fibres_[i].begin(thread, &scheduler_);
    block_ = {threads};
    warps_.assign((threads + 31) / 32, {0});
    for (unsigned i = 0; i < threads; ++i) ++warps_[i / 32].size;
    leave_to_others(&begin_);
    for (size_t done = 0; done < threads;) {
      done = 0;
      moved_ = false;
      for (unsigned turn = 0; turn < threads; ++turn) {
        current_ = reversed ? threads - 1 - turn : turn;
        threadIdx.x = (unsigned)current_;
        if (!fibres_[current_].done) fibres_[current_].enter(&scheduler_);
        done += fibres_[current_].done;
      }
      if (!moved_) {
        std::fputs("some threads of a block reached a barrier, others their end\n", stderr);
        std::abort();
      }
    }
    take_from_others(&end_);
  }

  void barrier() { meet(block_); }
  void warp_barrier() { meet(warps_[current_ / 32]); }
};

Block the_block;

void Block::thread() {
  Block& block = the_block;
  take_from_others(&block.begin_);
  (*block.kernel_)();
  block.fibres_[block.current_].done = block.moved_ = true;
  leave_to_others(&block.end_);
  switch_to(block.watched_scheduler_);
}

}  // namespace

void run_grid(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  const unsigned blocks = grid.x * grid.y;
  for (unsigned turn = 0; turn < blocks; ++turn) {
    const unsigned block = reversed ? blocks - 1 - turn : turn;
    blockIdx.x = block % grid.x;
    blockIdx.y = block / grid.x;
    the_block.run(threads, kernel);
  }
}

void barrier() { the_block.barrier(); }
void warp_barrier() { the_block.warp_barrier(); }

}  // namespace on_host
