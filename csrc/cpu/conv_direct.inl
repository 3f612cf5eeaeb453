// Direct convolution: the taps are summed in registers, nothing is written but the result.
// Where the input needs a border (padding), an even channel count (pairs of bf16) or to be widened, each
// thread copies the rows of one block of outputs, with zeros around them, into a buffer that stays in its
// L2 cache.
//
// NARROW, for the first layer by pairs of bf16: the columns of the kernel and the few channels are one run
// of elements, with one odd element per run instead of one per pixel.

template <class E, bool NARROW = false>
struct Direct {
  using T = typename E::T;
  using Operand = typename E::Operand;

  struct Plan {
    ConvShape s;             // a 1x1 stride-1 convolution becomes one long row of pixels
    int64_t cp;              // channels of one group in the buffer, a multiple of KU
    int64_t run, taps;       // steps of one contiguous run, and how many runs there are
    int nv;                  // registers across the tile
    int64_t panels, panel;   // per group; elements of one packed panel
    int64_t chunk, chunks;   // panels whose weights stay in L2 together, per group
    bool copy;
    int64_t pitch;           // elements from one pixel to the next
    int64_t bh, bw, nbh, nbw;    // block of outputs, and blocks per image
    int64_t xh, xw, xs;          // rows, columns and column step of the copied block
    int64_t buffer;              // elements
    bool merged;                 // a run spans all the columns of the kernel
    bool tail;                   // a run has an odd element at its end
  };

  static Plan plan(const ConvShape& shape) {
    Plan p{};
    p.s = shape;
    ConvShape& s = p.s;
    if (s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0) {
      s.w *= s.n * s.h;
      s.n = s.h = 1;
    }
    const int64_t cg = s.cg(), og = s.og();
    p.cp = NARROW ? cg : round_up(cg, E::KU);
    // Rows of a tile that lie a multiple of 4 KiB apart share the same few sets of the L1 cache.
    const bool crowded = s.sw * s.c * (int64_t)sizeof(T) % 4096 == 0;
    p.copy = s.ph || s.pw || p.cp != cg || crowded || !std::is_same_v<T, Operand>;
    p.xs = s.kw == 1 ? 1 : s.sw;
    p.pitch = p.copy ? s.groups * p.cp : s.c;
    const int64_t apart = p.xs * p.pitch * (int64_t)sizeof(Operand);
    if (p.copy && apart % 2048 == 0 && !NARROW) p.pitch += 64 / sizeof(Operand);
    p.merged = p.pitch == p.cp && s.dw == 1;
    p.taps = p.merged ? s.kh : s.kh * s.kw;
    const int64_t run = (p.merged ? s.kw : 1) * p.cp;
    p.run = run / E::KU;
    p.tail = run % E::KU;
    p.nv = og <= E::W ? 1 : E::NV;
    p.panels = ceil_div(og, p.nv * E::W);
    p.panel = p.taps * (p.run + p.tail) * E::KU * p.nv * E::W;
    const int64_t fit = (p.copy ? 300 << 10 : 400 << 10) / (p.panel * (int64_t)sizeof(Operand));
    p.chunks = ceil_div(p.panels, max64(1, min64(fit, p.panels)));
    p.chunk = ceil_div(p.panels, p.chunks);
    p.chunks = ceil_div(p.panels, p.chunk);

    const int64_t oh = s.oh(), ow = s.ow();
    p.bh = max64(1, oh);
    p.bw = max64(1, ow);
    if (p.copy) {
      const int64_t pixel = p.pitch * (int64_t)sizeof(Operand), budget = 480 << 10;
      auto rows = [&](int64_t bh) { return (bh - 1) * s.sh + s.dh * (s.kh - 1) + 1; };
      auto cols = [&](int64_t bw) { return s.kw == 1 ? bw : (bw - 1) * s.sw + s.dw * (s.kw - 1) + 1; };
      while (p.bh > 1 && rows(p.bh) * cols(p.bw) * pixel > budget) p.bh = ceil_div(p.bh, 2);
      while (p.bw > E::MR && rows(p.bh) * cols(p.bw) * pixel > budget) p.bw = ceil_div(p.bw, 2);
      p.xh = rows(p.bh);
      p.xw = cols(p.bw);
      p.buffer = p.xh * p.xw * p.pitch;
    }
    p.nbh = ceil_div(oh, p.bh);
    p.nbw = ceil_div(ow, p.bw);
    return p;
  }

  static bool can_run(const ConvShape& s) {
    return !NARROW || (s.groups == 1 && s.dw == 1 && s.c < 16);
  }

