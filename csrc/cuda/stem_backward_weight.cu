// The gradient of the stem's weight: (outputs, pixels) times (pixels, windows), with windows read as
// forward reads them, and both operands turned on their way into registers.
//
// A block sums over bands of the output, one after another; each of its four warps has two of the
// eight pixels of a window's rows, the last of which is none and is not kept. Blocks leave their sums
// apart.
#include "stem_rows.cuh"

namespace rf::cuda {
namespace {

constexpr int kOutputTiles = kStemChannels / 16;
constexpr int kPieces = kStemChannels / 8;                      // of 16 bytes, of an output's pixel
constexpr int kOfThread = kStemColumns * kPieces / kBlock;

struct StemGradGrid : StemGradArgs {
  int64_t oh, ow, bands, tiles;
};

// A row of the output's gradient, as a thread fetches it.
struct GradRow {
  uint4 pieces[kOfThread];

  __device__ __forceinline__ void load(const StemGradGrid& g, int64_t row, int column0, int columns,
                                       int64_t channel0) {
    const int piece = threadIdx.x % kPieces;
    const auto* from = static_cast<const char*>(g.grad) +
                       2 * ((row * g.ow + column0) * g.o + channel0 + 8 * piece);
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      const int column = (int)threadIdx.x / kPieces + j * (kBlock / kPieces);
      pieces[j] = column < columns ? *reinterpret_cast<const uint4*>(from + 2 * column * g.o)
                                   : uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ void store(char* grads) const {
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      const int column = (int)threadIdx.x / kPieces + j * (kBlock / kPieces);
      *reinterpret_cast<uint4*>(grads + column * kMapRow + threadIdx.x % kPieces * 16) = pieces[j];
    }
  }
};

// Of a pair of elements those of which there are `left`.
__device__ __forceinline__ uint32_t first_of(int left) {
  return left >= 2 ? 0xffffffff : left == 1 ? 0xffff : 0;
}

template <class E, int C>
__global__ void __launch_bounds__(kBlock, 2) stem_backward_weight_kernel(const StemGradGrid g) {
  alignas(16) __shared__ char rows[kSlots * kRow];
  alignas(16) __shared__ char grads[kStemColumns * kMapRow];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t channel0 = (int64_t)blockIdx.y * kStemChannels;
  float sums[kOutputTiles][kTaps][4] = {};

  for (int64_t unit = blockIdx.x; unit < g.n * g.bands * g.tiles; unit += g.parts) {
    const int64_t rest = unit / g.tiles, image = rest / g.bands;
    const int column0 = (int)(unit % g.tiles) * kStemColumns;
    const int columns = min((int)g.ow - column0, kStemColumns);
    const int r0 = (int)(rest % g.bands * g.band), r1 = min((int)g.oh, r0 + (int)g.band);
    const Fetch<E, C> fetch(g, image, 2 * column0 - 3);
    using Pixels = typename E::T[Fetch<E, C>::kOfThread][C];
    GradRow grad;
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      Pixels pixels;
      fetch.load(2 * r0 - 3 + i, pixels);
      fetch.store(rows + i * kRow, pixels);
    }
    grad.load(g, image * g.oh + r0, column0, columns, channel0);
    grad.store(grads);
    __syncthreads();

    for (int r = r0; r < r1; ++r) {
      const int slot = 2 * (r - r0);
      Pixels next[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) fetch.load(2 * r - 3 + kTaps + i, next[i]);
      if (r + 1 < r1) grad.load(g, image * g.oh + r + 1, column0, columns, channel0);

#pragma unroll
      for (int k = 0; k < kStemColumns / 16; ++k) {
        const int left = columns - k * 16;
        if (left <= 0) break;
        uint32_t a[kOutputTiles][4];
#pragma unroll
        for (int m = 0; m < kOutputTiles; ++m) {
          const int column = k * 16 + lane / 16 * 8 + lane % 8, output = m * 16 + lane / 8 % 2 * 8;
          load_transposed(a[m], grads + column * kMapRow + 2 * output);
        }
#pragma unroll
        for (int t = 0; t < kTaps; t += 2) {
          const int row = min(t + lane / 16, kTaps - 1), column = k * 16 + lane / 8 % 2 * 8 + lane % 8;
          uint32_t b[4];
          load_transposed(b, rows + (slot + row) % kSlots * kRow + (column + warp) * 16);
          if (left < 16) {  // what lies behind the last column may be NaN, or infinite
            const uint32_t near = first_of(left - lane % 4 * 2), far = first_of(left - 8 - lane % 4 * 2);
            b[0] &= near, b[1] &= far, b[2] &= near, b[3] &= far;
          }
#pragma unroll
          for (int m = 0; m < kOutputTiles; ++m) {
            multiply<E>(sums[m][t], a[m], uint2{b[0], b[1]});
            if (t + 1 < kTaps) multiply<E>(sums[m][t + 1], a[m], uint2{b[2], b[3]});
          }
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 2; ++i)
        fetch.store(rows + (slot + kTaps + i) % kSlots * kRow, next[i]);
      grad.store(grads);
      __syncthreads();
    }
  }

#pragma unroll
  for (int m = 0; m < kOutputTiles; ++m)
#pragma unroll
    for (int row = 0; row < kTaps; ++row)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int element = lane % 4 * 2 + i % 2, tap = warp * 2 + element / 4, c = element % 4;
        const int64_t output = channel0 + m * 16 + lane / 4 + i / 2 * 8;
        if (tap < kTaps && c < g.c)
          g.partial[(((blockIdx.x * g.o + output) * kTaps + row) * kTaps + tap) * g.c + c] =
              sums[m][row][i];
      }
}

}  // namespace

void launch(DType dtype, const StemGradArgs& args, Stream stream) {
  const int64_t oh = (args.h - 1) / 2 + 1, ow = (args.w - 1) / 2 + 1;
  const StemGradGrid g{args, oh, ow, ceil_div(oh, args.band), ceil_div(ow, kStemColumns)};
  const int64_t groups = args.o / kStemChannels;
  if (args.parts > 0x7fffffff || groups > 0xffff || args.h * args.w * args.c > 0x7fffffff)
    throw std::runtime_error("stem_backward_weight: the map is too large");
  const auto with = [&](auto element) {
    using E = decltype(element);
    put("stem_backward_weight",
        args.c == 3 ? stem_backward_weight_kernel<E, 3> : stem_backward_weight_kernel<E, 4>,
        dim3((unsigned)args.parts, (unsigned)groups), dim3(kBlock), g, stream);
  };
  dtype == DType::bf16 ? with(Bf16{}) : with(F16{});
}

}  // namespace rf::cuda
