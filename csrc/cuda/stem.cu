// The stem of a ResNet, y = max_pool(act(conv(x, weight) * scale + shift)), in one pass: 7x7 of
// stride 2 and padding 3 over up to four channels, then 3x3 of stride 2 and padding 1.
//
// Rows of x lie in shared memory with four channels a pixel, zeros where x has fewer. Two pixels are
// 16 bytes, and so is the step from one window to the next: a matrix of windows is read where its
// rows overlap, and nothing is copied out. K runs over kernel rows and 8 pixels of each, of which the
// last is no tap: it is cleared in registers, as it may be NaN or infinite.
//
// A block walks down a band of the output. Each of its four warps has half of the columns of the map
// between the two and half of its channels, their weights in registers all the way. Of that map
// stays what the pool needs: the largest of the rows so far.
#include "launch.cuh"
#include "mma.cuh"
#include "stem.h"

namespace rf::cuda {
namespace {

constexpr int kBlock = 128, kSlots = 16;                 // threads; rows of x in shared memory
constexpr int kTaps = 7, kSteps = 2 * kTaps;             // rows of the kernel; of K by 16
constexpr int kColumnTiles = 4, kChannelTiles = 4;       // of 16 columns and 8 channels, of a warp
constexpr int kRow = 16 * (kStemColumns + 4);            // bytes of a row of x
constexpr int kMapRow = 2 * kStemChannels + 16;          // of a row of the map; no banks in common

struct StemGrid : StemArgs {
  int64_t oh, ow, ph, pw, bands, tiles;
};

// A pixel of x as four elements.
template <class E>
__device__ __forceinline__ uint2 pixel(const StemGrid& g, int64_t image, int64_t row, int64_t column) {
  union {
    uint2 whole;
    typename E::T at[4];
  } v;
  v.whole = uint2{0, 0};
  if (row < 0 || row >= g.h || column < 0 || column >= g.w) return v.whole;
  const auto* from = static_cast<const typename E::T*>(g.x) + ((image * g.h + row) * g.w + column) * g.c;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < g.c) v.at[i] = from[i];
  return v.whole;
}

template <class E>
__device__ __forceinline__ uint32_t packed(float first, float second) {
  union {
    uint32_t whole;
    typename E::T at[2];
  } v;
  v.at[0] = E::narrow(first);
  v.at[1] = E::narrow(second);
  return v.whole;
}

template <class E>
__global__ void __launch_bounds__(kBlock, 2) stem_kernel(const StemGrid g) {
  alignas(16) __shared__ char rows[kSlots * kRow];
  alignas(16) __shared__ char map[kStemColumns * kMapRow];
  __shared__ float scale[kStemChannels], shift[kStemChannels];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t tile = blockIdx.x % g.tiles, rest = blockIdx.x / g.tiles;
  const int64_t band = rest % g.bands, image = rest / g.bands;
  const int64_t channel0 = (int64_t)blockIdx.y * kStemChannels;
  // The first tile begins with the map's first column, the others with the one before a window's.
  const int64_t q0 = tile == 0 ? 0 : kStemColumns / 2 + (tile - 1) * (kStemColumns / 2 - 1);
  const int64_t q1 = min64(g.pw, tile == 0 ? kStemColumns / 2 : q0 + kStemColumns / 2 - 1);
  const int64_t column0 = tile == 0 ? 0 : 2 * q0 - 1;
  const int64_t y0 = band * g.band, y1 = min64(g.ph, y0 + g.band);
  const int64_t r0 = max64(0, 2 * y0 - 1), r1 = min64(g.oh, 2 * y1);
  const int64_t x_row0 = 2 * r0 - 3, x_column0 = 2 * column0 - 3;
  if (thread < kStemChannels) {
    scale[thread] = g.scale ? g.scale[channel0 + thread] : 1;
    shift[thread] = g.shift ? g.shift[channel0 + thread] : 0;
  }
  constexpr int kPixels = kRow / 8, kOfThread = (kPixels + kBlock - 1) / kBlock;
  for (int i = 0; i < kTaps; ++i)
    for (int s = thread; s < kPixels; s += kBlock)
      *reinterpret_cast<uint2*>(rows + i * kRow + 8 * s) =
          pixel<E>(g, image, x_row0 + i, x_column0 + s);

  // Halves of the columns of unlike size: blocks side by side take turns with the larger.
  const int half = (warp / 2 + blockIdx.x) % 2, channels = warp % 2;
  uint2 b[kSteps][kChannelTiles];
  const auto* weight = static_cast<const uint2*>(g.weight) +
                       ((channel0 / 32 + channels) * kSteps * kChannelTiles) * 32 + lane;
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int n = 0; n < kChannelTiles; ++n) b[k][n] = weight[(k * kChannelTiles + n) * 32];

