// 8 floats in one register, and the element type of the AVX2 kernels.
// Included inside a namespace, after the target pragma: no #include here.

struct Vec {
  using reg = __m256;
  using mask = __m256i;
  static constexpr int W = 8;

  static mask first(int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n > W ? W : n < 0 ? 0 : n)), lanes);
  }
  static reg zero() { return _mm256_setzero_ps(); }
  static reg set1(float v) { return _mm256_set1_ps(v); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static reg load(const float* p, mask m) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static void store(float* p, reg v, mask m) { _mm256_maskstore_ps(p, m, v); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }    // a*b + c
  static reg fnma(reg a, reg b, reg c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a*b
  // The second operand is returned where either is NaN, so a NaN passes through both.
  static reg relu(reg v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
  static reg max_nan(reg a, reg b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  static bool any_nan(reg v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
  static float sum(reg v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

struct F32 : Vec {
  using T = float;
  static constexpr int KU = 1;  // channels consumed by one step
  static constexpr int MR = 6;  // rows of the register tile
  static constexpr int NV = 2;  // registers across its columns
  static reg broadcast(const T* p) { return _mm256_broadcast_ss(p); }
  static reg load_b(const T* p) { return _mm256_loadu_ps(p); }
  static reg dot(reg acc, reg a, reg b) { return _mm256_fmadd_ps(a, b, acc); }
};

static inline float to_float(float v) { return v; }
