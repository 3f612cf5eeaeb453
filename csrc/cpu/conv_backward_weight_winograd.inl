// The weight's gradient of a 3x3 convolution with stride 1 by Winograd's transform: with the points of
// the forward, dW = G^T [sum over tiles of (A dY A^T) * (B^T d B)] G, where each of the (m+2)^2 planes
// of the sum is one product of matrices, [o x tiles] by [tiles x c]. float32 throughout.
//
// Long sums are cut into blocks of tiles, by the shape alone: each is summed apart, then added in order,
// which also keeps rounding small. Where there are blocks for all threads and room for their sums, each
// thread takes whole blocks, and what one core transforms no other reads: on cores that share no cache,
// that took two threads longer than one. Else threads share out channels to transform and parts of the
// planes to add up, block by block. Both ways add the same numbers in the same order.

template <class E, class F>
struct WinogradBackwardWeight {
  using Wino = Winograd<E, F>;
  using T = typename E::T;
  using reg = typename Vec::reg;
  static constexpr int OUT = F::OUT, IN = F::IN, P = IN * IN, W = Vec::W, NR = F32::NV * W;
  static constexpr int MR = F32::MR;

  // V[p][tile][c] as in the forward, G[p][tile][o] beside it, and a part's sums U[o][p][c].
  struct Plan : Wino::Plan {
    int64_t ldg, g_plane, g_floats;
    int64_t row_parts, column_parts, columns;  // parts of the planes; columns of one part
    int64_t ldu, u_floats, parts, sums;        // of one part; all parts; those whose sums are kept
    bool apart;                                // whether each thread takes whole blocks
  };

  // What the sums of all blocks may take.
  static constexpr int64_t kMostSums = int64_t(12) << 20;

  static Plan plan(const ConvShape& s, int threads) {
    Plan p{};
    p.th = ceil_div(s.oh(), OUT);
    p.tw = ceil_div(s.ow(), OUT);
    p.tiles = s.n * p.th * p.tw;
    const int64_t limit = max64(128, (int64_t(4) << 20) / (P * (int64_t)sizeof(float) * (s.c + s.o)));
    // A few threads get as many each.
    p.blocks = p.tiles <= limit ? 1 : round_up(ceil_div(p.tiles, limit), 4);
    p.block = ceil_div(p.tiles, p.blocks);
    p.ldv = round_up(s.c, W) + W;  // away from powers of two, which share cache sets
    p.ldg = round_up(s.o, W) + W;
    // A tile's values lie in P planes, each in cache sets of its own.
    p.v_plane = round_up(p.block * p.ldv, 1024) + 16;
    p.g_plane = round_up(p.block * p.ldg, 1024) + 16;
    p.v_floats = P * p.v_plane;
    p.g_floats = P * p.g_plane;
    p.row_parts = min64(round_up(ceil_div(s.o, 4 * MR), threads), ceil_div(s.o, MR / 2));
    p.columns = min64(round_up(s.c, NR), 2 * NR);
    p.column_parts = ceil_div(s.c, p.columns);
    p.ldu = P * p.columns;
    p.u_floats = ceil_div(s.o, p.row_parts) * p.ldu;
    p.parts = p.row_parts * p.column_parts;
    const int64_t kept = p.blocks * p.parts;
    p.apart = threads > 1 && threads <= p.blocks &&
              kept * p.u_floats * (int64_t)sizeof(float) <= kMostSums;
    p.sums = p.apart ? kept : p.blocks == 1 ? threads : p.parts;
    return p;
  }