  const int column = half * kColumnTiles * 16, of_lane = lane % 8 + lane / 8 % 2 * 8;
  const int ours = half ? kStemColumns / 16 - kColumnTiles : kColumnTiles;
  const int lane_offset = (column + of_lane) * 16 + lane / 16 * 16;
  const uint32_t taps = lane & 2 ? 0 : 0xffffffff;  // of the last two pixels, the first
  const uint32_t nothing = packed<E>(-INFINITY, -INFINITY);
  uint32_t best[kColumnTiles][kChannelTiles][2];
#pragma unroll
  for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
    for (int n = 0; n < kChannelTiles; ++n) best[m][n][0] = best[m][n][1] = nothing;
  __syncthreads();

  for (int64_t r = r0; r < r1; ++r) {
    const int slot = (int)(2 * (r - r0));
    uint2 next[2][kOfThread];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kOfThread; ++j)
        next[i][j] = pixel<E>(g, image, x_row0 + slot + kTaps + i, x_column0 + thread + j * kBlock);

    float sums[kColumnTiles][kChannelTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const char* from = rows + (slot + k / 2) % kSlots * kRow + lane_offset + k % 2 * 32;
#pragma unroll
      for (int m = 0; m < kColumnTiles; ++m) {
        if (m >= ours) break;
        uint32_t a[4];
        load_matrices(a, from + m * 256);
        if (k % 2) {
          a[2] &= taps;
          a[3] &= taps;
        }
#pragma unroll
        for (int n = 0; n < kChannelTiles; ++n) multiply<E>(sums[m][n], a, b[k][n]);
      }
    }

    const bool ends = r % 2 || r == g.oh - 1;  // a window's last row; an odd one begins the next
#pragma unroll
    for (int n = 0; n < kChannelTiles; ++n) {
      const int channel = channels * 32 + n * 8 + lane % 4 * 2;
      const float s0 = scale[channel], s1 = scale[channel + 1];
      const float t0 = shift[channel], t1 = shift[channel + 1];
#pragma unroll
      for (int m = 0; m < kColumnTiles; ++m) {
        if (m >= ours) break;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float *v = sums[m][n] + 2 * i;
          const uint32_t value = packed<E>(v[0] * s0 + t0, v[1] * s1 + t1);
          const uint32_t most = larger<E>(best[m][n][i], value);
          best[m][n][i] = r % 2 ? value : most;
          const int at = column + m * 16 + lane / 4 + i * 8;
          if (ends) *reinterpret_cast<uint32_t*>(map + at * kMapRow + 2 * channel) = most;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kOfThread; ++j) {
        const int s = thread + j * kBlock;
        if (s < kPixels)
          *reinterpret_cast<uint2*>(rows + (slot + kTaps + i) % kSlots * kRow + 8 * s) = next[i][j];
      }
    __syncthreads();

    const int64_t y = r / 2;
    if (!ends || y < y0) continue;
    // Until it is written over there is a row that ends no window, but before the map's last one.
    constexpr int kPieces = kStemChannels / 8;
    for (int i = thread; i < (int)(q1 - q0) * kPieces; i += kBlock) {
      const int64_t q = q0 + i / kPieces;
      const int piece = i % kPieces;
      uint4 v{nothing, nothing, nothing, nothing};
      for (int64_t x = max64(0, 2 * q - 1); x < min64(g.ow, 2 * q + 2); ++x) {
        const uint4 w = *reinterpret_cast<const uint4*>(map + (x - column0) * kMapRow + 16 * piece);
        v = {larger<E>(v.x, w.x), larger<E>(v.y, w.y), larger<E>(v.z, w.z), larger<E>(v.w, w.w)};
      }
      if (g.relu)
        v = {larger<E>(v.x, 0), larger<E>(v.y, 0), larger<E>(v.z, 0), larger<E>(v.w, 0)};
      auto* to = static_cast<typename E::T*>(g.y) + ((image * g.ph + y) * g.pw + q) * g.o + channel0;
      __stwb(reinterpret_cast<uint4*>(to + 8 * piece), v);
    }
    if (r + 2 == g.oh) __syncthreads();
  }
}

}  // namespace

void launch(DType dtype, const StemArgs& args, Stream stream) {
  const int64_t oh = (args.h - 1) / 2 + 1, ow = (args.w - 1) / 2 + 1;
  const int64_t ph = (oh - 1) / 2 + 1, pw = (ow - 1) / 2 + 1;
  const int64_t beyond = pw - kStemColumns / 2;
  StemGrid g{args, oh, ow, ph, pw, ceil_div(ph, args.band),
             beyond > 0 ? 1 + ceil_div(beyond, kStemColumns / 2 - 1) : 1};
  const int64_t blocks = args.n * g.bands * g.tiles, groups = args.o / kStemChannels;
  if (blocks == 0) return;
  if (blocks > 0x7fffffff || groups > 0xffff)
    throw std::runtime_error("conv_bn_act_max_pool: the map is too large");
  put("conv_bn_act_max_pool", dtype == DType::bf16 ? stem_kernel<Bf16> : stem_kernel<F16>,
      dim3((unsigned)blocks, (unsigned)groups), dim3(kBlock), g, stream);
}

}  // namespace rf::cuda
