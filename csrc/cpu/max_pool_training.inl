// The max pool of the stem in training: which element of each window was taken, and backward.

// y = max over the window of act(x*scale + shift); index = its place in the window, row by row from
// 0; taken, where wanted, = the x it was made of. As torch: the first of equals, the last NaN. Values are normalised
// as they are read, each up to four times, and rounded: a map in between would be written and read
// again.
template <class E, bool RELU>
static void pool_index(const PoolIndexArgs& g) {
  using T = typename E::T;
  const int64_t oh = (g.h + 2 * g.p - g.k) / g.s + 1, ow = (g.w + 2 * g.p - g.k) / g.s + 1;
#pragma omp parallel for
  for (int64_t row = 0; row < g.n * oh; ++row) {
    const int64_t y0 = row % oh * g.s - g.p, top = max64(0, y0), bottom = min64(g.h, y0 + g.k);
    const T* x = static_cast<const T*>(g.x) + row / oh * g.h * g.w * g.c;
    for (int64_t ox = 0; ox < ow; ++ox) {
      const int64_t x0 = ox * g.s - g.p, left = max64(0, x0), right = min64(g.w, x0 + g.k);
      const auto place = [&](int64_t iy, int64_t ix) {
        return Vec::set1((float)((iy - y0) * g.k + ix - x0));
      };
      T* y = static_cast<T*>(g.y) + (row * ow + ox) * g.c;
      T* taken = g.taken ? static_cast<T*>(g.taken) + (row * ow + ox) * g.c : nullptr;
      uint8_t* index = g.index + (row * ow + ox) * g.c;
      each_vector(g.c, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        const auto at = [&](int64_t iy, int64_t ix) { return get<E>(x + (iy * g.w + ix) * g.c + c, lanes); };
        const auto scale = get<F32>(g.scale + c, lanes), shift = get<F32>(g.shift + c, lanes);
        auto best = Vec::set1(-__builtin_inff()), best_at = place(top, left), best_x = at(top, left);
        for (int64_t iy = top; iy < bottom; ++iy)
          for (int64_t ix = left; ix < right; ++ix) {
            const auto from = at(iy, ix);
            auto value = bn_affine<Vec>(from, scale, shift);
            if constexpr (RELU) value = Vec::relu(value);
            Vec::take_max(E::rounded(value), place(iy, ix), from, best, best_at, best_x);
          }
        put<E>(y + c, best, lanes);
        if (taken) put<E>(taken + c, best_x, lanes);
        put_bytes(index + c, best_at, lanes);
      });
    }
  }
}

template <class E>
static void max_pool_index(const PoolIndexArgs& g) {
  g.relu ? pool_index<E, true>(g) : pool_index<E, false>(g);
}

// grad_x = the sum of the gradients of those windows that took the element: each element gathers
// its own, in one order.
template <class E>
static void max_pool_backward(const PoolBackwardArgs& g) {
  using T = typename E::T;
  const int64_t oh = (g.h + 2 * g.p - g.k) / g.s + 1, ow = (g.w + 2 * g.p - g.k) / g.s + 1;
  // The windows over a padded coordinate, of `most` in the row.
  const auto first = [&](int64_t at) { return at < g.k ? 0 : (at - g.k) / g.s + 1; };
  const auto last = [&](int64_t at, int64_t most) { return min64(most, at / g.s + 1); };
#pragma omp parallel for
  for (int64_t row = 0; row < g.n * g.h; ++row) {
    const int64_t y0 = row % g.h + g.p, image = row / g.h * oh * ow * g.c;
    const int64_t oy0 = first(y0), oy1 = last(y0, oh);
    const T* grad = static_cast<const T*>(g.grad) + image;
    const uint8_t* index = g.index + image;
    for (int64_t ix = 0; ix < g.w; ++ix) {
      // Out of the loop over channels: divisions take as long as the rest of it.
      const int64_t x0 = ix + g.p, ox0 = first(x0), ox1 = last(x0, ow);
      T* grad_x = static_cast<T*>(g.grad_x) + (row * g.w + ix) * g.c;
      each_vector(g.c, [&](int64_t c, auto lanes) __attribute__((always_inline)) {
        auto sum = Vec::zero();
        for (int64_t oy = oy0; oy < oy1; ++oy)
          for (int64_t ox = ox0; ox < ox1; ++ox) {
            const int64_t at = (oy * ow + ox) * g.c + c;
            const int place = (int)((y0 - oy * g.s) * g.k + x0 - ox * g.s);
            sum = Vec::add(sum, where_byte(index + at, place, get<E>(grad + at, lanes), lanes));
          }
        put<E>(grad_x + c, sum, lanes);
      });
    }
  }
}
