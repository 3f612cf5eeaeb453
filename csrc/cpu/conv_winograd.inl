// Winograd convolution, 3x3 with stride 1 (Lavin and Gray, arXiv 1509.09308): the input is cut into
// tiles of (m+2)^2, overlapping by two; transformed, a tile's convolution is (m+2)^2 products, so
// 2.25 (m = 2) or 4 times (m = 4) fewer multiplications. float32 throughout, whatever the dtype.
//
// m = 4 uses the points 0, +-a, +-b and infinity. a = 3/4, b = 3/2 loses fewer bits than the usual
// a = 1, b = 2 at the same cost.

struct Wino4 {
  static constexpr int OUT = 4, IN = 6;
  static constexpr double a = 0.75, b = 1.5;
  static constexpr const char* name = "winograd4";
  using reg = Vec::reg;

  static inline void input(const reg* d, int64_t step, reg* v, int64_t to) {
    const reg a2 = Vec::set1(a * a), b2 = Vec::set1(b * b);
    const reg a1 = Vec::set1(a), b1 = Vec::set1(b);
    const reg s = Vec::set1(a * a + b * b), q = Vec::set1(a * a * b * b);
    const reg d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step],
              d5 = d[5 * step];
    v[0] = Vec::fma(q, d0, Vec::fnma(s, d2, d4));
    reg even = Vec::fnma(b2, d2, d4), odd = Vec::fnma(b2, d1, d3);
    v[to] = Vec::fma(a1, odd, even);
    v[2 * to] = Vec::fnma(a1, odd, even);
    even = Vec::fnma(a2, d2, d4), odd = Vec::fnma(a2, d1, d3);
    v[3 * to] = Vec::fma(b1, odd, even);
    v[4 * to] = Vec::fnma(b1, odd, even);
    v[5 * to] = Vec::fma(q, d1, Vec::fnma(s, d3, d5));
  }
  static inline void output(const reg* m, int64_t step, reg* y, int64_t to) {
    const reg m1 = m[step], m2 = m[2 * step], m3 = m[3 * step], m4 = m[4 * step];
    const reg p = Vec::add(m1, m2), n = Vec::sub(m1, m2), P = Vec::add(m3, m4), N = Vec::sub(m3, m4);
    y[0] = Vec::add(Vec::add(m[0], p), P);
    y[to] = Vec::fma(Vec::set1(a), n, Vec::mul(Vec::set1(b), N));
    y[2 * to] = Vec::fma(Vec::set1(a * a), p, Vec::mul(Vec::set1(b * b), P));
    y[3 * to] = Vec::fma(Vec::set1(a * a * a), n, Vec::fma(Vec::set1(b * b * b), N, m[5 * step]));
  }
  // The transpose of `output`.
  static inline void gradient(const reg* y, int64_t step, reg* m, int64_t to) {
    const reg y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    const auto pair = [&](double x, reg* plus, reg* minus) __attribute__((always_inline)) {
      const reg even = Vec::fma(Vec::set1(x * x), y2, y0);
      const reg odd = Vec::fma(Vec::set1(x * x * x), y3, Vec::mul(Vec::set1(x), y1));
      *plus = Vec::add(even, odd);
      *minus = Vec::sub(even, odd);
    };
    m[0] = y0;
    pair(a, m + to, m + 2 * to);
    pair(b, m + 3 * to, m + 4 * to);
    m[5 * to] = y3;
  }
  static constexpr double fa = 1 / (2 * a * a * (a * a - b * b)), fb = 1 / (2 * b * b * (b * b - a * a));

  template <class D>
  static inline void weights(const D* g, int step, D* u, int to) {
    const D g0 = g[0], g1 = g[step], g2 = g[2 * step];
    u[0] = g0 / (a * a * b * b);
    u[to] = (g0 + a * g1 + a * a * g2) * fa;
    u[2 * to] = (g0 - a * g1 + a * a * g2) * fa;
    u[3 * to] = (g0 + b * g1 + b * b * g2) * fb;
    u[4 * to] = (g0 - b * g1 + b * b * g2) * fb;
    u[5 * to] = g2;
  }
  // The transpose of `weights`.
  static inline void weight_gradient(const reg* u, int64_t step, reg* g, int64_t to) {
    const reg u1 = u[step], u2 = u[2 * step], u3 = u[3 * step], u4 = u[4 * step];
    const reg p = Vec::add(u1, u2), n = Vec::sub(u1, u2), P = Vec::add(u3, u4), N = Vec::sub(u3, u4);
    g[0] = Vec::fma(Vec::set1(1 / (a * a * b * b)), u[0],
                    Vec::fma(Vec::set1(fa), p, Vec::mul(Vec::set1(fb), P)));
    g[to] = Vec::fma(Vec::set1(fa * a), n, Vec::mul(Vec::set1(fb * b), N));
    g[2 * to] = Vec::fma(Vec::set1(fa * a * a), p, Vec::fma(Vec::set1(fb * b * b), P, u[5 * step]));
  }
};

