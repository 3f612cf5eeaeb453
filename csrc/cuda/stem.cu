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

// Pixels of x as a thread fetches them: every kBlock-th of a row's columns. They are loaded ahead and
// put together when they are stored, or each would be waited for at once.
template <class E, int C>
struct Fetch {
  static constexpr int kPixels = kRow / 8, kOfThread = (kPixels + kBlock - 1) / kBlock;
  using T = typename E::T;
  const T* image;
  int h, pitch, channels, first;
  unsigned inside;  // a bit for each of the thread's columns

  __device__ __forceinline__ Fetch(const StemGrid& g, int64_t n, int column0, int thread)
      : image(static_cast<const T*>(g.x) + n * g.h * g.w * g.c),
        h((int)g.h), pitch((int)(g.w * g.c)), channels((int)g.c), first((column0 + thread) * channels),
        inside(0) {
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      const int column = column0 + thread + j * kBlock;
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

  static __device__ __forceinline__ void store(char* row, int thread, const T (&pixels)[kOfThread][C]) {
#pragma unroll
    for (int j = 0; j < kOfThread; ++j) {
      union {
        uint2 whole;
        T at[4];
      } v;
      v.whole = uint2{0, 0};
#pragma unroll
      for (int i = 0; i < C; ++i) v.at[i] = pixels[j][i];
      const int column = thread + j * kBlock;
      if (column < kPixels) *reinterpret_cast<uint2*>(row + 8 * column) = v.whole;
    }
  }
};

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

template <class E, int C>
__global__ void __launch_bounds__(kBlock, 2) stem_kernel(const StemGrid g) {
  alignas(16) __shared__ char rows[kSlots * kRow];
  alignas(16) __shared__ char map[kStemColumns * kMapRow];
  __shared__ float scale[kStemChannels], shift[kStemChannels];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t tile = blockIdx.x % g.tiles, rest = blockIdx.x / g.tiles;
  const int64_t band = rest % g.bands, image = rest / g.bands;
  const int64_t channel0 = (int64_t)blockIdx.y * kStemChannels;
  // The first tile begins with the map's first column, the others with the one before a window's.
  const int q0 = (int)(tile == 0 ? 0 : kStemColumns / 2 + (tile - 1) * (kStemColumns / 2 - 1));
  const int q1 = min((int)g.pw, q0 + kStemColumns / 2 - (tile != 0));
  const int column0 = tile == 0 ? 0 : 2 * q0 - 1, last_column = (int)g.ow - 1 - column0;
  const int y0 = (int)(band * g.band), y1 = (int)min64(g.ph, y0 + g.band);
  const int r0 = max(0, 2 * y0 - 1), r1 = min((int)g.oh, 2 * y1);
  if (thread < kStemChannels) {
    scale[thread] = g.scale ? g.scale[channel0 + thread] : 1;
    shift[thread] = g.shift ? g.shift[channel0 + thread] : 0;
  }
  using Pixels = typename E::T[Fetch<E, C>::kOfThread][C];
  const Fetch<E, C> fetch(g, image, 2 * column0 - 3, thread);
  const int x_row0 = 2 * r0 - 3;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    Pixels pixels;
    fetch.load(x_row0 + i, pixels);
    fetch.store(rows + i * kRow, thread, pixels);
  }

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

  for (int r = r0; r < r1; ++r) {
    const int slot = 2 * (r - r0);
    Pixels next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) fetch.load(x_row0 + slot + kTaps + i, next[i]);

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
      fetch.store(rows + (slot + kTaps + i) % kSlots * kRow, thread, next[i]);
    __syncthreads();

    const int y = r / 2;
    if (!ends || y < y0) continue;
    // Until it is written over there is a row that ends no window, but before the map's last one.
    constexpr int kPieces = kStemChannels / 8;
    auto* to = static_cast<typename E::T*>(g.y) +
               ((image * g.ph + y) * g.pw + q0) * g.o + channel0 + thread % kPieces * 8;
    for (int q = thread / kPieces; q < q1 - q0; q += kBlock / kPieces) {
      const int middle = 2 * (q0 + q) - column0;
      uint4 v{nothing, nothing, nothing, nothing};
#pragma unroll
      for (int i = -1; i <= 1; ++i) {
        const int at = min(max(middle + i, 0), last_column);  // at an edge one of them twice
        const uint4 w = *reinterpret_cast<const uint4*>(map + at * kMapRow + thread % kPieces * 16);
        v = {larger<E>(v.x, w.x), larger<E>(v.y, w.y), larger<E>(v.z, w.z), larger<E>(v.w, w.w)};
      }
      if (g.relu)
        v = {larger<E>(v.x, 0), larger<E>(v.y, 0), larger<E>(v.z, 0), larger<E>(v.w, 0)};
      __stwb(reinterpret_cast<uint4*>(to + q * g.o), v);
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
  if (blocks > 0x7fffffff || groups > 0xffff || args.h * args.w * args.c > 0x7fffffff)
    throw std::runtime_error("conv_bn_act_max_pool: the map is too large");
  const auto with = [&](auto element) {
    using E = decltype(element);
    put("conv_bn_act_max_pool", args.c == 3 ? stem_kernel<E, 3> : stem_kernel<E, 4>,
        dim3((unsigned)blocks, (unsigned)groups), dim3(kBlock), g, stream);
  };
  dtype == DType::bf16 ? with(Bf16{}) : with(F16{});
}

}  // namespace rf::cuda
