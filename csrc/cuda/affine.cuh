// BatchNorm's scale and shift as a kernel has them: read, or made by each block of its own channels,
// which spares a launch.
#pragma once

#include "../common/bn_vectors.h"
#include "launch.cuh"

namespace rf::cuda {

// Of a thread's W channels. All threads of a block come here, also those beyond the last channel.
template <int W>
struct BlockAffine {
  Channels<W> scale, shift;

  template <class G>
  __device__ __forceinline__ BlockAffine(const G& g, const Thread& t) {
    static_assert(W << kMostLog2Lanes <= kThreads, "one channel of a tile for each thread");
    __shared__ float of_tile[2][kThreads];
    if (!g.norm.var) {
      if (t.inside) {
        scale = Channels<W>(g.scale, t.channel);
        shift = Channels<W>(g.shift, t.channel);
      }
      return;
    }
    const int own = (int)threadIdx.x;
    const int64_t channel = t.channel - t.lane * W + own;
    if (own < t.lanes * W && channel < g.c)
      bn_scale_shift(g.norm, channel, of_tile[0][own], of_tile[1][own]);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < W; ++j) {
      scale.at[j] = of_tile[0][t.lane * W + j];
      shift.at[j] = of_tile[1][t.lane * W + j];
    }
  }
};

}  // namespace rf::cuda