struct Wino2 {
  static constexpr int OUT = 2, IN = 4;
  static constexpr const char* name = "winograd2";
  using reg = Vec::reg;

  static inline void input(const reg* d, int64_t step, reg* v, int64_t to) {
    const reg d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    v[0] = Vec::sub(d0, d2);
    v[to] = Vec::add(d1, d2);
    v[2 * to] = Vec::sub(d2, d1);
    v[3 * to] = Vec::sub(d3, d1);
  }
  static inline void output(const reg* m, int64_t step, reg* y, int64_t to) {
    y[0] = Vec::add(m[0], Vec::add(m[step], m[2 * step]));
    y[to] = Vec::add(Vec::sub(m[step], m[2 * step]), m[3 * step]);
  }
  template <class D>
  static inline void weights(const D* g, int step, D* u, int to) {
    const D g0 = g[0], g1 = g[step], g2 = g[2 * step];
    u[0] = g0;
    u[to] = (g0 + g1 + g2) / 2;
    u[2 * to] = (g0 - g1 + g2) / 2;
    u[3 * to] = g2;
  }
};

template <class E, class F>
struct Winograd {
  using T = typename E::T;
  using reg = typename Vec::reg;
  static constexpr int OUT = F::OUT, IN = F::IN, P = IN * IN, W = Vec::W, NR = F32::NV * Vec::W;

  struct Plan {
    int64_t th, tw, tiles;     // tiles per image and in all
    int64_t block, blocks;     // tiles transformed together by one thread
    int64_t panels, panel;     // of NR output channels; floats of one packed panel
    int64_t ldv, v_plane, m_plane;
    int64_t v_floats, m_floats;
  };

  static Plan plan(const ConvShape& s) {
    Plan p{};
    p.th = ceil_div(s.oh(), OUT);
    p.tw = ceil_div(s.ow(), OUT);
    p.tiles = s.n * p.th * p.tw;
    const int64_t limit = s.c <= 64 ? 4 * F32::MR : s.c <= 160 ? 2 * F32::MR : 5 * F32::MR;
    p.blocks = max64(1, ceil_div(p.tiles, limit));
    if (p.blocks > 1) p.blocks = round_up(p.blocks, 2);
    p.block = max64(1, ceil_div(p.tiles, p.blocks));
    p.panels = ceil_div(s.o, NR);
    p.panel = P * s.c * NR;
    p.ldv = round_up(s.c, W) + W;  // away from powers of two, which share cache sets
    p.v_plane = p.block * p.ldv + W;
    p.m_plane = p.block * NR + W;
    p.v_floats = P * p.v_plane;
    p.m_floats = P * p.m_plane;
    return p;
  }

