// 16 floats in one register, and the element types of the AVX-512 kernels.
// Included inside a namespace, after the target pragma: no #include here.

struct Vec {
  using reg = __m512;
  using mask = __mmask16;
  static constexpr int W = 16;

  static mask first(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (mask)((1u << n) - 1); }
  static reg zero() { return _mm512_setzero_ps(); }
  static reg set1(float v) { return _mm512_set1_ps(v); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static reg load(const float* p, mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, reg v, mask m) { _mm512_mask_storeu_ps(p, m, v); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
  static reg fnma(reg a, reg b, reg c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
  // The second operand is returned where either is NaN, so a NaN passes through both.
  static reg relu(reg v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
  static reg max_nan(reg a, reg b) {
    const reg m = _mm512_max_ps(a, b);
    return _mm512_mask_mov_ps(m, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
  }
  static bool any_nan(reg v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
  static float sum(reg v) { return _mm512_reduce_add_ps(v); }
};

struct F32 : Vec {
  using T = float;
  static constexpr int KU = 1;   // channels consumed by one step
  static constexpr int MR = 14;  // rows of the register tile
  static constexpr int NV = 2;   // registers across its columns
  static reg broadcast(const T* p) { return _mm512_set1_ps(*p); }
  static reg load_b(const T* p) { return _mm512_loadu_ps(p); }
  static reg dot(reg acc, reg a, reg b) { return _mm512_fmadd_ps(a, b, acc); }
};

static inline float to_float(float v) { return v; }

#ifdef RF_BF16
static inline float to_float(uint16_t v) {
  const uint32_t u = (uint32_t)v << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

struct Bf16 : Vec {
  using T = uint16_t;
  static constexpr int KU = 2;
  static constexpr int MR = 14;
  static constexpr int NV = 2;
  using Vec::load;
  using Vec::store;
  static reg broadcast(const T* p) {
    int v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(v));
  }
  static reg broadcast_tail(const T* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(*p)); }
  static reg load_b(const T* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  static reg dot(reg acc, reg a, reg b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  static reg widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static reg load(const T* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static reg load(const T* p, mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
  static void store(T* p, reg v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
  static void store(T* p, reg v, mask m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
  }
};
#endif
