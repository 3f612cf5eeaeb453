// The weight's gradient of a convolution in one group, summed directly: dW[o][tap][c] is the sum over
// output pixels of grad[pixel][o] * x[the pixel's own under the tap][c]. That is one product of
// matrices, [o x pixels] by [pixels x (tap, c)], summed in float32.
//
// It is cut by the shape alone into units: some output channels, some panels of columns and a run of
// pixels. A thread takes whole units; block by block of pixels it copies what a unit reads to where its
// core finds it again, so that threads share nothing but what is only read. Runs are added in order.

// Where x lies under a tap for each of so many output pixels, a whole step of them; null in the padding.
template <class E>
static void find_rows(const ConvShape& s, const typename E::T* x, int64_t tap, int64_t first,
                      int64_t count, const typename E::T** rows) {
  const int64_t oh = s.oh(), ow = s.ow();
  const int64_t dy = tap / s.kw * s.dh - s.ph, dx = tap % s.kw * s.dw - s.pw;
  int64_t ox = first % ow, oy = first / ow % oh, n = first / ow / oh;
  for (int64_t i = 0; i < count;) {
    const int64_t iy = oy * s.sh + dy, left = ox * s.sw + dx, width = min64(count - i, ow - ox);
    const bool inside = iy >= 0 && iy < s.h;
    const int64_t begin = inside ? min64(width, left < 0 ? ceil_div(-left, s.sw) : 0) : width;
    const int64_t end = max64(begin, min64(width, ceil_div(s.w - left, s.sw)));
    const int64_t row = ((n * s.h + iy) * s.w + left) * s.c;
    for (int64_t k = 0; k < begin; ++k) rows[i + k] = nullptr;
    for (int64_t k = begin; k < end; ++k) rows[i + k] = x + (row + k * s.sw * s.c);
    for (int64_t k = end; k < width; ++k) rows[i + k] = nullptr;
    i += width;
    ox = 0;
    if (++oy < oh) continue;
    oy = 0;
    ++n;
  }
  for (int64_t i = count; i % E::KU; ++i) rows[i] = nullptr;
}

template <class E>
static void find_grad_rows(const ConvBackwardWeightArgs& args, int64_t first, int64_t count,
                           const typename E::T** rows) {
  for (int64_t i = 0; i < round_up(count, E::KU); ++i)
    rows[i] =
        i < count ? static_cast<const typename E::T*>(args.grad) + (first + i) * args.s.o : nullptr;
}

// Asks the memory for elements [begin, end) of each row.
template <class T>
static void ask_for(const T* const* rows, int64_t count, int64_t begin, int64_t end) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = begin; rows[i] && j < end; j += LINE)
      _mm_prefetch(reinterpret_cast<const char*>(rows[i] + j), _MM_HINT_T1);
}

// Up to W channels of dW, from `first` on: what so many runs summed, `apart` floats from each other, in the
// weight's own layout.
template <class Out>
static void put_sum(const ConvBackwardWeightArgs& args, int64_t o, int64_t tap, int64_t first,
                    const float* from, int64_t runs, int64_t apart) {
  using To = typename Out::T;
  const int64_t c = args.s.c, taps = args.s.kh * args.s.kw, lanes = min64(Vec::W, c - first);
  if (lanes <= 0) return;
  Vec::reg sum = Vec::load(from);
  for (int64_t run = 1; run < runs; ++run) sum = Vec::add(sum, Vec::load(from + run * apart));
  To* out = static_cast<To*>(args.grad_weight);
  if (args.channels_last || taps == 1)
    return put_gradient<Out>(out + (o * taps + tap) * c + first, sum, lanes);
  To staged[Vec::W];
  Out::store(staged, sum);
  for (int64_t l = 0; l < lanes; ++l) out[(o * c + first + l) * taps + tap] = staged[l];
}

