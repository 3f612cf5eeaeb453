// Counts, sums and squared deviations of parts of a data set, put together.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace rf {

// The factors of merging a part of n values into one of n0, the same for every channel.
struct MomentsMerge {
  double by_n0, by_n, weight;

  RF_HOST_DEVICE MomentsMerge(double n0, double n)
      : by_n0(n0 > 0 ? 1 / n0 : 0), by_n(1 / n), weight(n0 * n / (n0 + n)) {}

  // Chan, Golub, LeVeque 1979: m2 is the sum of squared deviations from the part's own mean.
  RF_HOST_DEVICE void add(double& sum0, double& m20, double sum, double m2) const {
    const double delta = sum * by_n - sum0 * by_n0;
    m20 += m2 + delta * delta * weight;
    sum0 += sum;
  }
};

// The sum and the squared deviations of n values, from sums of x - shift and of (x - shift)^2.
RF_HOST_DEVICE void unshifted(double n, double by_n, float shift, double sum_s, double square_s,
                              double& sum, double& m2) {
  const double deviations = square_s - sum_s * sum_s * by_n;
  sum = n * (double)shift + sum_s;
  m2 = deviations < 0 ? 0 : deviations;  // below zero by rounding only; NaN stays
}

// The rows of one part of a reduction.
RF_HOST_DEVICE int64_t part_begin(int64_t rows, int64_t parts, int64_t part) {
  const int64_t more = rows % parts;
  return rows / parts * part + (part < more ? part : more);
}

// Into how many parts of rows a reduction over (rows, c) is cut: a function of the shape alone, so
// that sums do not depend on the number of threads. Enough for many threads, and no part so small
// that its result, a few doubles per channel, costs as much to write as its rows to read.
inline int64_t reduction_parts(int64_t rows, int64_t c) {
  const int64_t by_rows = rows / 32, by_size = rows * c / 16384;
  const int64_t parts = by_rows < by_size ? by_rows : by_size;
  return parts < 1 ? 1 : parts > 128 ? 128 : parts;
}

}  // namespace rf
