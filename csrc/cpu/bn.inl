// BatchNorm in training: statistics, apply with residual and ReLU, and the two passes of backward.

// Sums run in float32 over this many rows, then in double.
constexpr int64_t kBlock = 256;
// Those of gradients in float32 over no more than so many. Behind an average pool a gradient is the same
// at every pixel, and then each addition rounds the same way; in bfloat16 such a sum is exact.
template <class T>
constexpr int64_t kGradientBlock = sizeof(T) == 4 ? 40 : kBlock;

// The arguments by value here and below: through a reference, every store might change them.
template <class E, Shortcut S, bool RELU, bool BITS>
static void bn_act_rows(const BnActArgs g, int64_t first, int64_t last) {
  using T = typename E::T;
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(g.x) + row * g.c;
    const T* r = static_cast<const T*>(g.residual) + row * g.c;
    T* y = static_cast<T*>(g.y) + row * g.c;
    uint8_t* bits = BITS ? g.bits + row * g.c / kBits : nullptr;
    each_vector(g.c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const auto vector = [&](const float* p) { return get<F32>(p + j, lanes); };
      auto z = bn_affine<Vec>(get<E>(x + j, lanes), vector(g.scale), vector(g.shift));
      if constexpr (S == Shortcut::plain) z = Vec::add(z, get<E>(r + j, lanes));
      if constexpr (S == Shortcut::affine)
        z = Vec::add(z, bn_affine<Vec>(get<E>(r + j, lanes), vector(g.residual_scale),
                                       vector(g.residual_shift)));
      put<E>(y + j, RELU ? Vec::relu(z) : z, lanes);
      if constexpr (BITS) put_bits(bits + j / kBits, Vec::passed(E::rounded(z)), lanes);
    });
  }
}

template <class E, Shortcut S>
static void bn_act_of(const BnActArgs& g) {
  share_rows(g.rows, g.c, [&](int64_t first, int64_t last) {
    if constexpr (S != Shortcut::none && sizeof(typename E::T) == 2)
      if (g.bits) return bn_act_rows<E, S, true, true>(g, first, last);
    g.relu ? bn_act_rows<E, S, true, false>(g, first, last)
           : bn_act_rows<E, S, false, false>(g, first, last);
  });
}

// y = act(x*scale + shift + r), r = 0, residual, or residual*residual_scale + residual_shift.
template <class E>
static void bn_act(const BnActArgs& g) {
  if (!g.residual) return bn_act_of<E, Shortcut::none>(g);
  g.residual_scale ? bn_act_of<E, Shortcut::affine>(g) : bn_act_of<E, Shortcut::plain>(g);
}

// y = relu(x + residual).
template <class E>
static void add_relu(const AddReluArgs& g) {
  using T = typename E::T;
  // Rows that begin at a cache line in all three where the tensors do.
  constexpr int64_t width = 1024;
  share_rows(ceil_div(g.n, width), width, [&](int64_t first, int64_t last) {
    const int64_t at = first * width;
    const T* x = static_cast<const T*>(g.x) + at;
    const T* r = static_cast<const T*>(g.residual) + at;
    T* y = static_cast<T*>(g.y) + at;
    each_vector(min64(g.n, last * width) - at, [&](int64_t j, auto lanes)
                    __attribute__((always_inline)) {
      put<E>(y + j, Vec::relu(Vec::add(get<E>(x + j, lanes), get<E>(r + j, lanes))), lanes);
    });
  });
}

// Whether a reduction that reads so many maps goes over several rows at once, which touches the sums
// less often, or row by row, which reads memory in order. Measured on two Zen 4 cores: at once is
// up to 1.6 times faster on short rows and in cache, up to 1.7 times slower on long rows from memory.
static inline bool several_rows(int64_t rows, int64_t row_bytes, int maps) {
  return row_bytes <= 256 || rows * row_bytes * maps <= 8 << 20;
}

