// How a convolution on the tile registers of AMX is cut. The pixels of a tile are rows of memory one step
// apart, of x itself for a 1x1 of stride 1, else of a block of it that each thread copies, with zeros
// around it, to where it stays in its L2 cache.
//
// An image of a copied block is one sequence of pixels: tiles run over the ends of its rows, and what
// they compute there is not kept. With a stride, what the taps meet in turn is copied apart, so
// that the pixels of a tile are next to each other all the same.
//
// Channels that do not fill the steps of 32 are copied together: a pixel of the block is then an output
// column with all that a row of the kernel meets there, and zeros up to a whole step.

template <class E>
struct AmxBlocks {
  using T = typename E::T;
  using reg = typename E::reg;
  static constexpr int W = E::W, ROWS = 2 * Tiles::R;
  // Of a thread's L2 cache: what a block and the weights that meet it may take of it together.
  static constexpr int64_t kBlock = int64_t(640) << 10, kWeights = int64_t(640) << 10;
  static constexpr int64_t kUnits = 4;  // of each thread, at least, where there are as many panels
  static constexpr int64_t kLeastBlocks = 16;  // of what is not copied, at least

  // One direction of a block. The taps that lie a multiple of the stride apart, a phase, meet the same
  // lines of the input, each some steps further on.
  struct Axis {
    int64_t stride, dilation, period, phases;
    int64_t reach;  // lines that the last tap meets beyond the first one's

    Axis() = default;
    Axis(int64_t stride, int64_t kernel, int64_t dilation)
        : stride(stride),
          dilation(dilation),
          period(stride / std::gcd(stride, dilation)),
          phases(min64(kernel, period)),
          reach((kernel - 1) * dilation / stride) {}

    int64_t phase(int64_t tap) const { return tap % period; }
    int64_t shift(int64_t tap) const { return tap * dilation / stride; }
    int64_t first(int64_t phase) const { return phase * dilation % stride; }
  };

  struct Plan {
    ConvShape s;                 // a 1x1 convolution of stride 1 becomes one row of pixels
    bool copy, together;
    int64_t pixel;               // elements of one in the block
    int64_t taps, steps;
    int nv;                      // tiles of channels in a panel
    int64_t panels, panel;       // and elements of one
    int64_t chunk, chunks;       // panels whose weights stay in L2 together
    int64_t bh, bw, nbh, nbw;    // outputs of a block, blocks of an image
    int64_t images, blocks;      // images of a block that holds whole ones, else 1; blocks in all
    Axis down, across;
    int64_t xh, xw;              // rows and columns of a copy: [phase][phase][image][xh][xw][pixel]
    int64_t buffer;              // elements of a thread's
  };

  static bool in_steps(const ConvShape& s) { return s.c % Tiles::K == 0; }

  // Together are copied what lies side by side.
  static bool can_run(const ConvShape& s) {
    return s.groups == 1 && (in_steps(s) || s.kw == 1 || s.dw == 1);
  }

  static Plan plan(const ConvShape& shape, int threads) {
    Plan p{};
    p.s = shape;
    ConvShape& s = p.s;
    p.together = !in_steps(s);
    p.copy = p.together || s.kh > 1 || s.kw > 1 || s.sh > 1 || s.sw > 1 || s.ph || s.pw;
    if (!p.copy) {
      s.w *= s.n * s.h;
      s.n = s.h = 1;
    }
    p.pixel = p.together ? round_up(s.kw * s.c, Tiles::K) : s.c;
    p.taps = p.together ? s.kh : s.kh * s.kw;
    p.steps = p.pixel / Tiles::K;
    p.nv = s.o <= W ? 1 : 2;
    p.panels = ceil_div(s.o, p.nv * W);
    p.panel = p.taps * p.pixel * p.nv * W;
    const int64_t fit = max64(1, kWeights / (p.panel * (int64_t)sizeof(T)));
    p.chunks = ceil_div(p.panels, min64(fit, p.panels));
    p.down = Axis(s.sh, s.kh, s.dh);
    p.across = p.together ? Axis(1, 1, 1) : Axis(s.sw, s.kw, s.dw);
    size_blocks(p);
    p.nbh = ceil_div(s.oh(), p.bh);
    p.nbw = ceil_div(s.ow(), p.bw);
    p.blocks = ceil_div(s.n, p.images) * p.nbh * p.nbw;
    // Where blocks are few a thread takes some of the channels. Memory does not depend on the threads.
    p.chunks = min64(p.panels, max64(p.chunks, ceil_div(kUnits * threads, max64(1, p.blocks))));
    p.chunk = ceil_div(p.panels, p.chunks);
    p.chunks = ceil_div(p.panels, p.chunk);
    return p;
  }

