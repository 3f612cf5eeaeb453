// Sums over the rows: each thread its own in float, then in double those of a block's threads, then
// those of the parts. Every order is fixed by the shape, so results have the same bits on any GPU.
#pragma once

#include "../common/moments.h"
#include "launch.cuh"

namespace rf::cuda {

// A thread's own sums stay in float over this many rows at most.
constexpr int kMostRows = 256;

// Into how many parts the rows are cut. 384 blocks of 16-bit maps all run at once, three on each of an
// H100's 132 multiprocessors; fewer where a thread would have less than 16 rows, so that a part's
// results are small beside what it reads, more where it would have over kMostRows.
inline int64_t device_parts(int64_t rows, int64_t c) {
  constexpr int64_t blocks = 384, wide = 256;  // channels of a tile of 32 threads, 8 apiece
  const int64_t by_rows = rows * min64(c, wide) / (16 * kThreads * 8);
  const int64_t by_blocks = max64(1, blocks * wide / max64(c, wide));
  // Every tiling has 8 rows of threads at least.
  const int64_t least = max64(1, ceil_div(rows, 8 * kMostRows));
  return max64(least, min64(by_rows, by_blocks));
}

// N vectors of W channels of every thread, put down for all threads of the block to read.
template <int N, int W>
struct PutDown {
  float at[N][kThreads * W];

  __device__ __forceinline__ void put(int i, const float (&channels)[W]) {
#pragma unroll
    for (int j = 0; j < W; ++j) at[i][threadIdx.x * W + j] = channels[j];
  }
};

// What a thread adds up once all have put down theirs: one channel of the tile, over W rows of
// threads. So all threads have as much to add, and a channel has `groups` of them.
template <int W>
struct Gather {
  int channels, channel, row, groups;

  __device__ __forceinline__ Gather(const Thread& t)
      : channels(t.lanes * W),
        channel((int)threadIdx.x % channels),
        row((int)threadIdx.x / channels * W),
        groups(kThreads / channels) {}

  __device__ __forceinline__ int64_t global(const Thread& t) const {
    return t.channel - t.lane * W + channel;
  }
  __device__ __forceinline__ float of(const float* put_down, int i) const {
    return put_down[(row + i) * channels + channel];
  }

  // The sum over a channel's threads, to each of them.
  __device__ __forceinline__ double over_groups(double own) const {
    __shared__ double of_thread[kThreads];
    if (groups == 1) return own;
    __syncthreads();
    of_thread[threadIdx.x] = own;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < groups; ++i) sum += of_thread[i * channels + channel];
    return sum;
  }
};

// `total` dealt out to `ways`, one by one, as rows are to threads and by part_begin to parts: how many
// each gets, and one over it.
struct Dealt {
  int64_t each, more;
  double over_each, over_more;

  __device__ __forceinline__ Dealt(int64_t total, int64_t ways)
      : each(total / ways),
        more(total % ways),
        over_each(each ? 1.0 / (double)each : 0),
        over_more(1.0 / (double)(each + 1)) {}

  __device__ __forceinline__ int64_t count(int64_t way) const { return each + (way < more); }
  __device__ __forceinline__ double of(int64_t way) const { return (double)count(way); }
  __device__ __forceinline__ double over(int64_t way) const { return way < more ? over_more : over_each; }
};

// The sum of value(p) over every step-th p from `first` on. Eight values are read before the first is
// added, as memory answers late; in place of those beyond the end the first is read again.
template <class F>
__device__ __forceinline__ double sum_parts(int64_t first, int64_t end, int64_t step, F value) {
  constexpr int N = 8;
  double sum = 0;
  for (int64_t p = first; p < end; p += N * step) {
    double values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = value(p + i * step < end ? p + i * step : p);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (p + i * step < end) sum += values[i];
  }
  return sum;
}

// For kernels with a thread row per few parts: 8 channels a block, and 32 threads for each.
inline Tiling tiling_over_parts(int64_t parts, int64_t c) {
  Tiling tiling(parts, c, 1);
  tiling.log2_lanes = 3;
  tiling.tiles = static_cast<unsigned>(ceil_div(c, 8));
  return tiling;
}

}  // namespace rf::cuda