// sum += x - s and square += (x - s)^2 over R rows.
template <class E, int R>
static inline void add_moments(const typename E::T* x, int64_t c, float* work) {
  each_vector(c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const auto s = get<F32>(work + j, lanes);
    const auto sum = get<F32>(work + c + j, lanes), square = get<F32>(work + 2 * c + j, lanes);
    // The rows among themselves first: fewer roundings at the size of the whole sum.
    auto sum_r = Vec::zero(), square_r = Vec::zero();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if (begins_line<typename E::T>(j)) fetch(x + r * c + j);
      bn_add_moments<Vec>(get<E>(x + r * c + j, lanes), s, sum_r, square_r);
    }
    put<F32>(work + c + j, Vec::add(sum, sum_r), lanes);
    put<F32>(work + 2 * c + j, Vec::add(square, square_r), lanes);
  });
}

// Sum and squared deviations of a part. Each block of rows is shifted by the mean of its first few:
// being a mean of k of the block's n values it is within sqrt(n/k) standard deviations of the
// block's own mean, whatever the data, so the variance's relative error is at most 1 + n/k = 33
// times that of a sum.
template <class E>
static void part_moments(const typename E::T* x, int64_t rows, int64_t c, bool several,
                         double* sums, double* m2s, float* work) {
  for (int64_t j = 0; j < c; ++j) sums[j] = m2s[j] = 0;
  for (int64_t row = 0; row < rows; row += kBlock) {
    const int64_t n = min64(kBlock, rows - row), few = min64(n, 8);
    const typename E::T* at = x + row * c;
    each_vector(c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      auto s = Vec::zero();
      for (int64_t r = 0; r < few; ++r) s = Vec::add(s, get<E>(at + r * c + j, lanes));
      put<F32>(work + j, bn_shift<E>(s, 1.0f / (float)few), lanes);
      put<F32>(work + c + j, Vec::zero(), lanes);
      put<F32>(work + 2 * c + j, Vec::zero(), lanes);
    });
    int64_t r = 0;
    for (; several && r + 4 <= n; r += 4) add_moments<E, 4>(at + r * c, c, work);
    for (; r < n; ++r) add_moments<E, 1>(at + r * c, c, work);
    const MomentsMerge merge((double)row, (double)n);
    for (int64_t j = 0; j < c; ++j) {
      double sum, m2;
      unshifted((double)n, merge.by_n, work[j], work[c + j], work[2 * c + j], sum, m2);
      merge.add(sums[j], m2s[j], sum, m2);
    }
  }
}

// Per-channel mean and biased variance in one pass over x.
template <class E>
static void bn_stats(const BnStatsArgs& g) {
  const int64_t c = g.c, parts = reduction_parts(g.rows, c);
  const bool several = several_rows(g.rows, c * sizeof(typename E::T), 1);
  double* sums = reinterpret_cast<double*>(g.scratch);
  double* m2s = sums + parts * c;
  float* work = reinterpret_cast<float*>(m2s + parts * c);
#pragma omp parallel if (g.rows * c > kSerial)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t first = part_begin(g.rows, parts, p), last = part_begin(g.rows, parts, p + 1);
      part_moments<E>(static_cast<const typename E::T*>(g.x) + first * c, last - first, c,
                      several, sums + p * c, m2s + p * c, work + p * 3 * c);
    }
#pragma omp for schedule(static)
    for (int64_t j0 = 0; j0 < c; j0 += 64) {
      const int64_t j1 = min64(c, j0 + 64);
      for (int64_t p = 1; p < parts; ++p) {
        const int64_t n0 = part_begin(g.rows, parts, p), n = part_begin(g.rows, parts, p + 1) - n0;
        const MomentsMerge merge((double)n0, (double)n);
        for (int64_t j = j0; j < j1; ++j)
          merge.add(sums[j], m2s[j], sums[p * c + j], m2s[p * c + j]);
      }
      for (int64_t j = j0; j < j1; ++j) {
        g.mean[j] = (float)(sums[j] / (double)g.rows);
        g.var[j] = (float)(m2s[j] / (double)g.rows);
      }
    }
  }
}

// The vectors between the passes.
static void bn_scale_shift(const BnScaleShiftArgs& args) {
  const BnScaleShiftArgs g = args;
  for (int64_t i = 0; i < g.c; ++i) rf::bn_scale_shift(g, i);
}

static void bn_gradient_vectors(const BnGradientVectorsArgs& args) {
  const BnGradientVectorsArgs g = args;
  for (int64_t i = 0; i < g.c; ++i) rf::bn_gradient_vectors(g, i, g.sum_g[i], g.sum_gx[i]);
}

