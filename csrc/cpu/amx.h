// The tile registers of AMX: eight of 16 rows by 64 bytes, and products of bfloat16 summed in float32.
// Included inside a namespace: no #include here.
//
// RF_AMX_BY_HAND computes them in plain C++, for tests on processors that have none.

struct Tiles {
  static constexpr int R = 16;             // rows of a tile
  static constexpr int LINE = 64;          // bytes of a row
  static constexpr int K = LINE / 2;       // elements of bfloat16 in a row

#ifdef RF_AMX_BY_HAND
  static inline thread_local float file[8][R][R];

  static void begin() { memset(file, 0, sizeof file); }
  static void end() {}
  template <int D>
  static void zero() { memset(file[D], 0, sizeof file[D]); }
  template <int D>
  static void load(const void* p, int64_t stride) {
    for (int i = 0; i < R; ++i) memcpy(file[D][i], static_cast<const char*>(p) + i * stride, LINE);
  }
  template <int S>
  static void store(void* p, int64_t stride) {
    for (int i = 0; i < R; ++i) memcpy(static_cast<char*>(p) + i * stride, file[S][i], LINE);
  }
  // D[i][j] += the sum over k of A[i][2k] B[k][2j] + A[i][2k + 1] B[k][2j + 1].
  template <int D, int A, int B>
  static void dot() {
    for (int i = 0; i < R; ++i)
      for (int k = 0; k < R; ++k) {
        uint16_t a[2], b[2 * R];
        memcpy(a, &file[A][i][k], sizeof a);
        memcpy(b, file[B][k], sizeof b);
        for (int j = 0; j < R; ++j)
          for (int l = 0; l < 2; ++l) file[D][i][j] += bf16_to_float(a[l]) * bf16_to_float(b[2 * j + l]);
      }
  }
#else
  // Whole tiles only: what lies beyond the rows that are asked for is computed and not kept.
  static void begin() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = LINE;
      config.rows[i] = R;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void end() { asm volatile("tilerelease" ::: "memory"); }
  template <int D>
  static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(D)); }
  template <int D>
  static void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(D));
  }
  template <int S>
  static void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(S) : "memory");
  }
  template <int D, int A, int B>
  static void dot() { asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B)); }
#endif
};
