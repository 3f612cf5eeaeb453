// The weight's gradient on the tile registers of AMX: a gradient's block is transposed, so that the pixels
// of a channel lie side by side.

template <class E>
struct TileCore {
  using T = typename E::T;
  static constexpr int MR = 2 * Tiles::R, KU = E::KU, NR = 2 * Vec::W;
  // A panel's block of pixels stays in the L1 cache while all of the unit's channels meet it.
  static constexpr int64_t kBlock = (int64_t(32) << 10) / (NR * sizeof(T));

  static void begin() { Tiles::begin(); }
  static void end() { Tiles::end(); }
  static int64_t pitch(int64_t rows) { return round_up(rows, Tiles::R); }
  static int64_t height(int64_t rows) { return round_up(rows, Tiles::R); }
  static int64_t cut(int64_t i, int64_t, int64_t height) { return min64(i * MR, height); }

  // Zeros up to a whole step of pixels.
  static void end_panel(T* v, int64_t count) {
    const int64_t first = round_up(count, KU), last = round_up(count, Tiles::K);
    memset(v + first * NR, 0, (last - first) * NR * sizeof(T));
  }

  // -> [16 channels][32 pixels], as the first operand of a product: tile by tile of all pixels, then the
  // next channels. Zeros beyond the last pixel; channels beyond the last are computed and not kept.
  static void copy(const T* const* rows, int64_t count, int64_t o0, int64_t o1, int64_t, T* g) {
    constexpr int W = Vec::W;
    for (int64_t o = o0; o < o1; o += W)
      for (int64_t p = 0; p < count; p += Tiles::K, g += W * Tiles::K) {
        Vec::reg r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          r[i] = p + KU * i < count ? E::step(rows + p + KU * i, o, Vec::first(o1 - o)) : Vec::zero();
        Vec::transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) Vec::store(reinterpret_cast<float*>(g + i * Tiles::K), r[i]);
      }
  }

  template <int MT>
  static void sum_tiles(const T* a0, const T* a1, const T* b, int64_t steps, float* u, int64_t ldu, bool add) {
    const int64_t line = ldu * (int64_t)sizeof(float);
    constexpr int64_t LDB = 2 * Tiles::LINE;
    asm volatile("" ::: "memory");  // what the tiles are loaded from is written
    if (add) {
      Tiles::load<0>(u, line);
      Tiles::load<1>(u + Tiles::R, line);
      if (MT > 1) Tiles::load<2>(u + Tiles::R * ldu, line);
      if (MT > 1) Tiles::load<3>(u + Tiles::R * ldu + Tiles::R, line);
    } else {
      Tiles::zero<0>();
      Tiles::zero<1>();
      if (MT > 1) Tiles::zero<2>();
      if (MT > 1) Tiles::zero<3>();
    }
    for (; steps > 0; --steps, a0 += Tiles::R * Tiles::K, a1 += Tiles::R * Tiles::K, b += Tiles::K * NR) {
      Tiles::load<4>(a0, Tiles::LINE);
      Tiles::load<6>(b, LDB);
      Tiles::dot<0, 4, 6>();
      Tiles::load<7>(b + Tiles::K, LDB);
      Tiles::dot<1, 4, 7>();
      if (MT > 1) {
        Tiles::load<5>(a1, Tiles::LINE);
        Tiles::dot<2, 5, 6>();
        Tiles::dot<3, 5, 7>();
      }
    }
    Tiles::store<0>(u, line);
    Tiles::store<1>(u + Tiles::R, line);
    if (MT > 1) Tiles::store<2>(u + Tiles::R * ldu, line);
    if (MT > 1) Tiles::store<3>(u + Tiles::R * ldu + Tiles::R, line);
  }

  static void sum(const T* g, int64_t, int64_t r0, int64_t r1, const T* v, int64_t count, float* u, int64_t ldu,
                  bool add) {
    const int64_t steps = ceil_div(count, Tiles::K), channels = steps * Tiles::K * Tiles::R;
    const T* a = g + r0 / Tiles::R * channels;
    (r1 - r0 > Tiles::R ? sum_tiles<2> : sum_tiles<1>)(a, a + channels, v, steps, u, ldu, add);
  }
};
