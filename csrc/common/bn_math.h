// The arithmetic of BatchNorm, one definition for every backend. V is a vector or scalar type with
// `reg`, add, sub, mul, fma(a, b, c) = a*b + c, relu that keeps NaN, and where_passed(z, v).
// Included inside a namespace, after the target pragma: no #include here.

#ifdef __CUDACC__
#define RF_MATH template <class V> __host__ __device__ __forceinline__
#else
#define RF_MATH template <class V> static inline __attribute__((always_inline))
#endif

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

#undef RF_MATH
