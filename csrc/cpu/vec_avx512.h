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
  // A whole line of the cache, aligned, which is then not read from memory first.
  static void stream(float* p, reg v) { _mm512_stream_ps(p, v); }
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
  static __m512d pd(reg v) { return _mm512_castps_pd(v); }
  static reg ps(__m512d v) { return _mm512_castpd_ps(v); }
  static void add_to(double* p, reg v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(pd(v), 1)));
    _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), low));
    _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), high));
  }
  // W rows of W lanes become its columns: pairs, then fours within 128 bits, then the 128 bits.
  static void transpose(reg (&r)[W]) {
    reg t[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < W; i += 4)
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = ps(_mm512_unpacklo_pd(pd(t[i + k]), pd(t[i + k + 2])));
        r[i + 2 * k + 1] = ps(_mm512_unpackhi_pd(pd(t[i + k]), pd(t[i + k + 2])));
      }
    constexpr int EVEN = 0x88, ODD = 0xdd;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const reg even = _mm512_shuffle_f32x4(r[k], r[4 + k], EVEN), odd = _mm512_shuffle_f32x4(r[k], r[4 + k], ODD);
      const reg even2 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], EVEN);
      const reg odd2 = _mm512_shuffle_f32x4(r[8 + k], r[12 + k], ODD);
      r[k] = _mm512_shuffle_f32x4(even, even2, EVEN);
      r[4 + k] = _mm512_shuffle_f32x4(odd, odd2, EVEN);
      r[8 + k] = _mm512_shuffle_f32x4(even, even2, ODD);
      r[12 + k] = _mm512_shuffle_f32x4(odd, odd2, ODD);
    }
  }
  // v where z is above zero or NaN, else zero: the gradient of relu(z).
  static reg where_passed(reg z, reg v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ), v);
  }
  // The lanes where that is so, as bits; v in the lanes of which the bits are set.
  static uint32_t passed(reg z) { return _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_NLE_UQ); }
  static reg where_bits(uint32_t bits, reg v) { return _mm512_maskz_mov_ps((mask)bits, v); }
  static int count(mask m) { return __builtin_popcount(m); }
  static reg finite_or_zero(reg v) {
    const mask finite =
        _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_maskz_mov_ps(finite, v);
  }
  // A larger value or a NaN replaces the best, where it was and what it was made of.
  static void take_max(reg v, reg at, reg from, reg& best, reg& best_at, reg& best_from) {
    const mask m =
        _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    best = _mm512_mask_mov_ps(best, m, v);
    best_at = _mm512_mask_mov_ps(best_at, m, at);
    best_from = _mm512_mask_mov_ps(best_from, m, from);
  }
  // Whole numbers from 0 to 255, one byte each.
  static void store_bytes(uint8_t* p, reg v, mask m = 0xffff) {
    _mm512_mask_cvtepi32_storeu_epi8(p, m, _mm512_cvtps_epi32(v));
  }
  // v where the byte is n, else zero.
  static reg where_byte(const uint8_t* p, int n, reg v, mask m = 0xffff) {
    const __m128i bytes = _mm_maskz_loadu_epi8(m, p);
    return _mm512_maskz_mov_ps(_mm_mask_cmpeq_epi8_mask(m, bytes, _mm_set1_epi8((char)n)), v);
  }
};

struct F32 : Vec {
  using T = float;
  using Operand = T;  // of the products: in packed weights, and where rows are copied
  static constexpr int KU = 1;   // channels consumed by one step
  static constexpr int MR = 14;  // rows of the register tile
  static constexpr int NV = 2;   // registers across its columns
  static reg broadcast(const T* p) { return _mm512_set1_ps(*p); }
  static reg load_b(const T* p) { return _mm512_loadu_ps(p); }
  static reg rounded(reg v) { return v; }  // to what T can hold
  static T narrow_one(float v) { return v; }
  static float widen_one(T v) { return v; }
  // A step of W elements from KU rows, zeros for a null row and beyond the mask.
  static reg step(const T* const* rows, int64_t at, mask m = 0xffff) {
    return rows[0] ? Vec::load(rows[0] + at, m) : zero();
  }
  static reg dot(reg acc, reg a, reg b) { return _mm512_fmadd_ps(a, b, acc); }
  // So many steps, at most W, of one row.
  static reg steps(const T* p, int64_t count) { return load(p, first(count)); }
};