// The gradient behind the ReLU at element i, channel j.
template <class E, Mask M, class L>
static inline typename Vec::reg masked_gradient(const BnGradient& g, typename Vec::reg x, int64_t i,
                                                int64_t j, L lanes) {
  using T = typename E::T;
  const auto grad = get<E>(static_cast<const T*>(g.grad) + i, lanes);
  if constexpr (M == Mask::from_y)
    return relu_gradient<Vec>(grad, get<E>(static_cast<const T*>(g.y) + i, lanes));
  if constexpr (M == Mask::from_bits)
    return Vec::where_bits(get_bits(g.bits + i / kBits, lanes), grad);
  if constexpr (M == Mask::recomputed)
    return relu_gradient<Vec>(
        grad, bn_affine<Vec>(x, get<F32>(g.scale + j, lanes), get<F32>(g.shift + j, lanes)));
  return grad;
}

template <class E, Mask M, bool DUAL, bool STORE, int R>
static inline void add_products(const BnReduceArgs g, int64_t row, float* work) {
  using T = typename E::T;
  const int64_t c = g.c;
  each_vector(c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
    const auto mean = get<F32>(g.mean + j, lanes);
    // The gradients among themselves first: fewer roundings at the size of the whole sum.
    auto sum = Vec::zero(), product = get<F32>(work + c + j, lanes);
    auto mean2 = mean, product2 = product;
    if constexpr (DUAL) {
      mean2 = get<F32>(g.mean2 + j, lanes);
      product2 = get<F32>(work + 2 * c + j, lanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int64_t i = (row + r) * c + j;
      if (begins_line<T>(j)) {
        fetch(static_cast<const T*>(g.grad) + i);
        fetch(static_cast<const T*>(g.x) + i);
        if constexpr (M == Mask::from_y) fetch(static_cast<const T*>(g.y) + i);
        if constexpr (DUAL) fetch(static_cast<const T*>(g.x2) + i);
        if constexpr (STORE) fetch_to_write(static_cast<const T*>(g.masked) + i);
      }
      const auto x = get<E>(static_cast<const T*>(g.x) + i, lanes);
      const auto v = masked_gradient<E, M>(g, x, i, j, lanes);
      sum = r == 0 ? v : Vec::add(sum, v);
      product = bn_add_product<Vec>(product, v, x, mean);
      if constexpr (DUAL)
        product2 =
            bn_add_product<Vec>(product2, v, get<E>(static_cast<const T*>(g.x2) + i, lanes), mean2);
      if constexpr (STORE) put<E>(static_cast<T*>(g.masked) + i, v, lanes);
    }
    put<F32>(work + j, Vec::add(get<F32>(work + j, lanes), sum), lanes);
    put<F32>(work + c + j, product, lanes);
    if constexpr (DUAL) put<F32>(work + 2 * c + j, product2, lanes);
  });
}

template <class E, Mask M, bool DUAL, bool STORE>
static void reduce(const BnReduceArgs& args) {
  const BnReduceArgs g = args;
  constexpr int sums = DUAL ? 3 : 2;
  const int64_t c = g.c, width = sums * c, parts = reduction_parts(g.rows, c);
  const bool several =
      several_rows(g.rows, c * sizeof(typename E::T), 2 + DUAL + (M == Mask::from_y));
  double* totals = reinterpret_cast<double*>(g.scratch);
  float* works = reinterpret_cast<float*>(totals + parts * width);
#pragma omp parallel if (g.rows * c > kSerial)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < parts; ++p) {
      double* total = totals + p * width;
      float* work = works + p * width;
      for (int64_t j = 0; j < width; ++j) total[j] = 0;
      const int64_t first = part_begin(g.rows, parts, p), n = part_begin(g.rows, parts, p + 1) - first;
      const int64_t blocks = ceil_div(n, kGradientBlock<typename E::T>);
      for (int64_t b = 0; b < blocks; ++b) {
        int64_t row = first + part_begin(n, blocks, b);
        const int64_t end = first + part_begin(n, blocks, b + 1);
        for (int64_t j = 0; j < width; ++j) work[j] = 0;
        for (; several && row + 2 <= end; row += 2)
          add_products<E, M, DUAL, STORE, 2>(g, row, work);
        for (; row < end; ++row) add_products<E, M, DUAL, STORE, 1>(g, row, work);
        for (int64_t j = 0; j < width; ++j) total[j] += work[j];
      }
    }