  static size_t packed_bytes(const ConvShape& s) {
    const Plan p = plan(s);
    return s.groups * p.panels * p.panel * sizeof(Operand);
  }

  // -> [group][panel][kh][kw][step][NV * W][KU], zeros beyond the last channel.
  static void pack(const ConvShape& s, const Weight& weight, void* packed) {
    const Plan p = plan(s);
    const int64_t nr = p.nv * E::W, cg = s.cg(), og = s.og(), kk = s.kh * s.kw;
    // The elements of a run are channels, or all of (kw, channel).
    const int64_t runs = NARROW ? s.kh : kk, length = NARROW ? s.kw * cg : cg;
    const int64_t steps = ceil_div(length, E::KU);
    const int64_t along_o = weight.along_o, along_c = weight.along_c;
    const bool whole = !NARROW && cg % E::KU == 0;
    if (whole && along_o == 1) return pack_rows(p, weight, static_cast<Operand*>(packed));
#pragma omp parallel for
    for (int64_t q = 0; q < s.groups * p.panels; ++q) {
      Operand* out = static_cast<Operand*>(packed) + q * p.panel;
      const int64_t o0 = q % p.panels * nr, valid = min64(nr, og - o0);
      const int64_t w = (q / p.panels * og + o0) * along_o;
      if (whole && along_c == 1) {
        for (int64_t t = 0; t < kk; ++t, out += cg * nr)
          pack_columns(weight, w + t * weight.along_tap, valid, cg, nr, out);
        continue;
      }
      if (valid < nr || length % E::KU) memset(out, 0, p.panel * sizeof(Operand));
      for (int64_t t = 0; t < runs; ++t, out += steps * nr * E::KU)
        for (int64_t x = 0; x < kk / runs; ++x) {
          const int64_t from = w + (t * (kk / runs) + x) * weight.along_tap;
          const auto copy = [&](int64_t j, int64_t c) {
            const int64_t e = x * cg + c;
            out[(e / E::KU * nr + j) * E::KU + e % E::KU] =
                operand<E>(weight, from + j * along_o + c * along_c);
          };
          // Along what is next to each other in memory.
          if (along_o < along_c)
            for (int64_t c = 0; c < cg; ++c)
              for (int64_t j = 0; j < valid; ++j) copy(j, c);
          else
            for (int64_t j = 0; j < valid; ++j)
              for (int64_t c = 0; c < cg; ++c) copy(j, c);
        }
    }
  }

  // Where output channels lie side by side: their rows, each read once and dealt out to the panels.
  static void pack_rows(const Plan& p, const Weight& weight, Operand* packed) {
    constexpr int KU = E::KU;
    const ConvShape& s = p.s;
    const int64_t nr = p.nv * E::W, og = s.og(), steps = s.cg() / KU, of_group = s.kh * s.kw * steps;
#pragma omp parallel for
    for (int64_t i = 0; i < s.groups * of_group; ++i) {
      const int64_t g = i / of_group, step = i % of_group;
      const int64_t w = g * og + step / steps * weight.along_tap + step % steps * KU * weight.along_c;
      T room[KU][E::NV * E::W];
      const T* rows[KU];
      for (int64_t q = 0; q < p.panels; ++q) {
        const int64_t valid = min64(nr, og - q * nr);
        for (int k = 0; k < KU; ++k)
          rows[k] = elements<E>(weight, w + k * weight.along_c + q * nr, valid, 2 * KU * weight.along_c, room[k]);
        copy_steps<E>(rows, KU, 0, valid, nr, packed + (g * p.panels + q) * p.panel + step * nr * KU);
      }
    }
  }

  // A tap of a panel where input channels lie side by side: transposed.
  static void pack_columns(const Weight& weight, int64_t w, int64_t valid, int64_t length, int64_t nr,
                           Operand* out) {
    constexpr int KU = E::KU, W = Vec::W;
    for (int64_t j0 = 0; j0 < nr; j0 += W)
      for (int64_t s0 = 0; s0 < length / KU; s0 += W) {
        const int64_t count = min64(W, length / KU - s0);
        Vec::reg r[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j)
          r[j] = j0 + j < valid ? steps<E>(weight, w + (j0 + j) * weight.along_o + s0 * KU, count) : Vec::zero();
        Vec::transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
          if (i < count) Vec::store(reinterpret_cast<float*>(out + ((s0 + i) * nr + j0) * KU), r[i]);
      }
  }

