// As much of CUDA as the kernels use, on the host: a block's threads are coroutines that take turns
// from barrier to barrier, of the block or of a warp. The kernels then compile as C++, and tests and
// sanitizers see all they do.
#pragma once

#include <cstdint>
#include <functional>

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

extern uint3 threadIdx, blockIdx;

// Of block.cpp.
namespace on_host {

// Runs blocks of so many threads one after another; kernel() is a thread.
void run_grid(dim3 grid, unsigned threads, const std::function<void()>& kernel);
void barrier();
void warp_barrier();

// Gives blocks and threads their turns from the last to the first, so that a race shows in the results.
extern bool reversed;

}  // namespace on_host

inline void __syncthreads() { on_host::barrier(); }
inline void __syncwarp() { on_host::warp_barrier(); }

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
  on_host::run_grid(grid, block.x, [&] { kernel(*static_cast<Args*>(args[0])); });
  return cudaSuccess;
}