  static void size_blocks(Plan& p) {
    const ConvShape& s = p.s;
    p.bh = s.oh();
    p.bw = s.ow();
    p.images = 1;
    const int64_t most = kBlock / (p.pixel * (int64_t)sizeof(T));
    if (!p.copy) {
      // Threads share the pixels: where each wrote some channels of all, 64 to 256 took 1.2 times as long.
      p.bw = max64(ROWS, min64(most / ROWS * ROWS, round_up(ceil_div(s.ow(), kLeastBlocks), ROWS)));
      p.buffer = ROWS * p.pixel;  // the last pixels
      return;
    }
    const auto pixels = [&] {
      p.xh = p.bh + p.down.reach;
      p.xw = p.bw + p.across.reach;
      return p.down.phases * p.across.phases * p.xh * p.xw;
    };
    while (p.bh > 1 && pixels() > most) p.bh = ceil_div(p.bh, 2);
    while (p.bw > ROWS && pixels() > most) p.bw = ceil_div(p.bw, 2);
    // Weights meet as many images as fit, but two threads have half of them each.
    if (p.bh == s.oh() && p.bw == s.ow()) p.images = max64(1, min64(most / pixels(), ceil_div(s.n, 2)));
    p.buffer = (p.images * pixels() + ROWS) * p.pixel;  // tiles read on to whole ones
  }

  static size_t packed_bytes(const ConvShape& s) {
    const Plan p = plan(s, 1);
    return p.panels * p.panel * sizeof(T);
  }

  // -> [panel][tap][step][NV * W][KU], zeros beyond the last channel and behind what is together.
  static void pack(const ConvShape& s, const Weight& weight, void* packed) {
    if (in_steps(s)) return Direct<E>::pack(s, weight, packed);
    const Plan p = plan(s, 1);
    const int64_t nr = p.nv * W;
    T* out = static_cast<T*>(packed);
    memset(out, 0, packed_bytes(s));
    for (int64_t o = 0; o < s.o; ++o)
      for (int64_t y = 0; y < s.kh; ++y)
        for (int64_t e = 0; e < s.kw * s.c; ++e) {
          const int64_t tap = y * s.kw + e / s.c;
          const int64_t from = o * weight.along_o + e % s.c * weight.along_c + tap * weight.along_tap;
          out[o / nr * p.panel + ((y * p.pixel + e) / E::KU * nr + o % nr) * E::KU + e % E::KU] =
              element<E>(weight, from);
        }
  }

  // A block: its first image and output, how many of them there are.
  struct Block {
    int64_t n, y, x, images, bh, bw;

    Block(const Plan& p, int64_t block) {
      const int64_t in_image = block % (p.nbh * p.nbw);
      n = block / (p.nbh * p.nbw) * p.images;
      y = in_image / p.nbw * p.bh;
      x = in_image % p.nbw * p.bw;
      images = min64(p.images, p.s.n - n);
      bh = min64(p.bh, p.s.oh() - y);
      bw = min64(p.bw, p.s.ow() - x);
    }
  };