  static size_t scratch_bytes(const ConvShape& s, int threads) {
    const Plan p = plan(s);
    return round_up(p.taps * sizeof(int64_t), 64) + threads * round_up(p.buffer * sizeof(Operand), 64);
  }

  // How a block's outputs are cut into register tiles: two short rows to a tile, or a row in parts.
  struct Cut {
    bool pair;
    int64_t per_row, count;
    Cut(const Plan& p, int64_t bh, int64_t bw) {
      pair = 2 * bw <= E::MR;
      per_row = ceil_div(bw, E::MR);
      count = pair ? ceil_div(bh, 2) : bh * per_row;
    }
  };

  static Cut cut_of(const Plan& p, int64_t block) {
    return Cut(p, min64(p.bh, p.s.oh() - block / p.nbw * p.bh),
               min64(p.bw, p.s.ow() - block % p.nbw * p.bw));
  }

  // The u-th unit of work, a tile for one chunk of panels. A copied block meets all the weights in
  // turn; where nothing is copied, a chunk of weights meets all the images.
  struct Place {
    int64_t n, block, chunk, tile;
    int64_t y, x;  // the block's first output

    Place(const Plan& p, int64_t per_image, int64_t u) {
      const int64_t chunks = p.s.groups * p.chunks, inner = p.copy ? chunks : 1;
      n = u / (per_image * inner) % p.s.n;
      chunk = p.copy ? 0 : u / (p.s.n * per_image);
      tile = u % (per_image * inner);
      block = 0;
      for (int64_t size; tile >= (size = cut_of(p, block).count * inner); ++block) tile -= size;
      if (p.copy) {
        chunk = tile / cut_of(p, block).count;
        tile %= cut_of(p, block).count;
      }
      y = block / p.nbw * p.bh;
      x = block % p.nbw * p.bw;
    }
  };

  // So many and no more: zeros may lie behind them already.
  static void copy_elements(const T* from, int64_t count, Operand* to) {
    if constexpr (!std::is_same_v<T, Operand>) {
      int64_t i = 0;
      for (; i + E::W <= count; i += E::W) Vec::store(to + i, E::load(from + i));
      const auto rest = Vec::first(count - i);
      if (i < count) Vec::store(to + i, E::load(from + i, rest), rest);
    } else if (count > 4) {
      memcpy(to, from, count * sizeof(T));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    }
  }

  // Copies the input under a block, zeros where there is none.
  static void copy_block(const Plan& p, const T* x, const Place& at, Operand* out) {
    const ConvShape& s = p.s;
    const int64_t n = at.n, y0 = at.y, x0 = at.x;
    const int64_t cg = s.cg(), pixel = p.pitch;
    const int64_t step = s.kw == 1 ? s.sw : 1, left = x0 * s.sw - s.pw;
    const int64_t first = min64(p.xw, left < 0 ? ceil_div(-left, step) : 0);
    const int64_t last = max64(first, min64(p.xw, ceil_div(s.w - left, step)));
    for (int64_t r = 0; r < p.xh; ++r, out += p.xw * pixel) {
      const int64_t iy = y0 * s.sh - s.ph + r;
      if (iy < 0 || iy >= s.h || first == last) {
        memset(out, 0, p.xw * pixel * sizeof(Operand));
        continue;
      }
      memset(out, 0, first * pixel * sizeof(Operand));
      memset(out + last * pixel, 0, (p.xw - last) * pixel * sizeof(Operand));
      const T* in = x + ((n * s.h + iy) * s.w + left) * s.c;
      if (pixel == s.c && step == 1) {
        copy_elements(in + first * pixel, (last - first) * pixel, out + first * pixel);
      } else {
        for (int64_t i = first; i < last; ++i)
          for (int64_t g = 0; g < s.groups; ++g) {
            Operand* to = out + i * pixel + g * p.cp;
            const T* from = in + i * step * s.c + g * cg;
            copy_elements(from, cg, to);
            for (int64_t c = cg; c < p.cp; ++c) to[c] = 0;
          }
      }
    }
  }