  static bool can_run(const ConvShape& s) { return Wino::can_run(s); }

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    const Plan p = plan(s, threads);
    const int64_t transformed = (p.v_floats + p.g_floats) * (p.apart ? threads : 1);
    return (transformed + p.sums * p.u_floats) * sizeof(float);
  }

  // G[p][tile][o] = A dY A^T, for W channels at a time.
  static void transform_gradient(const Plan& p, const ConvShape& s, const T* grad, int64_t tile,
                                 float* g) {
    const typename Wino::Where at(p, tile);
    const int64_t rows = min64(OUT, s.oh() - at.y), columns = min64(OUT, s.ow() - at.x);
    const T* in = grad + ((at.n * s.oh() + at.y) * s.ow() + at.x) * s.o;
    const int64_t row = s.ow() * s.o;
    const bool inside = rows == OUT && columns == OUT;
    for (int64_t o = 0; o < s.o; o += W) {
      reg d[OUT * OUT], t[IN * OUT], v[P];
      if (inside && o + W <= s.o) {
#pragma GCC unroll 4
        for (int i = 0; i < OUT; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < OUT; ++j) {
            d[i * OUT + j] = E::load(in + i * row + j * s.o + o);
            _mm_prefetch(reinterpret_cast<const char*>(in + i * row + (j + OUT) * s.o + o), _MM_HINT_T0);
          }
      } else {
        const auto m = Vec::first(s.o - o);
        for (int i = 0; i < OUT; ++i)
          for (int j = 0; j < OUT; ++j)
            d[i * OUT + j] =
                i < rows && j < columns ? E::load(in + i * row + j * s.o + o, m) : Vec::zero();
      }
#pragma GCC unroll 4
      for (int j = 0; j < OUT; ++j) F::gradient(d + j, OUT, t + j, OUT);
#pragma GCC unroll 6
      for (int i = 0; i < IN; ++i) F::gradient(t + i * OUT, 1, v + i * IN, 1);
#pragma GCC unroll 36
      for (int i = 0; i < P; ++i) Vec::store(g + i * p.g_plane + o, v[i]);
    }
  }

  // The rows and columns of a part of the planes.
  struct Part {
    int64_t o0, o1, c0, c1;

    Part(const Plan& p, const ConvShape& s, int64_t part) {
      const int64_t row = part % p.row_parts;
      o0 = row * s.o / p.row_parts;
      o1 = (row + 1) * s.o / p.row_parts;
      c0 = part / p.row_parts * p.columns;
      c1 = min64(s.c, c0 + p.columns);
    }
  };

  // One part of the planes.
  static void multiply(const Plan& p, const Part& at, const float* g, const float* v, int64_t tiles,
                       float* u, bool add) {
    const int64_t rows = at.o1 - at.o0, cuts = ceil_div(rows, MR);
    for (int i = 0; i < P; ++i)
      for (int64_t c = at.c0; c < at.c1; c += NR)
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const int64_t r0 = cut * rows / cuts, r1 = (cut + 1) * rows / cuts;
          sum_fn<F32>(r1 - r0)(g + i * p.g_plane + at.o0 + r0, p.ldg, v + i * p.v_plane + c, p.ldv,
                               tiles, u + r0 * p.ldu + i * p.columns + c - at.c0, p.ldu, add);
        }
  }

  // dW = G^T U G for one output channel and W input channels, U being the sum of those of so many
  // blocks; whether all of it is finite.
  template <class Out>
  static bool transform_output(const Plan& p, const ConvBackwardWeightArgs& args, const float* u,
                               int64_t blocks, int64_t o, int64_t c) {
    reg d[P], t[3 * IN], w[9];
#pragma GCC unroll 36
    for (int i = 0; i < P; ++i) d[i] = Vec::load(u + i * p.columns);
    for (int64_t block = 1; block < blocks; ++block) {
      u += p.parts * p.u_floats;
#pragma GCC unroll 36
      for (int i = 0; i < P; ++i) d[i] = Vec::add(d[i], Vec::load(u + i * p.columns));
    }
#pragma GCC unroll 6
    for (int j = 0; j < IN; ++j) F::weight_gradient(d + j, IN, t + j, IN);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) F::weight_gradient(t + i * IN, 1, w + i * 3, 1);
    const int64_t lanes = min64(W, args.s.c - c);
    using To = typename Out::T;
    To* out = static_cast<To*>(args.grad_weight) + o * 9 * args.s.c;
    To staged[9 * W];
    reg test = Vec::zero();  // 0 * w is NaN where w is not finite
    for (int i = 0; i < 9; ++i) {
      if (args.channels_last)
        put_gradient<Out>(out + i * args.s.c + c, w[i], lanes);
      else
        Out::store(staged + i * W, w[i]);
      test = Vec::fma(w[i], Vec::zero(), test);
    }
    if (!args.channels_last)
      for (int64_t l = 0; l < lanes; ++l)
        for (int i = 0; i < 9; ++i) out[(c + l) * 9 + i] = staged[i * W + l];
    return !Vec::any_nan(test);
  }

  static bool finish(const Plan& p, const ConvBackwardWeightArgs& args, const Part& at,
                     const float* u, int64_t blocks) {
    const auto transform = args.wide ? transform_output<F32> : transform_output<E>;
    bool finite = true;
    for (int64_t o = at.o0; o < at.o1; ++o)
      for (int64_t c = at.c0; c < at.c1; c += W)
        finite &= transform(p, args, u + (o - at.o0) * p.ldu + c - at.c0, blocks, o, c);
    _mm_sfence();  // what was streamed is there for the other threads
    return finite;
  }

  static bool run_apart(const Plan& p, const ConvBackwardWeightArgs& args) {
    const ConvShape& s = args.s;
    float* transformed = reinterpret_cast<float*>(args.scratch);
    float* sums = transformed + args.threads * (p.v_floats + p.g_floats);
    bool finite = true;
#pragma omp parallel num_threads(args.threads) reduction(&& : finite)
    {
      float* v = transformed + omp_get_thread_num() * (p.v_floats + p.g_floats);
      float* g = v + p.v_floats;
#pragma omp for schedule(static)
      for (int64_t block = 0; block < p.blocks; ++block) {
        const int64_t t0 = block * p.tiles / p.blocks, t1 = (block + 1) * p.tiles / p.blocks;
        for (int64_t t = t0; t < t1; ++t) {
          Wino::transform_input(p, s, static_cast<const T*>(args.x), t, 0, s.c, v + (t - t0) * p.ldv);
          transform_gradient(p, s, static_cast<const T*>(args.grad), t, g + (t - t0) * p.ldg);
        }
        for (int64_t part = 0; part < p.parts; ++part)
          multiply(p, Part(p, s, part), g, v, t1 - t0, sums + (block * p.parts + part) * p.u_floats,
                   false);
      }
#pragma omp for schedule(static)
      for (int64_t part = 0; part < p.parts; ++part)
        finite &= finish(p, args, Part(p, s, part), sums + part * p.u_floats, p.blocks);
    }
    return finite;
  }

  static bool run_together(const Plan& p, const ConvBackwardWeightArgs& args) {
    const ConvShape& s = args.s;
    float* v = reinterpret_cast<float*>(args.scratch);
    float *g = v + p.v_floats, *sums = g + p.g_floats;
    bool finite = true;
#pragma omp parallel num_threads(args.threads) reduction(&& : finite)
    for (int64_t block = 0; block < p.blocks; ++block) {
      const int64_t t0 = block * p.tiles / p.blocks, n = (block + 1) * p.tiles / p.blocks - t0;
      // Columns by columns, as the parts go: a thread then reads those that it transformed.
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < p.column_parts * n; ++i) {
        const int64_t c0 = i / n * p.columns, t = i % n;
        Wino::transform_input(p, s, static_cast<const T*>(args.x), t0 + t, c0,
                              min64(s.c, c0 + p.columns), v + t * p.ldv);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < n; ++t)
        transform_gradient(p, s, static_cast<const T*>(args.grad), t0 + t, g + t * p.ldg);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < p.parts; ++part) {
        const Part at(p, s, part);
        float* u = sums + (p.blocks == 1 ? omp_get_thread_num() : part) * p.u_floats;
        multiply(p, at, g, v, n, u, block > 0);
        if (block + 1 == p.blocks) finite &= finish(p, args, at, u, 1);
      }
    }
    return finite;
  }

  static bool run(const ConvBackwardWeightArgs& args) {
    const Plan p = plan(args.s, args.threads);
    return p.apart ? run_apart(p, args) : run_together(p, args);
  }
};
