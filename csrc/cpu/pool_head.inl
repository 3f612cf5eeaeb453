// What surrounds the convolutions of a ResNet: the max pool of the stem, and global average pool
// with the classifier.

// y = max over the window, NaN where the window holds one. Padding takes no part.
template <class E>
static void max_pool(const PoolArgs& g) {
  using T = typename E::T;
  const int64_t oh = (g.h + 2 * g.p - g.k) / g.s + 1, ow = (g.w + 2 * g.p - g.k) / g.s + 1;
#pragma omp parallel for
  for (int64_t row = 0; row < g.n * oh; ++row) {
    const int64_t y0 = row % oh * g.s - g.p, top = max64(0, y0), bottom = min64(g.h, y0 + g.k);
    const T* x = static_cast<const T*>(g.x) + row / oh * g.h * g.w * g.c;
    T* y = static_cast<T*>(g.y) + row * ow * g.c;
    for (int64_t ox = 0; ox < ow; ++ox, y += g.c) {
      const int64_t x0 = ox * g.s - g.p, left = max64(0, x0), right = min64(g.w, x0 + g.k);
      for (int64_t c = 0; c < g.c; c += E::W) {
        const auto m = E::first(g.c - c);
        const bool full = c + E::W <= g.c;
        auto best = Vec::set1(-__builtin_inff());
        for (int64_t iy = top; iy < bottom; ++iy)
          for (int64_t ix = left; ix < right; ++ix) {
            const T* in = x + (iy * g.w + ix) * g.c + c;
            best = Vec::max_nan(full ? E::load(in) : E::load(in, m), best);
          }
        if (full)
          E::store(y + c, best);
        else
          E::store(y + c, best, m);
      }
    }
  }
}

// W steps at p, or the first count elements of them, then zeros.
template <class E, bool FULL>
static inline typename Vec::reg load_first(const typename E::T* p, int64_t count) {
#ifdef RF_BF16
  if constexpr (FULL) return E::load_b(p);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p));
#else
  return FULL ? E::load(p) : E::load(p, Vec::first(count));
#endif
}

template <class E, int CLASSES, int IMAGES>
static void head_tile(const HeadArgs& g, const typename E::T* mean, int64_t k, int64_t n) {
  using T = typename E::T;
  constexpr int STEP = Vec::W * E::KU;
  const T* weight = static_cast<const T*>(g.weight) + k * g.c;
  typename Vec::reg acc[CLASSES][IMAGES];
  for (auto& row : acc)
    for (auto& sum : row) sum = Vec::zero();
  int64_t c = 0;
  // Two loops: with a branch within one, the sums would not stay in registers.
  const auto step = [&](auto full) __attribute__((always_inline)) {
    typename Vec::reg a[IMAGES];
#pragma GCC unroll 4
    for (int i = 0; i < IMAGES; ++i)
      a[i] = load_first<E, full.value>(mean + (n + i) * g.c + c, g.c - c);
#pragma GCC unroll 4
    for (int j = 0; j < CLASSES; ++j) {
      const auto w = load_first<E, full.value>(weight + j * g.c + c, g.c - c);
#pragma GCC unroll 4
      for (int i = 0; i < IMAGES; ++i) acc[j][i] = E::dot(acc[j][i], w, a[i]);
    }
  };
  for (; c + STEP <= g.c; c += STEP) step(std::true_type());
  if (c < g.c) step(std::false_type());
  // Rounded together: a masked store to each would take longer than its sum over few channels.
  constexpr int PLACES = (CLASSES * IMAGES + Vec::W - 1) / Vec::W * Vec::W;
  float sums[PLACES] = {};
  T rounded[PLACES];
  for (int j = 0; j < CLASSES; ++j) {
    const float bias = g.bias ? E::widen_one(static_cast<const T*>(g.bias)[k + j]) : 0.0f;
    for (int i = 0; i < IMAGES; ++i) sums[j * IMAGES + i] = Vec::sum(acc[j][i]) + bias;
  }
  for (int v = 0; v < PLACES; v += Vec::W) E::store(rounded + v, Vec::load(sums + v));
  T* y = static_cast<T*>(g.y) + n * g.classes + k;
  for (int i = 0; i < IMAGES; ++i)
    for (int j = 0; j < CLASSES; ++j) y[i * g.classes + j] = rounded[j * IMAGES + i];
}

template <class E, int CLASSES>
static void head_rows(const HeadArgs& g, const typename E::T* mean, int64_t k) {
  int64_t n = 0;
  for (; n + 4 <= g.n; n += 4) head_tile<E, CLASSES, 4>(g, mean, k, n);
  for (; n < g.n; ++n) head_tile<E, CLASSES, 1>(g, mean, k, n);
}

// Vectors of channels that are summed together: whole lines of the cache, a few to each pixel, as
// the same few of the next pixel often lie where they push each other out of it.
constexpr int kHeadVectors = 8;

// The means of one image's channels from c on; count of them at most kHeadVectors vectors.
template <class E>
static void head_mean(const HeadArgs& g, const typename E::T* x, typename E::T* mean,
                      int64_t count) {
  typename Vec::reg sum[kHeadVectors];
  for (auto& s : sum) s = Vec::zero();
  const auto scale = Vec::set1(1.0f / (float)g.hw);
  if (count == kHeadVectors * Vec::W) {
    for (int64_t i = 0; i < g.hw; ++i, x += g.c) {
#pragma GCC unroll 8
      for (int j = 0; j < kHeadVectors; ++j)
        sum[j] = Vec::add(sum[j], E::load(x + j * Vec::W));
    }
#pragma GCC unroll 8
    for (int j = 0; j < kHeadVectors; ++j) E::store(mean + j * Vec::W, Vec::mul(sum[j], scale));
    return;
  }
  for (int64_t c = 0; c < count; c += Vec::W) {
    const auto m = Vec::first(count - c);
    for (int64_t i = 0; i < g.hw; ++i) sum[0] = Vec::add(sum[0], E::load(x + i * g.c + c, m));
    E::store(mean + c, Vec::mul(sum[0], scale), m);
    sum[0] = Vec::zero();
  }
}

// y = mean(x over its pixels) weight^T + bias. In 16 bits the mean is rounded to them, as in torch.
template <class E>
static void head(const HeadArgs& g) {
  using T = typename E::T;
  constexpr int64_t LONG = kHeadVectors * Vec::W;
  const int64_t parts = ceil_div(g.c, LONG);
  T* mean = reinterpret_cast<T*>(g.scratch);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t q = 0; q < g.n * parts; ++q) {
      const int64_t n = q / parts, c = q % parts * LONG;
      head_mean<E>(g, static_cast<const T*>(g.x) + n * g.hw * g.c + c, mean + n * g.c + c,
                   min64(LONG, g.c - c));
    }
#pragma omp for
    for (int64_t k = 0; k < ceil_div(g.classes, 4); ++k) {
      if (4 * k + 4 <= g.classes)
        head_rows<E, 4>(g, mean, 4 * k);
      else
        for (int64_t j = 4 * k; j < g.classes; ++j) head_rows<E, 1>(g, mean, j);
    }
  }
}