  static bool can_run(const ConvShape& s) {
    return s.kh == 3 && s.kw == 3 && s.sh == 1 && s.sw == 1 && s.dh == 1 && s.dw == 1 &&
           s.groups == 1;
  }

  // Transformed weights [panel][P][c][NR], then the plain ones [tap][c][o], o rounded up to W.
  static size_t packed_bytes(const ConvShape& s) {
    return (ceil_div(s.o, NR) * NR * P + 9 * round_up(s.o, W)) * s.c * sizeof(float);
  }

  static void pack(const ConvShape& s, const Weight& weight, void* packed) {
#pragma omp parallel
    {
#pragma omp for
      for (int64_t o = 0; o < round_up(s.o, NR); o += W) pack_register(s, weight, o, static_cast<float*>(packed));
      _mm_sfence();  // what was streamed is there for the other threads
    }
  }

  // W output channels from o, in double: a rounding here would be in every product.
  static void pack_register(const ConvShape& s, const Weight& weight, int64_t o, float* packed) {
    constexpr int BLOCK = 16;
    typedef double D __attribute__((vector_size(8 * W)));
    typedef float V __attribute__((vector_size(4 * W)));
    const int64_t op = round_up(s.o, W), lanes = max64(0, min64(W, s.o - o));
    float* u = packed + o / NR * P * s.c * NR + o % NR;
    float* plain = packed + ceil_div(s.o, NR) * P * s.c * NR + o;
    float staged[BLOCK][9][W] = {};  // some input channels
    for (int64_t c = 0; c < s.c; ++c) {
      if (c % BLOCK == 0)
        stage(weight, o * weight.along_o + c * weight.along_c, lanes, min64(BLOCK, s.c - c), staged);
      D g[9], half[3 * IN], full[P];
      for (int t = 0; t < 9; ++t) {
        V v;
        __builtin_memcpy(&v, staged[c % BLOCK][t], sizeof v);
        g[t] = __builtin_convertvector(v, D);
      }
      for (int i = 0; i < 3; ++i) F::weights(g + i, 3, half + i, 3);
      for (int i = 0; i < IN; ++i) F::weights(half + i * 3, 1, full + i * IN, 1);
      for (int t = 0; t < P; ++t)
        Vec::stream(u + (t * s.c + c) * NR, (reg)__builtin_convertvector(full[t], V));
      for (int t = 0; t < 9 && o < op; ++t) Vec::store(plain + (t * s.c + c) * op, Vec::load(staged[c % BLOCK][t]));
    }
  }

  // Weights of so many channels, read along what lies side by side.
  static void stage(const Weight& weight, int64_t w, int64_t lanes, int64_t channels, float (*to)[9][W]) {
    const int64_t along_o = weight.along_o, along_c = weight.along_c;
    const bool by_output = along_o < along_c;
    for (int64_t i = 0; i < (by_output ? channels : lanes); ++i)
      for (int t = 0; t < 9; ++t) {
        const int64_t from = w + i * (by_output ? along_c : along_o) + t * weight.along_tap;
        if (by_output)
          for (int64_t o = 0; o < lanes; ++o) to[i][t][o] = E::widen_one(element<E>(weight, from + o * along_o));
        else
          for (int64_t c = 0; c < channels; ++c) to[c][t][i] = E::widen_one(element<E>(weight, from + c * along_c));
      }
  }

