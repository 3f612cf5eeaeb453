// The weight's gradient on the tile registers of AMX, the product of conv_backward_weight_direct.inl.
//
// The shape alone cuts pixels into runs, output channels into parts and columns into panels; a panel of one
// run and part is an item, and a thread takes items that follow each other. Block by block of pixels it
// transposes the gradient of a part, so that the pixels of a channel lie side by side, and copies what lies
// under a panel. Both stay in its L2 cache, and are read there in the order of their addresses: sums stay
// in the tiles for all of a block.

template <class E>
struct AmxBackwardWeight {
  using T = typename E::T;
  static constexpr int W = Vec::W, KU = E::KU, R = Tiles::R, K = Tiles::K, NR = 2 * W;
  // Output channels of a part, pixels of a block and panels that are copied together, at most: half a MiB
  // of gradient and half of that of x.
  static constexpr int64_t kRows = 256, kBlock = 1024, kPanels = 4;
  // Items enough for a few threads to get as many each; but no runs shorter than this, nor sums of more
  // bytes than this in all.
  static constexpr int64_t kItems = 16, kShortest = 1024, kMostSums = int64_t(12) << 20;

  struct Plan {
    int64_t pixels, taps, of_tap, panels;  // output pixels; taps; panels of one tap and of all
    int64_t parts, rows;                   // of output channels; channels of one, at most, in whole tiles
    int64_t runs, block, items;            // runs of pixels, pixels of a block
    int64_t sums;                          // floats of an item
    bool kept;                             // sums of all items, else of one for each thread
    int64_t per_thread;                    // bytes
  };

  static Plan plan(const ConvShape& s) {
    Plan p{};
    p.pixels = s.n * s.oh() * s.ow();
    p.taps = s.kh * s.kw;
    p.of_tap = ceil_div(s.c, NR);
    p.panels = p.taps * p.of_tap;
    p.parts = ceil_div(s.o, kRows);
    p.rows = round_up(ceil_div(s.o, p.parts), R);
    p.sums = p.rows * NR;
    const int64_t all = p.parts * p.panels, bytes = all * p.sums * (int64_t)sizeof(float);
    p.runs = min64(min64(ceil_div(kItems, all), p.pixels / kShortest), kMostSums / bytes);
    p.runs = max64(1, p.runs);
    p.items = p.runs * all;
    const int64_t run = ceil_div(p.pixels, p.runs), blocks = max64(1, ceil_div(run, kBlock));
    p.block = max64(K, round_up(ceil_div(run, blocks), K));
    p.kept = p.runs > 1 || blocks > 1;
    p.per_thread = p.block * ((int64_t)sizeof(const T*) + (p.rows + kPanels * NR) * (int64_t)sizeof(T));
    return p;
  }

