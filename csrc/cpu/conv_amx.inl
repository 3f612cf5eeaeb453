// Convolution on the tile registers of AMX: 32 output pixels by 32 channels at a time, summed over all
// taps in four of them. The weights are packed as for the direct convolution, or by AmxBlocks.

struct TileProduct {
  const char *a0, *a1;     // pixel 0 and pixel 16
  int64_t lda;             // bytes from one pixel to the next
  const int64_t* offsets;  // bytes from a pixel to where it meets each step of 32 channels
  const char* b;           // packed weights: [step][NV * W][KU]
  int64_t steps;
};

// In the tiles, for MT of pixels and NV of channels.
template <int MT, int NV>
static inline __attribute__((always_inline)) void multiply_tiles(const TileProduct& g) {
  constexpr int64_t LDB = NV * Tiles::LINE, STEP = Tiles::R * LDB;
  asm volatile("" ::: "memory");  // what the tiles are loaded from is written
  Tiles::zero<0>();
  if (NV > 1) Tiles::zero<1>();
  if (MT > 1) Tiles::zero<2>();
  if (MT > 1 && NV > 1) Tiles::zero<3>();
  const char* b = g.b;
  for (int64_t k = 0; k < g.steps; ++k, b += STEP) {
    const int64_t offset = g.offsets[k];
    Tiles::load<4>(g.a0 + offset, g.lda);
    Tiles::load<6>(b, LDB);
    Tiles::dot<0, 4, 6>();
    if (NV > 1) {
      Tiles::load<7>(b + Tiles::LINE, LDB);
      Tiles::dot<1, 4, 7>();
    }
    if (MT > 1) {
      Tiles::load<5>(g.a1 + offset, g.lda);
      Tiles::dot<2, 5, 6>();
      if (NV > 1) Tiles::dot<3, 5, 7>();
    }
  }
}

// -> sums[pixel][NV * W].
template <int MT, int NV>
static inline __attribute__((always_inline)) void store_tiles(float* sums) {
  constexpr int64_t LDB = NV * Tiles::LINE, HALF = Tiles::R * NV * Tiles::R;
  Tiles::store<0>(sums, LDB);
  if (NV > 1) Tiles::store<1>(sums + Tiles::R, LDB);
  if (MT > 1) Tiles::store<2>(sums + HALF, LDB);
  if (MT > 1 && NV > 1) Tiles::store<3>(sums + HALF + Tiles::R, LDB);
}