  static int64_t per_thread(const Plan& p) { return round_up(p.v_floats + p.m_floats, W); }

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    return threads * per_thread(plan(s)) * sizeof(float);
  }

  struct Where {
    int64_t n, y, x;  // image, first output row and column of a tile
    Where(const Plan& p, int64_t tile)
        : n(tile / (p.th * p.tw)), y(tile / p.tw % p.th * OUT), x(tile % p.tw * OUT) {}
  };

  // V[p][tile][c] = B^T d B for channels from c0 to c1, W at a time; c1 is the last or a multiple of W.
  static void transform_input(const Plan& p, const ConvShape& s, const T* x, int64_t tile, int64_t c0,
                              int64_t c1, float* v) {
    const Where at(p, tile);
    const int64_t y0 = at.y - s.ph, x0 = at.x - s.pw;
    const bool inside = y0 >= 0 && x0 >= 0 && y0 + IN <= s.h && x0 + IN <= s.w;
    const T* in = x + ((at.n * s.h + y0) * s.w + x0) * s.c;
    const int64_t row = s.w * s.c;
    for (int64_t c = c0; c < c1; c += W) {
      reg d[P], t[P];
      if (inside && c + W <= s.c) {
#pragma GCC unroll 6
        for (int i = 0; i < IN; ++i)
#pragma GCC unroll 6
          for (int j = 0; j < IN; ++j) {
            d[i * IN + j] = E::load(in + i * row + j * s.c + c);
            // The columns the next tile adds.
            if (j < OUT)
              _mm_prefetch(reinterpret_cast<const char*>(in + i * row + (j + IN) * s.c + c), _MM_HINT_T0);
          }
      } else {
        const auto m = Vec::first(s.c - c);
        for (int i = 0; i < IN; ++i)
          for (int j = 0; j < IN; ++j) {
            const bool ok = y0 + i >= 0 && y0 + i < s.h && x0 + j >= 0 && x0 + j < s.w;
            d[i * IN + j] = ok ? E::load(in + i * row + j * s.c + c, m) : Vec::zero();
          }
      }
#pragma GCC unroll 6
      for (int j = 0; j < IN; ++j) F::input(d + j, IN, t + j, IN);
#pragma GCC unroll 6
      for (int i = 0; i < IN; ++i) F::input(t + i * IN, 1, d + i * IN, 1);
#pragma GCC unroll 36
      for (int i = 0; i < P; ++i) Vec::store(v + i * p.v_plane + c, d[i]);
    }
  }

  // One panel of products: M[p][tile][NR] = V[p] U[p].
  static void multiply(const Plan& p, const ConvShape& s, const float* v, const float* u, float* m,
                       int64_t rows) {
    const int64_t parts = ceil_div(rows, F32::MR);
    const int64_t tap = 0;
    TileArgs g{};
    g.lda = p.ldv;
    g.tap = &tap;
    g.taps = 1;
    g.steps = s.c;
    g.ldy = NR;
    for (int i = 0; i < P; ++i, u += s.c * NR)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t r0 = part * rows / parts, r1 = (part + 1) * rows / parts;
        const int64_t half = (r1 - r0 + 1) / 2;
        g.a0 = v + i * p.v_plane + r0 * p.ldv;
        g.a1 = v + i * p.v_plane + (r0 + half) * p.ldv;
        g.b = u;
        g.y = m + i * p.m_plane;
        g.y0 = r0 * NR;
        g.y1 = (r0 + half) * NR;
        raw_tile_fn<F32>(r1 - r0)(g);
      }
  }

  // The tile by its definition, for a tile that holds infinities or NaN: Winograd would spread them.
  static __attribute__((noinline)) void recompute(const Plan& p, const ConvArgs& args, int64_t tile,
                                                  int64_t o, reg* y) {
    const ConvShape& s = args.s;
    const Where at(p, tile);
    const int64_t op = round_up(s.o, W);
    const float* plain = static_cast<const float*>(args.packed) + p.panels * p.panel + o;
    for (int i = 0; i < OUT * OUT; ++i) {
      reg sum = Vec::zero();
      for (int t = 0; t < 9; ++t) {
        const int64_t iy = at.y + i / OUT - s.ph + t / 3, ix = at.x + i % OUT - s.pw + t % 3;
        if (iy < 0 || iy >= s.h || ix < 0 || ix >= s.w) continue;
        const T* in = static_cast<const T*>(args.x) + ((at.n * s.h + iy) * s.w + ix) * s.c;
        for (int64_t c = 0; c < s.c; ++c)
          sum = Vec::fma(Vec::set1(E::widen_one(in[c])), Vec::load(plain + (t * s.c + c) * op), sum);
      }
      y[i] = sum;
    }
  }

  // y = act((A^T M A) * scale + shift + residual), for W channels from o.
  static void transform_output(const Plan& p, const ConvArgs& args, const float* m, int64_t tile,
                               int64_t o) {
    const ConvShape& s = args.s;
    const Where at(p, tile);
    const int64_t oh = s.oh(), ow = s.ow();
    reg d[P], t[OUT * IN], y[OUT * OUT];
#pragma GCC unroll 36
    for (int i = 0; i < P; ++i) d[i] = Vec::load(m + i * p.m_plane);
#pragma GCC unroll 6
    for (int j = 0; j < IN; ++j) F::output(d + j, IN, t + j, IN);
#pragma GCC unroll 6
    for (int i = 0; i < OUT; ++i) F::output(t + i * IN, 1, y + i * OUT, 1);
    reg test = Vec::zero();  // 0 * v is NaN where v is not finite
#pragma GCC unroll 16
    for (int i = 0; i < OUT * OUT; ++i) test = Vec::fma(y[i], Vec::zero(), test);
    if (__builtin_expect(Vec::any_nan(test), 0)) recompute(p, args, tile, o, y);

    const auto mask = Vec::first(s.o - o);
    const reg scale = args.scale ? Vec::load(args.scale + o, mask) : Vec::set1(1.0f);
    const reg shift = args.shift ? Vec::load(args.shift + o, mask) : Vec::zero();
    const int64_t offset = ((at.n * oh + at.y) * ow + at.x) * s.o + o;
    T* out = static_cast<T*>(args.y) + offset;
    const T* res = args.residual ? static_cast<const T*>(args.residual) + offset : nullptr;
    const bool inside = at.y + OUT <= oh && at.x + OUT <= ow && o + W <= s.o;
#pragma GCC unroll 4
    for (int i = 0; i < OUT; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) {
        if (!inside && (at.y + i >= oh || at.x + j >= ow)) continue;
        const int64_t to = (i * ow + j) * s.o;
        reg v = Vec::fma(y[i * OUT + j], scale, shift);
        if (res) v = Vec::add(v, inside ? E::load(res + to) : E::load(res + to, mask));
        if (args.relu) v = Vec::relu(v);
        if (inside)
          E::store(out + to, v);
        else
          E::store(out + to, v, mask);
      }
  }

  static void run(const ConvArgs& args) {
    const ConvShape& s = args.s;
    const Plan p = plan(s);
    if (p.tiles == 0) return;
    const int64_t units = p.blocks * p.panels;
#pragma omp parallel num_threads(args.threads)
    {
      const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
      float* v = reinterpret_cast<float*>(args.scratch) + me * per_thread(p);
      float* m = v + p.v_floats;
      int64_t held = -1;
      for (int64_t unit = units * me / all; unit < units * (me + 1) / all; ++unit) {
        const int64_t block = unit / p.panels, q = unit % p.panels;
        const int64_t t0 = block * p.tiles / p.blocks, t1 = (block + 1) * p.tiles / p.blocks;
        if (held != block)
          for (int64_t t = t0; t < t1; ++t)
            transform_input(p, s, static_cast<const T*>(args.x), t, 0, s.c, v + (t - t0) * p.ldv);
        held = block;
        multiply(p, s, v, static_cast<const float*>(args.packed) + q * p.panel, m, t1 - t0);
        for (int64_t t = t0; t < t1; ++t)
          for (int64_t o = q * NR; o < min64(s.o, (q + 1) * NR); o += W)
            transform_output(p, args, m + (t - t0) * NR + o - q * NR, t, o);
      }
    }
  }

  static constexpr ConvAlgorithm algorithm{F::name, can_run, packed_bytes, pack, scratch_bytes, run};
};