  static bool can_run(const ConvShape& s) { return s.groups == 1; }

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    const Plan p = plan(s);
    return threads * p.per_thread + (p.kept ? p.items : threads) * p.sums * sizeof(float);
  }

  // Items one behind the other: some panels of one part and run.
  struct Group {
    int64_t o0, o1, p0, p1, j0, j1;  // output channels, pixels, panels

    Group(const Plan& p, const ConvShape& s, int64_t first, int64_t last) {
      const int64_t part = first / p.panels % p.parts, run = first / p.panels / p.parts;
      o0 = part * s.o / p.parts;
      o1 = (part + 1) * s.o / p.parts;
      p0 = run * p.pixels / p.runs;
      p1 = (run + 1) * p.pixels / p.runs;
      j0 = first % p.panels;
      j1 = min64(p.panels, j0 + last - first);
    }
  };

  // -> [16 channels][32 pixels] as the first operand of a product, step by step of pixels, then the next
  // channels. Zeros beyond the last pixel; what is beyond the last channel is computed and not kept.
  static void transpose(const T* const* rows, int64_t count, int64_t o0, int64_t o1, T* g) {
    const int64_t steps = ceil_div(count, K);
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t o = o0; o < o1; o += W) {
        Vec::reg r[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          const int64_t p = step * K + KU * i;
          r[i] = p < count ? E::step(rows + p, o, Vec::first(o1 - o)) : Vec::zero();
        }
        Vec::transpose(r);
        T* to = g + ((o - o0) / W * steps + step) * R * K;
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) Vec::store(reinterpret_cast<float*>(to + i * K), r[i]);
      }
  }

  // u[16 or 32 channels][NR] = [u +] the sum over the steps.
  template <int MT>
  static void sum_tiles(const T* a0, const T* a1, const T* b, int64_t steps, float* u, bool add) {
    constexpr int64_t LINE = NR * sizeof(float), LDB = 2 * Tiles::LINE;
    asm volatile("" ::: "memory");  // what the tiles are loaded from is written
    if (add) {
      Tiles::load<0>(u, LINE);
      Tiles::load<1>(u + R, LINE);
      if (MT > 1) Tiles::load<2>(u + R * NR, LINE);
      if (MT > 1) Tiles::load<3>(u + R * NR + R, LINE);
    } else {
      Tiles::zero<0>();
      Tiles::zero<1>();
      if (MT > 1) Tiles::zero<2>();
      if (MT > 1) Tiles::zero<3>();
    }
    for (; steps > 0; --steps, a0 += R * K, a1 += R * K, b += K * NR) {
      Tiles::load<4>(a0, Tiles::LINE);
      Tiles::load<6>(b, LDB);
      Tiles::dot<0, 4, 6>();
      Tiles::load<7>(b + K, LDB);
      Tiles::dot<1, 4, 7>();
      if (MT > 1) {
        Tiles::load<5>(a1, Tiles::LINE);
        Tiles::dot<2, 5, 6>();
        Tiles::dot<3, 5, 7>();
      }
    }
    Tiles::store<0>(u, LINE);
    Tiles::store<1>(u + R, LINE);
    if (MT > 1) Tiles::store<2>(u + R * NR, LINE);
    if (MT > 1) Tiles::store<3>(u + R * NR + R, LINE);
  }

  // Channels [first, last) of the rows -> [panel][two pixels][NR][KU], the second operand. Zeros up to a
  // whole step of the tiles. All that is wanted of a row is read at once, as memory gives it fastest.
  static void copy_panels(const T* const* rows, int64_t count, int64_t first, int64_t last, T* v) {
    const int64_t pixels = round_up(count, K);
    for (int64_t p = 0; p < pixels; p += KU, v += KU * NR)
      for (int64_t c = first, at = 0; c < last; c += NR, at += pixels * NR)
        if (p < count)
          E::store_steps(rows + p, c, last - c, v + at);
        else
          memset(v + at, 0, KU * NR * sizeof(T));
  }

  // The sums of a group's items, each [o][NR], and dW where there is one run.
  template <class Out>
  static void sum_group(const Plan& p, const ConvBackwardWeightArgs& args, const Group& at, char* work,
                        float* sums) {
    const ConvShape& s = args.s;
    const T** rows = reinterpret_cast<const T**>(work);
    T* g = reinterpret_cast<T*>(rows + p.block);
    T* v = g + p.rows * p.block;
    for (int64_t p0 = at.p0; p0 < at.p1; p0 += p.block) {
      const int64_t count = min64(p.block, at.p1 - p0), steps = ceil_div(count, K);
      find_grad_rows<E>(args, p0, count, rows);
      transpose(rows, count, at.o0, at.o1, g);
      for (int64_t j = at.j0, j1; j < at.j1; j = j1) {
        const int64_t tap = j / p.of_tap, c = j % p.of_tap * NR;
        j1 = min64(min64(j + kPanels, at.j1), (tap + 1) * p.of_tap);
        if (j == at.j0 || c == 0) find_rows<E>(s, static_cast<const T*>(args.x), tap, p0, count, rows);
        copy_panels(rows, count, c, min64(s.c, c + (j1 - j) * NR), v);
        for (int64_t i = j; i < j1; ++i) {
          float* u = p.kept ? sums + (i - at.j0) * p.sums : sums;
          sum_panel(g, at.o1 - at.o0, v + (i - j) * steps * K * NR, steps, u, p0 > at.p0);
          if (p.runs == 1 && p0 + p.block >= at.p1) put_panel<Out>(p, args, at.o0, at.o1, i, u, 0);
        }
      }
    }
  }

  // u[channels][NR] = [u +] the product of the part's gradient and a panel.
  static void sum_panel(const T* g, int64_t channels, const T* v, int64_t steps, float* u, bool add) {
    for (int64_t o = 0; o < channels; o += 2 * R) {
      const T* a = g + o * steps * K;
      (channels - o > R ? sum_tiles<2> : sum_tiles<1>)(a, a + R * steps * K, v, steps, u + o * NR, add);
    }
  }

  // dW of a panel: the sums of its runs, `apart` floats from each other.
  template <class Out>
  static void put_panel(const Plan& p, const ConvBackwardWeightArgs& args, int64_t o0, int64_t o1, int64_t j,
                        const float* u, int64_t apart) {
    for (int64_t o = o0; o < o1; ++o, u += NR)
      for (int64_t i = 0; i < NR; i += W)
        put_sum<Out>(args, o, j / p.of_tap, j % p.of_tap * NR + i, u + i, p.runs, apart);
  }

  template <class Out>
  static void run_as(const ConvBackwardWeightArgs& args) {
    const Plan p = plan(args.s);
    float* sums = reinterpret_cast<float*>(args.scratch + args.threads * p.per_thread);
#pragma omp parallel num_threads(args.threads)
    {
      const int64_t me = omp_get_thread_num(), all = omp_get_num_threads(), end = p.items * (me + 1) / all;
      Tiles::begin();
      for (int64_t i = p.items * me / all; i < end;) {
        const Group at(p, args.s, i, end);
        sum_group<Out>(p, args, at, args.scratch + me * p.per_thread, sums + (p.kept ? i : me) * p.sums);
        i += at.j1 - at.j0;
      }
      Tiles::end();
      if (p.runs > 1) {
        const int64_t of_run = p.parts * p.panels;
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < of_run; ++i) {
          const Group at(p, args.s, i, i + 1);
          put_panel<Out>(p, args, at.o0, at.o1, at.j0, sums + i * p.sums, of_run * p.sums);
        }
      }
      _mm_sfence();  // what was streamed is there for the other threads
    }
  }

  static bool run(const ConvBackwardWeightArgs& args) {
    const ConvShape& s = args.s;
    if (s.n == 0)
      memset(args.grad_weight, 0, s.o * s.c * s.kh * s.kw * (args.wide ? sizeof(float) : sizeof(T)));
    else
      args.wide ? run_as<F32>(args) : run_as<E>(args);
    return true;  // each NaN and infinity is where it belongs
  }
};