// What 16 bits mean.
struct Bf16Format {
  static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static __m256i narrow(__m512 v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  static float widen_one(uint16_t v) { return bf16_to_float(v); }
  static uint16_t narrow_one(float v) { return bf16_from_float(v); }
};
struct F16Format {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
  static __m256i narrow(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  static float widen_one(uint16_t v) { return _cvtsh_ss(v); }
  static uint16_t narrow_one(float v) { return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }
};

// 16 bits in memory, float32 in registers: a store rounds to nearest even, NaN kept.
template <class Format>
struct Memory : Vec, Format {
  using T = uint16_t;
  using Format::narrow;
  using Format::widen;
  static reg load(const T* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static reg load(const T* p, mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
  static reg rounded(reg v) { return widen(narrow(v)); }
  static void store(T* p, reg v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
  static void store(T* p, reg v, mask m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
};
using Bf16Memory = Memory<Bf16Format>;
using F16Memory = Memory<F16Format>;

#ifdef RF_BF16
// Products of pairs.
struct Bf16 : Bf16Memory {
  using Operand = T;
  static constexpr int KU = 2;
  static constexpr int MR = 14;
  static constexpr int NV = 2;
  using Bf16Memory::load;
  using Vec::load;
  using Vec::store;
  static reg broadcast(const T* p) {
    int v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(v));
  }
  static reg broadcast_tail(const T* p) { return _mm512_castsi512_ps(_mm512_set1_epi32(*p)); }
  static reg load_b(const T* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
  // The rows' elements side by side.
  static reg step(const T* const* rows, int64_t at, mask m = 0xffff) {
    const auto wide = [&](const T* row) __attribute__((always_inline)) {
      return row ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, row + at)) : _mm512_setzero_si512();
    };
    return _mm512_castsi512_ps(_mm512_or_si512(wide(rows[0]), _mm512_slli_epi32(wide(rows[1]), 16)));
  }
  // Steps of so many elements, at most 2 W, of two rows, zeros for a null row and beyond the last.
  static void store_steps(const T* const* rows, int64_t at, int64_t count, T* out) {
    const uint32_t m = count >= 2 * W ? ~0u : (1u << count) - 1;
    const auto load = [&](const T* row) __attribute__((always_inline)) {
      return row ? _mm512_maskz_loadu_epi16(m, row + at) : _mm512_setzero_si512();
    };
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i a = _mm512_permutexvar_epi64(order, load(rows[0]));
    const __m512i b = _mm512_permutexvar_epi64(order, load(rows[1]));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(out + 2 * W, _mm512_unpackhi_epi16(a, b));
  }
  // So many steps, at most W, of one row: of its own elements, or rounded from floats.
  static reg steps(const T* p, int64_t count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(first(count), p));
  }
  static reg steps(const float* p, int64_t count) {
    const reg low = Vec::load(p, first(2 * count)), high = Vec::load(p + W, first(2 * count - W));
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  static reg dot(reg acc, reg a, reg b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
  // As stores round: to zero where a subnormal would be left.
  static reg rounded(reg v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }
  static void store(T* p, reg v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
  static void store(T* p, reg v, mask m) {
    _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(v));
  }
  // Elements [first, last) of 32, zeros in place of the others, which are not read.
  static void copy_between(const T* p, int64_t first, int64_t last, T* out) {
    const auto below = [](int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; };
    _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(below(last) & ~below(first), p));
  }
  // 2 W elements, of two registers of them or in memory; those at even places and the others, widened.
  static __m512i pair(reg v, reg next) { return (__m512i)_mm512_cvtne2ps_pbh(next, v); }
  static void store(T* p, __m512i v, int64_t count) {
    _mm512_mask_storeu_epi16(p, count >= 2 * W ? ~0u : (1u << count) - 1, v);
  }
  static reg even(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static reg odd(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
  }
};
#endif
