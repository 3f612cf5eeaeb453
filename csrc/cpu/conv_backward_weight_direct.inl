// The weight's gradient of a convolution in one group, summed directly: dW[o][tap][c] is the sum over
// output pixels of grad[pixel][o] * x[the pixel's own under the tap][c]. That is one product of
// matrices, [o x pixels] by [pixels x (tap, c)], summed in float32.
//
// It is cut by the shape alone into units: some output channels, some panels of columns and a run of
// pixels. A thread takes whole units; block by block of pixels it copies what a unit reads to where its
// core finds it again, so that threads share nothing but what is only read. Runs are added in order.

//
// A Core multiplies blocks of kBlock pixels, in its registers MR output channels by a panel of NR columns:
// how it wants a gradient copied, how many rows of memory a unit's gradient (pitch) and sums (height) take,
// and where the unit's channels are cut.

// The sums in vector registers, a gradient as [step][channel][KU].
template <class E>
struct VectorCore {
  using T = typename E::T;
  static constexpr int MR = E::MR, KU = E::KU, NR = E::NV * Vec::W;
  // A panel's block of pixels stays in the L1 cache while all of the unit's channels meet it.
  static constexpr int64_t kBlock = (int64_t(16) << 10) / (NR * sizeof(T));

  static void begin() {}
  static void end() {}
  // Channels from one step to the next, away from powers of two, which share cache sets.
  static int64_t pitch(int64_t rows) { return round_up(rows, Vec::W) + Vec::W; }
  static int64_t height(int64_t rows) { return rows; }  // of a unit's sums
  static int64_t cut(int64_t i, int64_t cuts, int64_t height) { return i * height / cuts; }
  static void end_panel(T*, int64_t) {}
  static void copy(const T* const* rows, int64_t count, int64_t o0, int64_t o1, int64_t ldg, T* g) {
    copy_steps<E>(rows, count, o0, o1, ldg, g);
  }
  static void sum(const T* g, int64_t ldg, int64_t r0, int64_t r1, const T* v, int64_t count, float* u, int64_t ldu,
                  bool add) {
    sum_fn<E>(r1 - r0)(g + r0 * KU, ldg * KU, v, NR * KU, ceil_div(count, KU), u, ldu, add);
  }
};

template <class E, class Core = VectorCore<E>>
struct DirectBackwardWeight {
  using T = typename E::T;
  using reg = typename Vec::reg;
  static constexpr int W = Vec::W, NR = Core::NR, MR = Core::MR, KU = E::KU;
  // Output channels and panels of a unit: each copied value is then used some 256 times.
  static constexpr int64_t kRows = 256, kPanels = 256 / NR, kBlock = Core::kBlock;
  // Units enough for a few threads to get as many each; but no runs shorter than two blocks, nor sums
  // of more than this in all.
  static constexpr int64_t kUnits = 16, kMostSums = int64_t(12) << 20;

  struct Plan {
    int64_t pixels, taps, of_tap;      // output pixels; taps; panels of one tap
    int64_t panels, row_parts, column_parts, parts, runs, units;
    int64_t rows, columns;             // of one unit, at most; columns in panels
    int64_t ldg, grad_elements, u_floats, per_thread;  // per_thread in bytes
  };

  static Plan plan(const ConvShape& s) {
    Plan p{};
    p.pixels = s.n * s.oh() * s.ow();
    p.taps = s.kh * s.kw;
    p.of_tap = ceil_div(s.c, NR);
    p.panels = p.taps * p.of_tap;
    p.row_parts = ceil_div(s.o, kRows);
    p.column_parts = ceil_div(p.panels, kPanels);
    p.rows = ceil_div(s.o, p.row_parts);
    p.ldg = Core::pitch(p.rows);
    p.columns = ceil_div(p.panels, p.column_parts);
    p.parts = p.row_parts * p.column_parts;
    p.u_floats = Core::height(p.rows) * p.columns * NR;
    const int64_t sums = p.parts * p.u_floats * (int64_t)sizeof(float);
    p.runs = min64(min64(ceil_div(kUnits, p.parts), p.pixels / (2 * kBlock)), kMostSums / sums);
    p.runs = max64(1, p.runs);
    p.units = p.parts * p.runs;
    p.grad_elements = p.ldg * kBlock;
    p.per_thread = 3 * kBlock * (int64_t)sizeof(const T*) +
                   (p.grad_elements + kBlock * NR) * (int64_t)sizeof(T);
    return p;
  }