  static void run(const ConvArgs& args) {
    const Plan p = plan(args.s);
    const ConvShape& s = p.s;
    const int64_t oh = s.oh(), ow = s.ow();
    if (s.n * oh * ow * s.o == 0) return;
    int64_t* tap = reinterpret_cast<int64_t*>(args.scratch);
    const int64_t pixel = p.pitch, pitch = (p.copy ? p.xw : s.w) * pixel;
    for (int64_t t = 0; t < p.taps; ++t)
      tap[t] = p.merged ? t * s.dh * pitch : t / s.kw * s.dh * pitch + t % s.kw * s.dw * pixel;
    int64_t per_image = 0;
    for (int64_t b = 0; b < p.nbh * p.nbw; ++b) per_image += cut_of(p, b).count;
    const int64_t units = s.groups * p.chunks * s.n * per_image;
    char* buffers = args.scratch + round_up(p.taps * sizeof(int64_t), 64);
    const int64_t stride = round_up(p.buffer * sizeof(Operand), 64);
#pragma omp parallel num_threads(args.threads)
    {
      const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
      const int64_t lo = units * me / all, hi = units * (me + 1) / all;
      Operand* buffer = reinterpret_cast<Operand*>(buffers + me * stride);
      int64_t held = -1;  // the block in the buffer
      for (int64_t u = lo; u < hi;) {
        const Place at(p, per_image, u);
        if (p.copy && held != at.n * p.nbh * p.nbw + at.block) {
          copy_block(p, static_cast<const T*>(args.x), at, buffer);
          held = at.n * p.nbh * p.nbw + at.block;
        }
        const Cut cut = cut_of(p, at.block);
        const int64_t end = min64(cut.count, at.tile + hi - u);
        for (int64_t i = at.tile; i < end; ++i, ++u) one_tile(p, args, tap, buffer, cut, at, i);
      }
    }
  }

  static void one_tile(const Plan& p, const ConvArgs& args, const int64_t* tap, const Operand* buffer,
                       const Cut& cut, const Place& at, int64_t i) {
    const ConvShape& s = p.s;
    const int64_t n = at.n, q = at.chunk, by = at.y, bx = at.x;
    const int64_t oh = s.oh(), ow = s.ow(), bw = min64(p.bw, ow - bx);
    const int64_t row = cut.pair ? 2 * i : i / cut.per_row;
    const int64_t part = cut.pair ? 0 : i % cut.per_row;
    const int64_t c0 = part * bw / cut.per_row, c1 = (part + 1) * bw / cut.per_row;
    const bool two = cut.pair && by + row + 1 < min64(oh, by + p.bh);
    const int64_t rows = two ? 2 * bw : c1 - c0, half = (rows + 1) / 2;
    const int64_t g = q / p.chunks, cg = p.copy ? p.cp : s.cg(), og = s.og();
    TileArgs t;
    int64_t down;  // elements from one output row's input to the next's
    const Operand* a;
    if (p.copy) {
      t.lda = p.xs * p.pitch;
      down = s.sh * p.xw * p.pitch;
      a = buffer + row * down + c0 * t.lda;
    } else {
      t.lda = s.sw * s.c;
      down = s.sh * s.w * s.c;
      a = static_cast<const Operand*>(args.x) + n * s.h * s.w * s.c + (by + row) * down + (bx + c0) * t.lda;
    }
    t.a0 = a + g * cg;
    t.a1 = a + g * cg + (two ? down : half * t.lda);
    t.tap = tap;
    t.taps = p.taps;
    t.steps = p.run;
    t.tail = p.tail;
    t.ldy = s.o;
    t.y0 = ((n * oh + by + row) * ow + bx + c0) * s.o;
    t.y1 = t.y0 + (two ? ow : half) * s.o;
    t.relu = args.relu;
    const TileFn fn = tile_fn<E>(rows, p.nv);
    const int64_t first = q % p.chunks * p.chunk, last = min64(p.panels, first + p.chunk);
    // Where rows lie one behind the other, the next tile's begin where this one's end; each panel asks
    // for a part of them.
    const bool streams = !p.copy && s.sw == 1 && s.kw == 1;
    const char* next = static_cast<const char*>(t.a0) + (streams ? rows * t.lda * sizeof(Operand) : 0);
    t.ahead_step = streams ? ceil_div(rows * E::KU * (int64_t)sizeof(Operand), last - first) : 0;
    for (int64_t j = first; j < last; ++j) {
      const int64_t o = j * p.nv * E::W, to = g * og + o;
      t.ahead = next + (j - first) * p.run * t.ahead_step;
      t.b = static_cast<const Operand*>(args.packed) + (g * p.panels + j) * p.panel;
      t.scale = args.scale ? args.scale + to : nullptr;
      t.shift = args.shift ? args.shift + to : nullptr;
      t.residual = args.residual ? static_cast<const T*>(args.residual) + to : nullptr;
      t.y = static_cast<T*>(args.y) + to;
      t.channels = og - o;
      fn(t);
    }
  }

  static constexpr ConvAlgorithm algorithm{NARROW ? "narrow" : "direct", can_run, packed_bytes, pack, scratch_bytes, run};
};
