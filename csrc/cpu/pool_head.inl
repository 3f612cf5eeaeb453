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

template <class E, int CLASSES, int IMAGES>
static void head_tile(const HeadArgs& g, const float* mean, int64_t k, int64_t n) {
  using T = typename E::T;
  const T* weight = static_cast<const T*>(g.weight) + k * g.c;
  typename Vec::reg acc[CLASSES][IMAGES];
  for (auto& row : acc)
    for (auto& sum : row) sum = Vec::zero();
  for (int64_t c = 0; c < g.c; c += Vec::W) {
    const bool full = c + Vec::W <= g.c;
    const auto m = Vec::first(g.c - c);
    typename Vec::reg a[IMAGES];
#pragma GCC unroll 4
    for (int i = 0; i < IMAGES; ++i) {
      const float* p = mean + (n + i) * g.c + c;
      a[i] = full ? Vec::load(p) : Vec::load(p, m);
    }
#pragma GCC unroll 4
    for (int j = 0; j < CLASSES; ++j) {
      const T* p = weight + j * g.c + c;
      const auto w = full ? E::load(p) : E::load(p, m);
#pragma GCC unroll 4
      for (int i = 0; i < IMAGES; ++i) acc[j][i] = Vec::fma(w, a[i], acc[j][i]);
    }
  }
  for (int j = 0; j < CLASSES; ++j)
    for (int i = 0; i < IMAGES; ++i) {
      const float bias = g.bias ? to_float(static_cast<const T*>(g.bias)[k + j]) : 0.0f;
      E::store(static_cast<T*>(g.y) + (n + i) * g.classes + k + j,
               Vec::set1(Vec::sum(acc[j][i]) + bias), Vec::first(1));
    }
}

template <class E, int CLASSES>
static void head_rows(const HeadArgs& g, const float* mean, int64_t k) {
  int64_t n = 0;
  for (; n + 4 <= g.n; n += 4) head_tile<E, CLASSES, 4>(g, mean, k, n);
  for (; n < g.n; ++n) head_tile<E, CLASSES, 1>(g, mean, k, n);
}

// y = mean(x over its pixels) weight^T + bias.
template <class E>
static void head(const HeadArgs& g) {
  using T = typename E::T;
  const int64_t parts = ceil_div(g.c, 4 * Vec::W);
  float* mean = g.scratch;
#pragma omp parallel
  {
#pragma omp for
    for (int64_t q = 0; q < g.n * parts; ++q) {
      const int64_t n = q / parts, c1 = min64(g.c, (q % parts + 1) * 4 * Vec::W);
      for (int64_t c = q % parts * 4 * Vec::W; c < c1; c += Vec::W) {
        const auto m = Vec::first(g.c - c);
        const T* in = static_cast<const T*>(g.x) + n * g.hw * g.c + c;
        auto sum = Vec::zero();
        for (int64_t i = 0; i < g.hw; ++i) sum = Vec::add(sum, E::load(in + i * g.c, m));
        Vec::store(mean + n * g.c + c, Vec::mul(sum, Vec::set1(1.0f / (float)g.hw)), m);
      }
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
