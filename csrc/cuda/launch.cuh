// How a map (rows, c) is shared out among threads, and how a kernel is put on a stream.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "element.cuh"
#include "kernels.h"

namespace rf::cuda {

constexpr int kThreads = 256;
constexpr int kMostLog2Lanes = 5;

// A block works on one part of the rows and on one tile of the channels: `lanes` threads along the
// channels, the others along the rows.
struct Tiling {
  int64_t rows, c, parts;
  unsigned tiles;
  int log2_lanes;

  Tiling(int64_t rows, int64_t c, int width) : rows(rows), c(c), parts(1), log2_lanes(0) {
    const int64_t vectors = ceil_div(c, width);
    while (log2_lanes < kMostLog2Lanes && (1 << log2_lanes) < vectors) ++log2_lanes;
    tiles = static_cast<unsigned>(ceil_div(vectors, 1 << log2_lanes));
  }

  int rows_at_once() const { return kThreads >> log2_lanes; }
  int64_t blocks() const { return parts * tiles; }
};

// Where one thread of a tiling stands. Threads beyond the last channel have nothing to read.
struct Thread {
  int64_t channel, part;
  int row, step, lane, lanes;
  bool inside;

  __device__ __forceinline__ Thread(const Tiling& t, int width) {
    const unsigned block = blockIdx.x;
    lanes = 1 << t.log2_lanes;
    lane = threadIdx.x & (lanes - 1);
    row = threadIdx.x >> t.log2_lanes;
    step = kThreads >> t.log2_lanes;
    part = block / t.tiles;
    channel = ((int64_t)(block % t.tiles) * lanes + lane) * width;
    inside = channel < t.c;
  }
};

template <class Args>
struct Tiled : Args {
  Tiling tiling;
};

// Puts a kernel of one struct of arguments on a stream; `name` is for the error.
template <class Args>
void put(const char* name, void (*kernel)(const Args), dim3 grid, dim3 block, const Args& args,
         Stream stream) {
  void* pointers[] = {const_cast<Args*>(&args)};
  const cudaError_t error =
      cudaLaunchKernel(kernel, grid, block, pointers, 0, (cudaStream_t)stream);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(error));
}

// Likewise as so many blocks of kThreads.
template <class Args>
void put(const char* name, void (*kernel)(const Args), int64_t blocks, const Args& args,
         Stream stream) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(name) + ": the map is too large");
  put(name, kernel, dim3((unsigned)blocks), dim3(kThreads), args, stream);
}

inline bool aligned(std::initializer_list<const void*> addresses) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % kAccess) return false;
  return true;
}

// f(E, W) with the element type of dtype, and W a whole access where every address and the number
// of channels allow it, else 1.
template <class F>
void with_element(DType dtype, int64_t c, std::initializer_list<const void*> addresses, F f) {
  const auto with_width = [&](auto element) {
    constexpr int width = kAccess / sizeof(typename decltype(element)::T);
    if (c % width == 0 && aligned(addresses))
      f(element, std::integral_constant<int, width>{});
    else
      f(element, std::integral_constant<int, 1>{});
  };
  if (dtype == DType::f32) return with_width(F32{});
  dtype == DType::bf16 ? with_width(Bf16{}) : with_width(F16{});
}

}  // namespace rf::cuda