  // Copies what lies under a block, zeros where there is nothing.
  static void copy_block(const Plan& p, const T* x, const Block& at, T* buffer) {
    const ConvShape& s = p.s;
    const int64_t row = p.xw * p.pixel;
    for (int64_t i = 0; i < p.down.phases * p.across.phases; ++i) {
      const int64_t top = at.y * s.sh - s.ph + p.down.first(i / p.across.phases);
      const int64_t left = at.x * s.sw - s.pw + p.across.first(i % p.across.phases);
      T* out = buffer + i * p.images * p.xh * row;
      for (int64_t n = at.n; n < at.n + at.images; ++n)
        for (int64_t r = 0; r < p.xh; ++r, out += row) {
          const int64_t iy = top + r * s.sh;
          const T* in = x + ((n * s.h + iy) * s.w + left) * s.c;
          if (iy < 0 || iy >= s.h)
            memset(out, 0, row * sizeof(T));
          else
            (p.together ? copy_together : copy_row)(p, in, left, out);
        }
    }
  }

  // A row of pixels from column `left` on, a stride apart.
  static void copy_row(const Plan& p, const T* in, int64_t left, T* out) {
    const ConvShape& s = p.s;
    const int64_t first = min64(p.xw, left < 0 ? ceil_div(-left, s.sw) : 0);
    const int64_t last = max64(first, min64(p.xw, ceil_div(s.w - left, s.sw)));
    memset(out, 0, first * s.c * sizeof(T));
    memset(out + last * s.c, 0, (p.xw - last) * s.c * sizeof(T));
    if (s.sw == 1) {
      memcpy(out + first * s.c, in + first * s.c, (last - first) * s.c * sizeof(T));
      return;
    }
    for (int64_t j = first; j < last; ++j) memcpy(out + j * s.c, in + j * s.sw * s.c, s.c * sizeof(T));
  }

  static void copy_together(const Plan& p, const T* in, int64_t left, T* out) {
    const ConvShape& s = p.s;
    for (int64_t j = 0; j < p.xw; ++j, in += s.sw * s.c, left += s.sw) {
      const int64_t first = max64(0, -left) * s.c, last = min64(s.kw, s.w - left) * s.c;
      for (int64_t e = 0; e < p.pixel; e += Tiles::K, out += Tiles::K)
        E::copy_between(in + e, first - e, last - e, out);
    }
  }

  // A tile of pixels: where they lie, and of those that are kept which they are and where they go.
  struct Pixels {
    const T *a0, *a1;
    int64_t count, row[ROWS], y[ROWS];
    int64_t block;
    bool first;  // of its block

    void keep(int64_t at, int64_t to) {
      row[count] = at;
      y[count++] = to;
    }
    bool both() const { return row[count - 1] >= Tiles::R; }
  };

  // f(pixels) for every tile of a block.
  template <class F>
  static void each_tile(const Plan& p, const ConvArgs& args, const Block& b, T* buffer, const F& f) {
    const ConvShape& s = p.s;
    const int64_t oh = s.oh(), ow = s.ow();
    Pixels t;
    if (!p.copy) {
      const T* x = static_cast<const T*>(args.x);
      for (int64_t q = 0; q < b.bw; q += ROWS) {
        t.count = 0;
        for (int64_t k = 0, all = min64(ROWS, b.bw - q); k < all; ++k) t.keep(k, (b.x + q + k) * s.o);
        t.a0 = x + (b.x + q) * s.c;
        if (b.x + q + ROWS > ow) t.a0 = static_cast<T*>(memcpy(buffer, t.a0, t.count * s.c * sizeof(T)));
        t.a1 = t.a0 + Tiles::R * s.c;
        t.first = q == 0;
        f(t);
      }
      return;
    }
    // Image by image: the rows between two of them hold nothing that is kept.
    const int64_t all = (b.bh - 1) * p.xw + b.bw;
    for (int64_t i = 0; i < b.images; ++i)
      for (int64_t q = 0; q < all; q += ROWS) {
        t.count = 0;
        int64_t r = q / p.xw, c = q % p.xw;
        for (int64_t k = 0; k < ROWS && r < b.bh; ++k) {
          if (c < b.bw) t.keep(k, (((b.n + i) * oh + b.y + r) * ow + b.x + c) * s.o);
          if (++c < p.xw) continue;
          c = 0;
          ++r;
        }
        if (!t.count) continue;
        t.a0 = buffer + (i * p.xh * p.xw + q) * p.pixel;
        t.a1 = t.a0 + Tiles::R * p.pixel;
        t.first = i == 0 && q == 0;
        f(t);
      }
  }
};
