// As much of CUDA as the kernels use, on the host: a block's threads are coroutines that take turns
// from barrier to barrier, of the block or of a warp. The kernels then compile as C++, and tests and sanitizers see all they do.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline void __stwb(uint4* to, uint4 v) { *to = v; }

// Byte i is that of the eight of y and x which digit i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  unsigned bytes = 0;
  for (int i = 0; i < 4; ++i) bytes |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return bytes;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline uint3 threadIdx, blockIdx;

namespace on_host {

// Runs the threads of one block at a time; `reversed` gives turns from the last thread to the first,
// so that a race between barriers shows in the results.
class Block {
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
  };
  // Threads that wait for each other: how many have come, and how often all had.
  struct Meeting {
    unsigned size, come, times;
  };
  static constexpr size_t kStack = 256 << 10;
  std::vector<Fibre> fibres_;
  Meeting block_;
  std::vector<Meeting> warps_;
  bool moved_ = false;
  ucontext_t scheduler_;
  std::function<void()> kernel_;
  size_t current_ = 0;

  static void enter() {
    Block& block = instance();
    block.kernel_();
    block.fibres_[block.current_].done = block.moved_ = true;
  }

  void meet(Meeting& meeting) {
    const unsigned times = meeting.times;
    moved_ = true;
    if (++meeting.come == meeting.size) {
      meeting.come = 0;
      ++meeting.times;
    }
    do swapcontext(&fibres_[current_].context, &scheduler_);
    while (meeting.times == times);
  }

 public:
  bool reversed = false;

  static Block& instance() {
    static Block block;
    return block;
  }

  void run(unsigned threads, std::function<void()> kernel) {
    kernel_ = std::move(kernel);
    fibres_.resize(threads);
    for (Fibre& fibre : fibres_) {
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get();
      fibre.context.uc_stack.ss_size = kStack;
      fibre.context.uc_link = &scheduler_;
      fibre.done = false;
      makecontext(&fibre.context, enter, 0);
    }
    block_ = {threads, 0, 0};
    warps_.assign((threads + 31) / 32, {0, 0, 0});
    for (unsigned i = 0; i < threads; ++i) ++warps_[i / 32].size;
    for (size_t done = 0; done < threads;) {
      done = 0;
      moved_ = false;
      for (unsigned turn = 0; turn < threads; ++turn) {
        current_ = reversed ? threads - 1 - turn : turn;
        threadIdx.x = (unsigned)current_;
        if (!fibres_[current_].done) swapcontext(&scheduler_, &fibres_[current_].context);
        done += fibres_[current_].done;
      }
      if (!moved_) {
        std::fputs("some threads of a block reached a barrier, others their end\n", stderr);
        std::abort();
      }
    }
  }

  void barrier() { meet(block_); }
  void warp_barrier() { meet(warps_[current_ / 32]); }
};

}  // namespace on_host

inline void __syncthreads() { on_host::Block::instance().barrier(); }
inline void __syncwarp() { on_host::Block::instance().warp_barrier(); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidResourceHandle = 400 };

inline const char* cudaGetErrorString(cudaError_t) { return "invalid resource handle"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

// Any stream but the default one is refused.
template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 block, void** args, size_t,
                             cudaStream_t stream) {
  if (stream) return cudaErrorInvalidResourceHandle;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      on_host::Block::instance().run(block.x, [&] { kernel(*static_cast<Args*>(args[0])); });
  return cudaSuccess;
}
