// Rows of x in shared memory, as the stem's kernels multiply them: with four channels a pixel, zeros
// where x has fewer. Two pixels are 16 bytes, and so is the step from one window of stride 2 to the
// next: a matrix of windows is read where its rows overlap, and nothing is copied out.
#pragma once

#include "launch.cuh"
#include "mma.cuh"
#include "stem.h"

namespace rf::cuda {
namespace {

constexpr int kBlock = 128, kSlots = 16, kTaps = 7;  // threads; rows of x there; rows of the kernel
constexpr int kRow = 16 * (kStemColumns + 4);        // bytes of a row of x
constexpr int kMapRow = 2 * kStemChannels + 16;      // of a row of an output; no banks in common

// Pixels of x as a thread fetches them: every kBlock-th of a row's columns. They are loaded ahead and
// put together when they are stored, or each would be waited for at once.
template <class E, int C>
struct Fetch {
  static constexpr int kPixels = kRow / 8, kOfThread = (kPixels + kBlock - 1) / kBlock;
  using T = typename E::T;
  const T* image;
  int h, pitch, channels, first;
  unsigned inside;  // a bit for each of the thread's columns

  template <class Args>
  __device__ __forceinline__ Fetch(const Args& g, int64_t n, int column0)
      : image(static_cast<const T*>(g.x) + n * g.h * g.w * g.c),
        h((int)g.h),
        pitch((int)(g.w * g.c)),
        channels((int)g.c),
        first((column0 + (int)threadIdx.x) * channels),
        inside(0) {
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      const int column = column0 + (int)threadIdx.x + j * kBlock;
      inside |= (unsigned)(column >= 0 && column < g.w) << j;
    }
  }

  __device__ __forceinline__ void load(int row, T (&pixels)[kOfThread][C]) const {
    const bool row_inside = row >= 0 && row < h;
    const T* from = image + (int64_t)row * pitch + first;
#pragma unroll
    for (int j = 0; j < kOfThread; ++j)
#pragma unroll
      for (int i = 0; i < C; ++i) {
        const bool there = row_inside && (inside >> j & 1) && (C == 3 || i < channels);
        pixels[j][i] = there ? from[j * kBlock * channels + i] : E::narrow(0);
      }
  }

  static __device__ __forceinline__ void store(char* row, const T (&pixels)[kOfThread][C]) {
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      union {
        uint2 whole;
        T at[4];
      } v;
      v.whole = uint2{0, 0};
#pragma unroll
      for (int i = 0; i < C; ++i) v.at[i] = pixels[j][i];
      const int column = (int)threadIdx.x + j * kBlock;
      if (column < kPixels) *reinterpret_cast<uint2*>(row + 8 * column) = v.whole;
    }
  }
};

}  // namespace
}  // namespace rf::cuda
