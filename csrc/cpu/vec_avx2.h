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
  static void stream(float* p, reg v) { store(p, v); }  // half a line would be slower past the caches
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
  static __m256d pd(reg v) { return _mm256_castps_pd(v); }
  static reg ps(__m256d v) { return _mm256_castpd_ps(v); }
  // W rows of W lanes become its columns: pairs, then fours within 128 bits, then the 128 bits.
  static void transpose(reg (&r)[W]) {
    reg t[W];
    for (int i = 0; i < W; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < W; i += 4)
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = ps(_mm256_unpacklo_pd(pd(t[i + k]), pd(t[i + k + 2])));
        r[i + 2 * k + 1] = ps(_mm256_unpackhi_pd(pd(t[i + k]), pd(t[i + k + 2])));
      }
    for (int k = 0; k < 4; ++k) {
      const reg low = _mm256_permute2f128_ps(r[k], r[4 + k], 0x20);
      r[4 + k] = _mm256_permute2f128_ps(r[k], r[4 + k], 0x31);
      r[k] = low;
    }
  }
  static int count(mask m) { return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
  // v where z is above zero or NaN, else zero: the gradient of relu(z).
  static reg where_passed(reg z, reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ), v);
  }
  // The lanes where that is so, as bits; v in the lanes of which the bits are set.
  static uint32_t passed(reg z) {
    return _mm256_movemask_ps(_mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_NLE_UQ));
  }
  static reg where_bits(uint32_t bits, reg v) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)), v);
  }
  static reg finite_or_zero(reg v) {
    return _mm256_and_ps(_mm256_cmp_ps(_mm256_sub_ps(v, v), _mm256_setzero_ps(), _CMP_EQ_OQ), v);
  }
  // A larger value or a NaN replaces the best and where it was.
  static void take_max(reg v, reg at, reg from, reg& best, reg& best_at, reg& best_from) {
    const reg m = _mm256_or_ps(_mm256_cmp_ps(v, best, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    best = _mm256_blendv_ps(best, v, m);
    best_at = _mm256_blendv_ps(best_at, at, m);
    best_from = _mm256_blendv_ps(best_from, from, m);
  }
  // Whole numbers from 0 to 255, one byte each.
  static __m128i to_bytes(reg v) {
    const __m256i n = _mm256_cvtps_epi32(v);
    const __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
    return _mm_packus_epi16(h, h);
  }
  static void store_bytes(uint8_t* p, reg v) { _mm_storel_epi64((__m128i*)p, to_bytes(v)); }
  static void store_bytes(uint8_t* p, reg v, mask m) {
    const __m128i bytes = to_bytes(v);
    __builtin_memcpy(p, &bytes, count(m));
  }
  // v where the byte is n, else zero.
  static reg where_byte(__m128i bytes, int n, reg v) {
    const __m128i same = _mm_cmpeq_epi8(bytes, _mm_set1_epi8((char)n));
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cvtepi8_epi32(same)), v);
  }
  static reg where_byte(const uint8_t* p, int n, reg v) {
    return where_byte(_mm_loadl_epi64((const __m128i*)p), n, v);
  }
  static reg where_byte(const uint8_t* p, int n, reg v, mask m) {
    __m128i bytes = _mm_setzero_si128();
    __builtin_memcpy(&bytes, p, count(m));
    return where_byte(bytes, n, v);
  }
};

struct F32 : Vec {
  using T = float;
  using Operand = T;  // of the products: in packed weights, and where rows are copied
  static constexpr int KU = 1;  // channels consumed by one step
  static constexpr int MR = 6;  // rows of the register tile
  static constexpr int NV = 2;  // registers across its columns
  static reg broadcast(const T* p) { return _mm256_broadcast_ss(p); }
  static reg load_b(const T* p) { return _mm256_loadu_ps(p); }
  static reg rounded(reg v) { return v; }  // to what T can hold
  static T narrow_one(float v) { return v; }
  static float widen_one(T v) { return v; }
  // A step of W elements from KU rows, zeros for a null row and beyond the mask.
  static reg step(const T* const* rows, int64_t at) { return rows[0] ? load(rows[0] + at) : zero(); }
  static reg step(const T* const* rows, int64_t at, mask m) {
    return rows[0] ? load(rows[0] + at, m) : zero();
  }
  static reg dot(reg acc, reg a, reg b) { return _mm256_fmadd_ps(a, b, acc); }
  // So many steps, at most W, of one row.
  static reg steps(const T* p, int64_t count) { return load(p, first(count)); }
};

// What 16 bits mean.
struct Bf16Format {
  static __m256 widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static __m128i narrow(__m256 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i kept = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    const __m256i high = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  static float widen_one(uint16_t v) { return bf16_to_float(v); }
  static uint16_t narrow_one(float v) { return bf16_from_float(v); }
};
struct F16Format {
  static __m256 widen(__m128i v) { return _mm256_cvtph_ps(v); }
  static __m128i narrow(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static float widen_one(uint16_t v) { return _cvtsh_ss(v); }
  static uint16_t narrow_one(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
};

// 16 bits in memory, float32 in registers: a store rounds to nearest even, NaN kept.
template <class Format>
struct Memory : Vec, Format {
  using T = uint16_t;
  using Format::narrow;
  using Format::widen;
  static reg load(const T* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static reg load(const T* p, mask m) {
    __m128i v = _mm_setzero_si128();
    __builtin_memcpy(&v, p, 2 * count(m));
    return widen(v);
  }
  static reg rounded(reg v) { return widen(narrow(v)); }
  static void store(T* p, reg v) { _mm_storeu_si128((__m128i*)p, narrow(v)); }
  static void store(T* p, reg v, mask m) {
    const __m128i n = narrow(v);
    __builtin_memcpy(p, &n, 2 * count(m));
  }
};
using Bf16Memory = Memory<Bf16Format>;
using F16Memory = Memory<F16Format>;
