// Walking a (rows, c) matrix: vectors along the channels, runs of rows for the threads.

// Work on fewer elements than this stays on one thread.
constexpr int64_t kSerial = 1 << 15;

struct Full {};

template <class E>
static inline typename E::reg get(const typename E::T* p, Full) { return E::load(p); }
template <class E>
static inline typename E::reg get(const typename E::T* p, Vec::mask m) { return E::load(p, m); }
template <class E>
static inline void put(typename E::T* p, typename E::reg v, Full) { E::store(p, v); }
template <class E>
static inline void put(typename E::T* p, typename E::reg v, Vec::mask m) { E::store(p, v, m); }

// f(channel, lanes) for each vector of c channels.
template <class F>
static inline __attribute__((always_inline)) void each_vector(int64_t c, const F& f) {
  int64_t j = 0;
#pragma GCC unroll 4
  for (; j + Vec::W <= c; j += Vec::W) f(j, Full{});
  if (j < c) f(j, Vec::first(c - j));
}

// f(first, last) for runs of rows, at most one per thread. For work without sums only.
template <class F>
static inline void share_rows(int64_t rows, int64_t c, const F& f) {
  const int64_t parts = min64(min64(rows, ceil_div(rows * c, kSerial)), omp_get_max_threads());
  if (parts <= 1) return f(0, rows);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < parts; ++part) f(rows * part / parts, rows * (part + 1) / parts);
}

static inline void put_bytes(uint8_t* p, Vec::reg v, Full) { Vec::store_bytes(p, v); }
static inline void put_bytes(uint8_t* p, Vec::reg v, Vec::mask m) { Vec::store_bytes(p, v, m); }
static inline Vec::reg where_byte(const uint8_t* p, int n, Vec::reg v, Full) {
  return Vec::where_byte(p, n, v);
}
static inline Vec::reg where_byte(const uint8_t* p, int n, Vec::reg v, Vec::mask m) {
  return Vec::where_byte(p, n, v, m);
}