  static bool can_run(const ConvShape& s) { return s.groups == 1; }

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    const Plan p = plan(s);
    const int64_t sums = p.runs == 1 ? threads : p.units;
    return threads * p.per_thread + sums * p.u_floats * sizeof(float);
  }

  struct Unit {
    int64_t o0, o1, j0, j1, p0, p1;  // output channels, panels, pixels

    Unit(const Plan& p, const ConvShape& s, int64_t part, int64_t run) {
      const int64_t row = part % p.row_parts, column = part / p.row_parts;
      o0 = row * s.o / p.row_parts;
      o1 = (row + 1) * s.o / p.row_parts;
      j0 = column * p.panels / p.column_parts;
      j1 = (column + 1) * p.panels / p.column_parts;
      p0 = run * p.pixels / p.runs;
      p1 = (run + 1) * p.pixels / p.runs;
    }
  };

  // Where x lies under a tap for each of so many output pixels; null in the padding.
  static void find_rows(const ConvShape& s, const T* x, int64_t tap, int64_t first, int64_t count,
                        const T** rows) {
    const int64_t oh = s.oh(), ow = s.ow();
    const int64_t dy = tap / s.kw * s.dh - s.ph, dx = tap % s.kw * s.dw - s.pw;
    int64_t ox = first % ow, oy = first / ow % oh, n = first / ow / oh;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t iy = oy * s.sh + dy, ix = ox * s.sw + dx;
      const bool inside = iy >= 0 && iy < s.h && ix >= 0 && ix < s.w;
      rows[i] = inside ? x + ((n * s.h + iy) * s.w + ix) * s.c : nullptr;
      if (++ox < ow) continue;
      ox = 0;
      if (++oy < oh) continue;
      oy = 0;
      ++n;
    }
    for (int64_t i = count; i % KU; ++i) rows[i] = nullptr;
  }

  // Asks the memory for elements [begin, end) of each row.
  static void ask_for(const T* const* rows, int64_t count, int64_t begin, int64_t end) {
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = begin; rows[i] && j < end; j += LINE)
        _mm_prefetch(reinterpret_cast<const char*>(rows[i] + j), _MM_HINT_T1);
  }

  static void find_grad_rows(const ConvBackwardWeightArgs& args, int64_t first, int64_t count, const T** rows) {
    for (int64_t i = 0; i < round_up(count, KU); ++i)
      rows[i] = i < count ? static_cast<const T*>(args.grad) + (first + i) * args.s.o : nullptr;
  }

  // A unit's sums, [o][panel][NR]. While a block is summed, the memory is asked for the next.
  static void sum_unit(const Plan& p, const ConvBackwardWeightArgs& args, const Unit& at, char* work,
                       float* u) {
    const ConvShape& s = args.s;
    const T* x = static_cast<const T*>(args.x);
    const T** rows = reinterpret_cast<const T**>(work);
    const T **next_grad = rows + kBlock, **next_x = next_grad + kBlock;
    T* g = reinterpret_cast<T*>(next_x + kBlock);
    T* v = g + p.grad_elements;
    const int64_t ldu = p.columns * NR, height = at.o1 - at.o0, cuts = ceil_div(height, MR);
    const int64_t panels = at.j1 - at.j0, c0 = at.j0 % p.of_tap * NR, c1 = min64(s.c, c0 + panels * NR);
    if (at.p0 == at.p1) memset(u, 0, p.u_floats * sizeof(float));
    for (int64_t p0 = at.p0; p0 < at.p1; p0 += kBlock) {
      const int64_t count = min64(kBlock, at.p1 - p0);
      const int64_t next = min64(kBlock, at.p1 - p0 - count);
      find_grad_rows(args, p0, count, rows);
      Core::copy(rows, count, at.o0, at.o1, p.ldg, g);
      if (next > 0) {
        find_grad_rows(args, p0 + count, next, next_grad);
        find_rows(s, x, at.j0 / p.of_tap, p0 + count, next, next_x);
      }
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t panel = (at.j0 + j) % p.of_tap;
        if (j == 0 || panel == 0) find_rows(s, x, (at.j0 + j) / p.of_tap, p0, count, rows);
        copy_steps<E>(rows, count, panel * NR, s.c, NR, v);
        Core::end_panel(v, count);
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const int64_t i0 = (j * cuts + cut) * next / (panels * cuts);
          const int64_t i1 = (j * cuts + cut + 1) * next / (panels * cuts);
          ask_for(next_grad + i0, i1 - i0, at.o0, at.o1);
          ask_for(next_x + i0, i1 - i0, c0, c1);
          const int64_t r0 = Core::cut(cut, cuts, height), r1 = Core::cut(cut + 1, cuts, height);
          Core::sum(g, p.ldg, r0, r1, v, count, u + r0 * ldu + j * NR, ldu, p0 > at.p0);
        }
      }
    }
  }

  // dW of a part: the sums of its runs, `apart` floats from each other, in the weight's own layout.
  template <class Out>
  static void finish(const Plan& p, const ConvBackwardWeightArgs& args, const Unit& at, const float* u,
                     int64_t apart) {
    const int64_t c = args.s.c;
    using To = typename Out::T;
    To* out = static_cast<To*>(args.grad_weight);
    for (int64_t o = at.o0; o < at.o1; ++o)
      for (int64_t j = at.j0; j < at.j1; ++j)
        for (int64_t i = 0; i < NR; i += W) {
          const int64_t tap = j / p.of_tap, first = j % p.of_tap * NR + i, lanes = min64(W, c - first);
          if (lanes <= 0) break;
          const float* from = u + ((o - at.o0) * p.columns + j - at.j0) * NR + i;
          reg sum = Vec::load(from);
          for (int64_t run = 1; run < p.runs; ++run) sum = Vec::add(sum, Vec::load(from + run * apart));
          if (args.channels_last || p.taps == 1) {
            put_gradient<Out>(out + (o * p.taps + tap) * c + first, sum, lanes);
          } else {
            To staged[W];
            Out::store(staged, sum);
            for (int64_t l = 0; l < lanes; ++l) out[(o * c + first + l) * p.taps + tap] = staged[l];
          }
        }
    _mm_sfence();  // what was streamed is there for the other threads
  }

  static bool run(const ConvBackwardWeightArgs& args) {
    const ConvShape& s = args.s;
    const Plan p = plan(s);
    float* sums = reinterpret_cast<float*>(args.scratch + args.threads * p.per_thread);
    const int64_t apart = p.parts * p.u_floats;
    const auto write = args.wide ? finish<F32> : finish<E>;
#pragma omp parallel num_threads(args.threads)
    {
      const int64_t me = omp_get_thread_num();
      char* work = args.scratch + me * p.per_thread;
      Core::begin();
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < p.units; ++unit) {
        const Unit at(p, s, unit % p.parts, unit / p.parts);
        float* u = sums + (p.runs == 1 ? me : unit) * p.u_floats;
        sum_unit(p, args, at, work, u);
        if (p.runs == 1) write(p, args, at, u, apart);
      }
      Core::end();
      if (p.runs > 1) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < p.parts; ++part)
          write(p, args, Unit(p, s, part, 0), sums + part * p.u_floats, apart);
      }
    }
    return true;  // each NaN and infinity is where it belongs
  }
};
