// The register tile: MR rows (output pixels) by NV registers (output channels), summed over
// `taps` runs of `steps` contiguous input steps, then scale, shift, residual and ReLU.

struct TileArgs {
  const void* a0;          // first row
  const void* a1;          // row (MR + 1) / 2, anywhere: a tile may lie in two image rows
  int64_t lda;             // elements from one row to the next
  const void* b;           // packed weights: [tap][step][NV * W][KU]; a0, a1 and b are Operands
  const int64_t* tap;      // element offset of each tap
  int64_t taps, steps;
  const char* ahead;       // what the next tile reads: asked of the memory, so many bytes a step
  int64_t ahead_step;
  bool tail;               // each run ends with a step of KU - 1 elements, the last one not read
  const float* scale;      // at the tile's first channel, or null
  const float* shift;
  const void* residual;    // like y, or null
  void* y;                 // the tensor at the tile's first channel
  int64_t y0, y1, ldy;     // element offsets of rows 0 and (MR + 1) / 2
  int64_t channels;        // valid ones, at most NV * W
  bool relu;
};

// RAW: the sums are stored as they are, all NV * W of them.
template <class E, int M, int NV, bool RAW>
static void conv_tile(const TileArgs& g) {
  using T = typename E::T;
  using Operand = typename E::Operand;
  using reg = typename E::reg;
  constexpr int H = (M + 1) / 2;
  reg acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = E::zero();

  const Operand* b = static_cast<const Operand*>(g.b);
  const int64_t lda = g.lda;
  const char* ahead = g.ahead;
  // The lines of the result and of the residual come from memory while the sums are formed.
  if constexpr (!RAW) {
    constexpr int LINE = 64 / sizeof(T);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const int64_t at = i < H ? g.y0 + i * g.ldy : g.y1 + (i - H) * g.ldy;
#pragma GCC unroll 4
      for (int j = 0; j < NV * E::W; j += LINE) {
        __builtin_prefetch(static_cast<T*>(g.y) + at + j, 1);
        if (g.residual) __builtin_prefetch(static_cast<const T*>(g.residual) + at + j);
      }
    }
  }
  for (int64_t t = 0; t < g.taps; ++t) {
    const Operand* a0 = static_cast<const Operand*>(g.a0) + g.tap[t];
    const Operand* a1 = static_cast<const Operand*>(g.a1) + g.tap[t];
    const auto step = [&](auto tail) __attribute__((always_inline)) {
      reg bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) bv[j] = E::load_b(b + j * E::W * E::KU);
      // Far enough ahead for weights that come from memory: at batch 1 most do. Once a line of the cache:
      // what a core's other thread leaves of its loads is soon used up.
#pragma GCC unroll 4
      for (int j = 0; j < NV; j += 64 / (int)sizeof(reg))
        _mm_prefetch(reinterpret_cast<const char*>(b + j * E::W * E::KU) + 8192, _MM_HINT_T1);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Operand* p = i < H ? a0 + i * lda : a1 + (i - H) * lda;
        reg a;
        if constexpr (tail.value)
          a = E::broadcast_tail(p);
        else
          a = E::broadcast(p);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = E::dot(acc[i][j], a, bv[j]);
      }
      if constexpr (!RAW) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += g.ahead_step;
      }
      a0 += E::KU;
      a1 += E::KU;
      b += NV * E::W * E::KU;
    };
    for (int64_t k = g.steps; k > 0; --k) step(std::false_type{});
    if constexpr (E::KU == 2 && !RAW)
      if (g.tail) step(std::true_type{});
  }

  if constexpr (RAW) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j)
        E::store(static_cast<T*>(g.y) + (i < H ? g.y0 + i * g.ldy : g.y1 + (i - H) * g.ldy) + j * E::W,
                 acc[i][j]);
    return;
  }
  // The channels beyond the last are neither read nor written.
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int64_t left = g.channels - j * E::W;
    if (left <= 0) break;
    const auto m = E::first(left);
    const reg scale = g.scale ? Vec::load(g.scale + j * E::W, m) : E::set1(1.0f);
    const reg shift = g.shift ? Vec::load(g.shift + j * E::W, m) : E::zero();
    T* y = static_cast<T*>(g.y) + j * E::W;
    const T* r = static_cast<const T*>(g.residual) + j * E::W;
    const bool full = left >= E::W;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const int64_t at = i < H ? g.y0 + i * g.ldy : g.y1 + (i - H) * g.ldy;
      reg v = E::fma(acc[i][j], scale, shift);
      if (g.residual) v = E::add(v, full ? E::load(r + at) : E::load(r + at, m));
      if (g.relu) v = E::relu(v);
      if (full)
        E::store(y + at, v);
      else
        E::store(y + at, v, m);
    }
  }
}