template <class E>
struct DirectBackwardWeight {
  using T = typename E::T;
  using Operand = typename E::Operand;
  static constexpr int W = Vec::W, NR = E::NV * W, MR = E::MR, KU = E::KU;
  // Output channels and panels of a unit: each copied value is then used some 256 times. A panel's block
  // of pixels stays in the L1 cache while all of the unit's channels meet it.
  static constexpr int64_t kRows = 256, kPanels = 256 / NR;
  static constexpr int64_t kBlock = (int64_t(16) << 10) / (NR * sizeof(Operand));
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
    p.ldg = round_up(p.rows, W) + W;  // away from powers of two, which share cache sets
    p.columns = ceil_div(p.panels, p.column_parts);
    p.parts = p.row_parts * p.column_parts;
    p.u_floats = p.rows * p.columns * NR;
    const int64_t sums = p.parts * p.u_floats * (int64_t)sizeof(float);
    p.runs = min64(min64(ceil_div(kUnits, p.parts), p.pixels / (2 * kBlock)), kMostSums / sums);
    p.runs = max64(1, p.runs);
    p.units = p.parts * p.runs;
    p.grad_elements = p.ldg * kBlock;
    p.per_thread = 3 * kBlock * (int64_t)sizeof(const T*) +
                   (p.grad_elements + kBlock * NR) * (int64_t)sizeof(Operand);
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

  // A unit's sums, [o][panel][NR]. While a block is summed, the memory is asked for the next.
  static void sum_unit(const Plan& p, const ConvBackwardWeightArgs& args, const Unit& at, char* work,
                       float* u) {
    const ConvShape& s = args.s;
    const T* x = static_cast<const T*>(args.x);
    const T** rows = reinterpret_cast<const T**>(work);
    const T **next_grad = rows + kBlock, **next_x = next_grad + kBlock;
    Operand* g = reinterpret_cast<Operand*>(next_x + kBlock);
    Operand* v = g + p.grad_elements;
    const int64_t ldu = p.columns * NR, height = at.o1 - at.o0, cuts = ceil_div(height, MR);
    const int64_t panels = at.j1 - at.j0, c0 = at.j0 % p.of_tap * NR, c1 = min64(s.c, c0 + panels * NR);
    if (at.p0 == at.p1) memset(u, 0, p.u_floats * sizeof(float));
    for (int64_t p0 = at.p0; p0 < at.p1; p0 += kBlock) {
      const int64_t count = min64(kBlock, at.p1 - p0);
      const int64_t next = min64(kBlock, at.p1 - p0 - count);
      find_grad_rows<E>(args, p0, count, rows);
      copy_steps<E>(rows, count, at.o0, at.o1, p.ldg, g);
      if (next > 0) {
        find_grad_rows<E>(args, p0 + count, next, next_grad);
        find_rows<E>(s, x, at.j0 / p.of_tap, p0 + count, next, next_x);
      }
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t panel = (at.j0 + j) % p.of_tap;
        if (j == 0 || panel == 0) find_rows<E>(s, x, (at.j0 + j) / p.of_tap, p0, count, rows);
        copy_steps<E>(rows, count, panel * NR, s.c, NR, v);
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const int64_t i0 = (j * cuts + cut) * next / (panels * cuts);
          const int64_t i1 = (j * cuts + cut + 1) * next / (panels * cuts);
          ask_for(next_grad + i0, i1 - i0, at.o0, at.o1);
          ask_for(next_x + i0, i1 - i0, c0, c1);
          const int64_t r0 = cut * height / cuts, r1 = (cut + 1) * height / cuts;
          sum_fn<E>(r1 - r0)(g + r0 * KU, p.ldg * KU, v, NR * KU, ceil_div(count, KU),
                             u + r0 * ldu + j * NR, ldu, p0 > at.p0);
        }
      }
    }
  }

  // dW of a part: the sums of its runs, `apart` floats from each other, in the weight's own layout.
  template <class Out>
  static void finish(const Plan& p, const ConvBackwardWeightArgs& args, const Unit& at, const float* u,
                     int64_t apart) {
    for (int64_t o = at.o0; o < at.o1; ++o)
      for (int64_t j = at.j0; j < at.j1; ++j)
        for (int64_t i = 0; i < NR; i += W)
          put_sum<Out>(args, o, j / p.of_tap, j % p.of_tap * NR + i,
                       u + ((o - at.o0) * p.columns + j - at.j0) * NR + i, p.runs, apart);
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
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < p.units; ++unit) {
        const Unit at(p, s, unit % p.parts, unit / p.parts);
        float* u = sums + (p.runs == 1 ? me : unit) * p.u_floats;
        sum_unit(p, args, at, work, u);
        if (p.runs == 1) write(p, args, at, u, apart);
      }
      if (p.runs > 1) {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < p.parts; ++part)
          write(p, args, Unit(p, s, part, 0), sums + part * p.u_floats, apart);
      }
    }
    return true;  // each NaN and infinity is where it belongs
  }
};