#pragma omp for schedule(static)
    for (int64_t j0 = 0; j0 < width; j0 += 64) {
      const int64_t j1 = min64(width, j0 + 64);
      for (int64_t p = 1; p < parts; ++p)
        for (int64_t j = j0; j < j1; ++j) totals[j] += totals[p * width + j];
      float* const out[] = {g.sum_g, g.sum_gx, g.sum_gx2};
      for (int64_t j = j0; j < j1; ++j) out[j / c][j % c] = (float)totals[j];
    }
  }
}

template <class E, Mask M, bool DUAL>
static void reduce_and_store(const BnReduceArgs& g) {
  if constexpr (M != Mask::none)
    if (g.masked) return reduce<E, M, DUAL, true>(g);
  reduce<E, M, DUAL, false>(g);
}

// With g the gradient behind the ReLU: sum(g) and sum(g * (x - mean)), for x2 too where given;
// g itself goes to `masked` where given.
template <class E>
static void bn_act_backward_reduce(const BnReduceArgs& g) {
  if constexpr (sizeof(typename E::T) == 2)
    if (g.relu && g.bits)
      return g.x2 ? reduce_and_store<E, Mask::from_bits, true>(g)
                  : reduce_and_store<E, Mask::from_bits, false>(g);
  if (g.relu && !g.y) return reduce_and_store<E, Mask::recomputed, false>(g);
  if (g.relu)
    return g.x2 ? reduce_and_store<E, Mask::from_y, true>(g)
                : reduce_and_store<E, Mask::from_y, false>(g);
  g.x2 ? reduce_and_store<E, Mask::none, true>(g) : reduce_and_store<E, Mask::none, false>(g);
}

template <class E, Mask M, bool DUAL, bool STORE>
static void apply_rows(const BnApplyArgs g, int64_t first, int64_t last) {
  using T = typename E::T;
  for (int64_t row = first; row < last; ++row)
    each_vector(g.c, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
      const auto vector = [&](const float* p) { return get<F32>(p + j, lanes); };
      const int64_t i = row * g.c + j;
      const auto x = get<E>(static_cast<const T*>(g.x) + i, lanes);
      const auto v = masked_gradient<E, M>(g, x, i, j, lanes);
      const auto grad_x = bn_gradient<Vec>(v, x, vector(g.a), vector(g.b), vector(g.d));
      if constexpr (DUAL) {
        const auto x2 = get<E>(static_cast<const T*>(g.x2) + i, lanes);
        put<E>(static_cast<T*>(g.grad_x2) + i,
               bn_gradient<Vec>(v, x2, vector(g.a2), vector(g.b2), vector(g.d2)), lanes);
      }
      put<E>(static_cast<T*>(g.grad_x) + i, grad_x, lanes);
      if constexpr (STORE)
        put<E>(static_cast<T*>(g.activation) + i,
               Vec::relu(bn_affine<Vec>(x, vector(g.scale), vector(g.shift))), lanes);
    });
}

template <class E, Mask M>
static void apply(const BnApplyArgs& g) {
  share_rows(g.rows, g.c, [&](int64_t first, int64_t last) {
    if constexpr (M == Mask::recomputed) {
      if (g.activation) return apply_rows<E, M, false, true>(g, first, last);
    } else if (g.x2) {
      return apply_rows<E, M, true, false>(g, first, last);
    }
    apply_rows<E, M, false, false>(g, first, last);
  });
}

// grad_x = g*a + x*b + d with g the gradient behind the ReLU; grad_x2 from x2 likewise. What the ReLU
// gave goes to `activation` where given.
template <class E>
static void bn_act_backward_apply(const BnApplyArgs& g) {
  if (!g.relu) return apply<E, Mask::none>(g);
  if constexpr (sizeof(typename E::T) == 2)
    if (g.bits) return apply<E, Mask::from_bits>(g);
  g.y ? apply<E, Mask::from_y>(g) : apply<E, Mask::recomputed>(g);
}