template <class E>
struct Amx {
  using T = typename E::T;
  using reg = typename E::reg;
  using Blocks = AmxBlocks<E>;
  using Plan = typename Blocks::Plan;
  using Block = typename Blocks::Block;
  using Pixels = typename Blocks::Pixels;
  static constexpr int W = E::W;

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    const Plan p = Blocks::plan(s, 1);
    return round_up(p.taps * p.steps * sizeof(int64_t), 64) + threads * round_up(p.buffer * sizeof(T), 64) +
           Moments<E>::bytes(p.blocks, p.panels * 2 * W);
  }

  // How a panel of a tile ends is known when it is compiled: the fewer instructions there are, the more of
  // them run beside the products of the next panel. STRAIGHT: pixels and what they give lie in a row; FULL:
  // all channels of the panel are there.

  // f(row of the sums, where it goes) for every pixel.
  template <bool STRAIGHT, class F>
  static inline __attribute__((always_inline)) void each_row(const Pixels& t, int64_t pitch, const F& f) {
    const int64_t count = t.count;
    if (STRAIGHT) {
      int64_t at = t.y[0];
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i, at += pitch) f(i, at);
    } else {
      for (int64_t i = 0; i < count; ++i) f(t.row[i], t.y[i]);
    }
  }

  // act(sums * scale + shift + residual), rounded.
  template <int NV, bool STRAIGHT, bool FULL, bool RESIDUAL, bool RELU>
  static __attribute__((noinline)) void finish(const ConvArgs& args, const Pixels& t, const float* sums,
                                               int64_t o) {
    const int64_t channels = args.s.o - o;
    const auto m0 = E::first(channels), m1 = E::first(channels - W);
    const reg one = E::set1(1.0f);
    const reg scale0 = args.scale ? Vec::load(args.scale + o, m0) : one;
    const reg scale1 = args.scale && NV > 1 ? Vec::load(args.scale + o + W, m1) : one;
    const reg shift0 = args.shift ? Vec::load(args.shift + o, m0) : E::zero();
    const reg shift1 = args.shift && NV > 1 ? Vec::load(args.shift + o + W, m1) : E::zero();
    const T* residual = RESIDUAL ? static_cast<const T*>(args.residual) + o : nullptr;
    T* y = static_cast<T*>(args.y) + o;
    each_row<STRAIGHT>(t, args.s.o, [&](int64_t row, int64_t at) __attribute__((always_inline)) {
      const float* sum = sums + row * NV * W;
      reg v0 = E::fma(Vec::load(sum), scale0, shift0), v1 = E::zero();
      if (NV > 1) v1 = E::fma(Vec::load(sum + W), scale1, shift1);
      if (RESIDUAL) {
        const T* r = residual + at;
        v0 = E::add(v0, FULL ? E::load(r) : E::load(r, m0));
        if (NV > 1) v1 = E::add(v1, FULL ? E::load(r + W) : E::load(r + W, m1));
      }
      if (RELU) {
        v0 = E::relu(v0);
        v1 = E::relu(v1);
      }
      E::store(y + at, E::pair(v0, v1), FULL ? NV * W : channels);
    });
  }

  // Sums as they are, rounded, and with mean and var their moments.
  template <int NV, bool STRAIGHT, bool FULL>
  static __attribute__((noinline)) void finish_raw(const ConvArgs& args, const Pixels& t, const float* sums,
                                                   int64_t o, Moments<E>& moments) {
    const auto value = [&](int64_t row) __attribute__((always_inline)) {
      const float* sum = sums + row * NV * W;
      return E::pair(Vec::load(sum), NV > 1 ? Vec::load(sum + W) : Vec::zero());
    };
    T* y = static_cast<T*>(args.y) + o;
    each_row<STRAIGHT>(t, args.s.o, [&](int64_t row, int64_t at) __attribute__((always_inline)) {
      E::store(y + at, value(row), FULL ? NV * W : args.s.o - o);
    });
    if (!args.mean) return;
    moments.add(t.block, o, t.first, t.count, [&](int64_t i) __attribute__((always_inline)) {
      return value(STRAIGHT ? i : t.row[i]);
    });
  }

  using Finish = void (*)(const ConvArgs&, const Pixels&, const float*, int64_t);

  template <int NV, bool STRAIGHT, bool FULL>
  static Finish finish_of(const ConvArgs& args) {
    const auto added =
        args.relu ? finish<NV, STRAIGHT, FULL, true, true> : finish<NV, STRAIGHT, FULL, true, false>;
    const auto alone =
        args.relu ? finish<NV, STRAIGHT, FULL, false, true> : finish<NV, STRAIGHT, FULL, false, false>;
    return args.residual ? added : alone;
  }

  // A tile of pixels and the panels [first, last). Asked of the memory are its residual, and, where that is
  // not written over, where the next tile's results go. Asking for the next tile's pixels, too, took longer
  // than the waiting.
  template <int MT, int NV, bool STRAIGHT>
  static __attribute__((noinline)) void multiply(const Plan& p, const ConvArgs& args, const int64_t* offsets,
                                                 const Pixels& t, int64_t first, int64_t last,
                                                 Moments<E>& moments) {
    alignas(64) float sums[MT * Tiles::R * NV * W];
    TileProduct g{reinterpret_cast<const char*>(t.a0), reinterpret_cast<const char*>(t.a1),
                  p.pixel * (int64_t)sizeof(T), offsets, nullptr, p.taps * p.steps};
    const bool raw = !args.scale && !args.shift && !args.residual && !args.relu;
    const Finish whole = finish_of<NV, STRAIGHT, true>(args), some = finish_of<NV, STRAIGHT, false>(args);
    const auto end = [&](int64_t o) {
      const bool full = args.s.o - o >= NV * W;
      if (!raw) return (full ? whole : some)(args, t, sums, o);
      (full ? finish_raw<NV, STRAIGHT, true> : finish_raw<NV, STRAIGHT, false>)(args, t, sums, o, moments);
    };
    const T* residual = static_cast<const T*>(args.residual);
    const T* next = static_cast<const T*>(args.y) + Blocks::ROWS * args.s.o;
    for (int64_t j = first; j < last; ++j) {
      const int64_t o = j * NV * W;
      g.b = reinterpret_cast<const char*>(static_cast<const T*>(args.packed) + j * p.panel);
      if (residual)
        each_row<STRAIGHT>(t, args.s.o, [&](int64_t, int64_t at) { ask(residual + at + o); });
      if (residual != args.y)
        each_row<STRAIGHT>(t, args.s.o, [&](int64_t, int64_t at) { ask_l2(next + at + o); });
      multiply_tiles<MT, NV>(g);
      if (j > first) end(o - NV * W);
      store_tiles<MT, NV>(sums);
    }
    end((last - 1) * NV * W);
  }

  template <bool STRAIGHT>
  static auto multiplication(const Plan& p, const Pixels& t) {
    const auto narrow = t.both() ? multiply<2, 1, STRAIGHT> : multiply<1, 1, STRAIGHT>;
    const auto wide = t.both() ? multiply<2, 2, STRAIGHT> : multiply<1, 2, STRAIGHT>;
    return p.nv > 1 ? wide : narrow;
  }

  static void find_offsets(const Plan& p, int64_t* offsets) {
    for (int64_t t = 0; t < p.taps; ++t) {
      const int64_t y = p.together ? t : t / p.s.kw, x = p.together ? 0 : t % p.s.kw;
      const int64_t phase = p.down.phase(y) * p.across.phases + p.across.phase(x);
      const int64_t pixel = (phase * p.images * p.xh + p.down.shift(y)) * p.xw + p.across.shift(x);
      for (int64_t k = 0; k < p.steps; ++k)
        offsets[t * p.steps + k] = pixel * p.pixel * (int64_t)sizeof(T) + k * Tiles::LINE;
    }
  }

  static void run(const ConvArgs& args) {
    const Plan p = Blocks::plan(args.s, args.threads);
    const ConvShape& s = p.s;
    if (s.n * s.oh() * s.ow() * s.o == 0) return;
    int64_t* offsets = reinterpret_cast<int64_t*>(args.scratch);
    find_offsets(p, offsets);
    const int64_t units = p.blocks * p.chunks;
    char* buffers = args.scratch + round_up(p.taps * p.steps * sizeof(int64_t), 64);
    const int64_t stride = round_up(p.buffer * sizeof(T), 64);
    Moments<E> moments(buffers + args.threads * stride, p.blocks, p.panels * 2 * W);
#pragma omp parallel num_threads(args.threads)
    {
      const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
      T* buffer = reinterpret_cast<T*>(buffers + me * stride);
      int64_t held = -1;  // the block in the buffer
      Tiles::begin();
      for (int64_t u = units * me / all; u < units * (me + 1) / all; ++u) {
        // Where nothing is copied, a chunk of weights meets all the pixels.
        const int64_t i = p.copy ? u / p.chunks : u % p.blocks;
        const int64_t chunk = p.copy ? u % p.chunks : u / p.blocks;
        const Block block(p, i);
        if (p.copy && held != i) Blocks::copy_block(p, static_cast<const T*>(args.x), block, buffer);
        held = i;
        const int64_t first = chunk * p.chunk, last = min64(p.panels, first + p.chunk);
        Blocks::each_tile(p, args, block, buffer, [&](Pixels& t) {
          t.block = i;
          const auto multiplied = p.copy ? multiplication<false>(p, t) : multiplication<true>(p, t);
          multiplied(p, args, offsets, t, first, last, moments);
        });
      }
      Tiles::end();
      if (args.mean) {
        const auto count = [&](int64_t i) {
          const Block block(p, i);
          return block.images * block.bh * block.bw;
        };
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t o = 0; o < s.o; o += 2 * W)
          moments.merge(p.blocks, o, s.o - o, count, args.mean, args.var);
      }
    }
  }

  static constexpr ConvAlgorithm algorithm{
      "amx", Blocks::can_run, Blocks::packed_bytes, Blocks::pack, scratch_bytes, run, true};
};