using TileFn = void (*)(const TileArgs&);

template <class E, int NV, bool RAW, int... M>
static TileFn pick_tile(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr TileFn table[] = {conv_tile<E, M + 1, NV, RAW>...};
  return table[rows - 1];
}

template <class E>
static TileFn tile_fn(int64_t rows, int nv) {
  using Rows = std::make_integer_sequence<int, E::MR>;
  return nv == 1 ? pick_tile<E, 1, false>(rows, Rows{}) : pick_tile<E, E::NV, false>(rows, Rows{});
}

template <class E>
static TileFn raw_tile_fn(int64_t rows) {
  return pick_tile<E, E::NV, true>(rows, std::make_integer_sequence<int, E::MR>{});
}

// Channels of a weight's gradient, by AVX-512 past the caches where they fill lines of them: the optimizer
// reads it when all of the others are written.
template <class Out>
static void put_gradient(typename Out::T* p, Vec::reg v, int64_t lanes) {
  if constexpr (sizeof(typename Out::T) == sizeof(float))
    if (lanes == Vec::W && reinterpret_cast<uintptr_t>(p) % sizeof(v) == 0) return Vec::stream(p, v);
  Out::store(p, v, Vec::first(lanes));
}

// Elements [first, last) of so many rows -> [step][width][KU], as `conv_tile` and `sum_products` read
// them: those of KU rows side by side, zeros for a null row and beyond the last. There are rows to a
// whole step, and room for whole registers.
template <class E>
static void copy_steps(const typename E::T* const* rows, int64_t count, int64_t first, int64_t last,
                       int64_t width, typename E::Operand* out) {
  constexpr int W = E::W, KU = E::KU;
  for (int64_t i = 0; i < count; i += KU, out += width * KU)
    for (int64_t j = 0; j < width; j += W) {
      const int64_t left = last - first - j;
      const auto v = left >= W   ? E::step(rows + i, first + j)
                     : left > 0 ? E::step(rows + i, first + j, Vec::first(left))
                                : Vec::zero();
      Vec::store(reinterpret_cast<float*>(out + j * KU), v);
    }
}

// u[i][j] = [u[i][j] +] the sum over steps of a[step][i] b[step][j], for M by NV registers of them.
template <class E, int M>
static void sum_products(const typename E::Operand* a, int64_t lda, const typename E::Operand* b, int64_t ldb,
                         int64_t steps, float* u, int64_t ldu, bool add) {
  constexpr int NV = E::NV, KU = E::KU, W = E::W;
  typename E::reg acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec::zero();
  for (; steps > 0; --steps, a += lda, b += ldb) {
    typename E::reg bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = E::load_b(b + j * W * KU);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const auto av = E::broadcast(a + i * KU);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = E::dot(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = u + i * ldu + j * W;
      Vec::store(to, add ? Vec::add(Vec::load(to), acc[i][j]) : acc[i][j]);
    }
}

template <class E, int... M>
static auto pick_sum(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr decltype(&sum_products<E, 1>) table[] = {sum_products<E, M + 1>...};
  return table[rows - 1];
}

template <class E>
static auto sum_fn(int64_t rows) {
  return pick_sum<E>(rows, std::make_integer_sequence<int, E::MR>{});
}
