// The stem of a ResNet, y = max_pool(act(conv(x, weight) * scale + shift)), in one pass: 7x7 of
// stride 2 and padding 3 over up to four channels, then 3x3 of stride 2 and padding 1; or without
// the pool.
//
// K runs over kernel rows and 8 pixels of each, of which the last is no tap: it is cleared in
// registers, as it may be NaN or infinite.
//
// A block walks down a band of the output. Each of its four warps has half of the columns of the map
// that the convolution makes and half of its channels, their weights in registers all the way. Where
// there is a pool, of that map stays what it needs: the largest of the rows so far.
#include "stem_rows.cuh"

namespace rf::cuda {
namespace {

constexpr int kSteps = 2 * kTaps;                   // of K by 16
constexpr int kColumnTiles = 4, kChannelTiles = 4;  // of 16 columns and 8 channels, of a warp

struct StemGrid : StemArgs {
  int64_t oh, ow, ph, pw, bands, tiles;
};

// The part of the output that a block makes: columns and rows of the convolution's map, and of the
// pool's. The first tile of a pool begins with the map's first column, the others with the one before
// a window's.
template <bool POOL>
struct Part {
  int column0, q0, q1, y0, r0, r1;

  __device__ __forceinline__ Part(const StemGrid& g, int tile, int band) {
    constexpr int kWindows = kStemColumns / 2;
    y0 = band * (int)g.band;
    const int y1 = min((int)(POOL ? g.ph : g.oh), y0 + (int)g.band);
    if constexpr (POOL) {
      q0 = tile == 0 ? 0 : kWindows + (tile - 1) * (kWindows - 1);
      q1 = min((int)g.pw, q0 + kWindows - (tile != 0));
      column0 = tile == 0 ? 0 : 2 * q0 - 1;
      r0 = max(0, 2 * y0 - 1);
      r1 = min((int)g.oh, 2 * y1);
    } else {
      column0 = q0 = tile * kStemColumns;
      q1 = min((int)g.ow, q0 + kStemColumns);
      r0 = y0;
      r1 = y1;
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

template <class E, int C, bool POOL>
__global__ void __launch_bounds__(kBlock, 2) stem_kernel(const StemGrid g) {
  alignas(16) __shared__ char rows[kSlots * kRow];
  alignas(16) __shared__ char map[kStemColumns * kMapRow];
  __shared__ float scale[kStemChannels], shift[kStemChannels];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t rest = blockIdx.x / g.tiles, image = rest / g.bands;
  const int64_t channel0 = (int64_t)blockIdx.y * kStemChannels;
  const Part<POOL> part(g, (int)(blockIdx.x % g.tiles), (int)(rest % g.bands));
  const int last_column = (int)g.ow - 1 - part.column0;
  if (thread < kStemChannels) {
    scale[thread] = g.scale ? g.scale[channel0 + thread] : 1;
    shift[thread] = g.shift ? g.shift[channel0 + thread] : 0;
  }
  using Pixels = typename E::T[Fetch<E, C>::kOfThread][C];
  const Fetch<E, C> fetch(g, image, 2 * part.column0 - 3);
  const int x_row0 = 2 * part.r0 - 3;
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    Pixels pixels;
    fetch.load(x_row0 + i, pixels);
    fetch.store(rows + i * kRow, pixels);
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
  uint32_t best[kColumnTiles][kChannelTiles][2];  // of a pool
  if constexpr (POOL)
#pragma unroll
    for (int m = 0; m < kColumnTiles; ++m)
#pragma unroll
      for (int n = 0; n < kChannelTiles; ++n) best[m][n][0] = best[m][n][1] = nothing;
  __syncthreads();

  for (int r = part.r0; r < part.r1; ++r) {
    const int slot = 2 * (r - part.r0);
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

    // Whether a window has its last row; an odd one begins the next.
    const bool ends = !POOL || r % 2 || r == g.oh - 1;
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
          uint32_t value = packed<E>(v[0] * s0 + t0, v[1] * s1 + t1);
          if constexpr (POOL) {
            const uint32_t most = larger<E>(best[m][n][i], value);
            best[m][n][i] = r % 2 ? value : most;
            value = most;
          }
          const int at = column + m * 16 + lane / 4 + i * 8;
          if (ends) *reinterpret_cast<uint32_t*>(map + at * kMapRow + 2 * channel) = value;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      fetch.store(rows + (slot + kTaps + i) % kSlots * kRow, next[i]);
    __syncthreads();

    const int y = POOL ? r / 2 : r;
    if (!ends || y < part.y0) continue;
    constexpr int kPieces = kStemChannels / 8;
    const int64_t row = image * (POOL ? g.ph : g.oh) + y, pixel0 = row * (POOL ? g.pw : g.ow) + part.q0;
    auto* to = static_cast<typename E::T*>(g.y) + pixel0 * g.o + channel0 + thread % kPieces * 8;
    const auto of_map = [&](int column) {
      return *reinterpret_cast<const uint4*>(map + column * kMapRow + thread % kPieces * 16);
    };
    for (int q = thread / kPieces; q < part.q1 - part.q0; q += kBlock / kPieces) {
      uint4 v;
      if constexpr (POOL) {
        const int middle = 2 * (part.q0 + q) - part.column0;
        v = of_map(middle);
#pragma unroll
        for (int i = -1; i <= 1; i += 2) {
          const uint4 w = of_map(min(max(middle + i, 0), last_column));  // at an edge one twice
          v = {larger<E>(v.x, w.x), larger<E>(v.y, w.y), larger<E>(v.z, w.z), larger<E>(v.w, w.w)};
        }
      } else {
        v = of_map(q);
      }
      if (g.relu)
        v = {larger<E>(v.x, 0), larger<E>(v.y, 0), larger<E>(v.z, 0), larger<E>(v.w, 0)};
      __stwb(reinterpret_cast<uint4*>(to + q * g.o), v);
    }
    // Of a pool the next row ends no window, but before the map's last one: until the one after it
    // writes over this, all have met.
    if (!POOL || r + 2 == g.oh) __syncthreads();
  }
}

}  // namespace

void launch(DType dtype, const StemArgs& args, Stream stream) {
  const int64_t oh = (args.h - 1) / 2 + 1, ow = (args.w - 1) / 2 + 1;
  const int64_t ph = (oh - 1) / 2 + 1, pw = (ow - 1) / 2 + 1;
  const int64_t beyond = max64(0, pw - kStemColumns / 2);
  const int64_t tiles = args.pool ? 1 + ceil_div(beyond, kStemColumns / 2 - 1)
                                  : ceil_div(ow, kStemColumns);
  const StemGrid g{args, oh, ow, ph, pw, ceil_div(args.pool ? ph : oh, args.band), tiles};
  const int64_t blocks = args.n * g.bands * g.tiles, groups = args.o / kStemChannels;
  if (blocks > 0x7fffffff || groups > 0xffff || args.h * args.w * args.c > 0x7fffffff)
    throw std::runtime_error("stem: the map is too large");
  const auto with = [&](auto element, auto pool) {
    using E = decltype(element);
    constexpr bool POOL = decltype(pool)::value;
    put("stem", args.c == 3 ? stem_kernel<E, 3, POOL> : stem_kernel<E, 4, POOL>,
        dim3((unsigned)blocks, (unsigned)groups), dim3(kBlock), g, stream);
  };
  const auto with_pool = [&](auto element) {
    args.pool ? with(element, std::true_type{}) : with(element, std::false_type{});
  };
  dtype == DType::bf16 ? with_pool(Bf16{}) : with_pool(F16{});
}

}  // namespace rf::cuda
