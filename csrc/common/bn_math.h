// The arithmetic of BatchNorm, one definition for every backend. V is a vector or scalar type with
// `reg`, set1, add, sub, mul, fma(a, b, c) = a*b + c, relu that keeps NaN, where_passed(z, v) and
// finite_or_zero; E is a V with rounded(v), to what the elements in memory can hold.
// Included inside a namespace, after the target pragma: no #include here.

#ifdef __CUDACC__
#define RF_INLINE __host__ __device__ __forceinline__
#else
#define RF_INLINE static inline __attribute__((always_inline))
#endif
#define RF_MATH template <class V> RF_INLINE

// The normalised value: forward and the mask of backward must agree to the bit.
RF_MATH typename V::reg bn_affine(typename V::reg x, typename V::reg scale, typename V::reg shift) {
  return V::fma(x, scale, shift);
}

// The gradient behind the ReLU, z being its input or output.
RF_MATH typename V::reg relu_gradient(typename V::reg grad, typename V::reg z) {
  return V::where_passed(z, grad);
}

// One more term of sum(g * (x - mean)).
RF_MATH typename V::reg bn_add_product(typename V::reg sum, typename V::reg g, typename V::reg x,
                                       typename V::reg mean) {
  return V::fma(g, V::sub(x, mean), sum);
}

// grad_x = g*a + x*b + d.
RF_MATH typename V::reg bn_gradient(typename V::reg g, typename V::reg x, typename V::reg a,
                                    typename V::reg b, typename V::reg d) {
  return V::fma(g, a, V::fma(x, b, d));
}

// A shift for sums over values of which the mean of the first few is known. Rounded as they are, so
// that differences of 16-bit values are exact.
template <class E>
RF_INLINE typename E::reg bn_shift(typename E::reg sum, float by_count) {
  return E::finite_or_zero(E::rounded(E::mul(sum, E::set1(by_count))));
}

// One more value of sum(x - shift) and sum((x - shift)^2).
RF_MATH void bn_add_moments(typename V::reg x, typename V::reg shift, typename V::reg& sum,
                            typename V::reg& square) {
  const typename V::reg d = V::sub(x, shift);
  sum = V::add(sum, d);
  square = V::fma(d, d, square);
}

#undef RF_MATH
#undef RF_INLINE
