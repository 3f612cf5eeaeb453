// The fused stem from Python: the arguments checked, then the kernel put on a stream.
#include <pybind11/pybind11.h>

#include "half_bindings.h"
#include "stem.h"

namespace py = pybind11;

namespace rf::cuda {
namespace {

constexpr size_t kAlignment = 16;  // of the output and the weight
constexpr int64_t kTaps = 7 * 8;   // with the one that is none

void need_sizes(int64_t n, int64_t h, int64_t w, int64_t c, int64_t o, int64_t band) {
  need("n", n, 1);
  need("h", h, 1);
  need("w", w, 1);
  need("c", c, 1, 4);
  need("o", o, 1);
  need("band", band, 1);
  if (o % kStemChannels) fail("o: expected a multiple of 64, got " + std::to_string(o));
}

void stem(uintptr_t x, uintptr_t weight, uintptr_t scale, uintptr_t shift, uintptr_t y,
          const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c, int64_t o,
          int64_t band, bool relu, bool pool, Stream stream) {
  const DType type = half_precision(dtype);
  need_sizes(n, h, w, c, o, band);
  const int64_t by = pool ? 4 : 2;
  const double pixels = double(n) * ceil_div(h, by) * ceil_div(w, by);
  const Block out = half_map("y", y, pixels * o, kAlignment);
  need_apart(out, half_map("x", x, double(n) * h * w * c, 2));
  need_apart(out, half_map("weight", weight, double(o) * kTaps * 4, kAlignment));
  const StemArgs args{pointer<const void>(x),
                      pointer<const void>(weight),
                      float_vector("scale", scale),
                      float_vector("shift", shift),
                      pointer<void>(y),
                      n, h, w, c, o, band, relu, pool};
  py::gil_scoped_release release;
  launch(type, args, stream);
}

void stem_backward_weight(uintptr_t grad, uintptr_t x, uintptr_t partial, const std::string& dtype,
                          int64_t n, int64_t h, int64_t w, int64_t c, int64_t o, int64_t band,
                          int64_t parts, Stream stream) {
  const DType type = half_precision(dtype);
  need_sizes(n, h, w, c, o, band);
  need("parts", parts, 1);
  const Block out{"partial", partial, need_bytes("partial", double(parts) * o * 49 * c, 4)};
  need_block(out, alignof(float));
  const double pixels = double(n) * ceil_div(h, 2) * ceil_div(w, 2);
  need_apart(out, half_map("grad", grad, pixels * o, kAlignment));
  need_apart(out, half_map("x", x, double(n) * h * w * c, 2));
  const StemGradArgs args{pointer<const void>(grad), pointer<const void>(x), pointer<float>(partial),
                          n, h, w, c, o, band, parts};
  py::gil_scoped_release release;
  launch(type, args, stream);
}

}  // namespace

void register_stem(py::module_& m) {
  using py::arg;
  m.def("stem", &stem, arg("x"), arg("weight"), arg("scale"), arg("shift"), arg("y"), arg("dtype"),
        arg("n"), arg("h"), arg("w"), arg("c"), arg("o"), arg("band"), arg("relu"), arg("pool"),
        arg("stream"),
        "y = max_pool(act(conv(x, weight) * scale + shift)), act = ReLU or nothing, or without the\n"
        "pool: 7x7 of stride 2 and padding 3, then 3x3 of stride 2 and padding 1.\n\n"
        "x (n, h, w, c), c up to 4, and y (n, h / 4, w / 4, o), or without the pool (n, h / 2, w / 2,\n"
        "o), rounded up, o in 64, are dense NHWC in dtype, 'bfloat16' or 'float16'; scale and shift\n"
        "float32, 0 leaves one out. The weight is (o / 32, 14, 4, 32, 4): steps of 16 along the rows\n"
        "of 8 pixels of 4 channels, groups of 8 outputs, and what each lane multiplies. A block walks\n"
        "down `band` rows of y.");
  m.def("stem_backward_weight", &stem_backward_weight, arg("grad"), arg("x"), arg("partial"),
        arg("dtype"), arg("n"), arg("h"), arg("w"), arg("c"), arg("o"), arg("band"), arg("parts"),
        arg("stream"),
        "The gradient of the weight of `stem` without scale, shift, ReLU and pool, as the sum of\n"
        "`parts` of (o, 7, 7, c) in float32, each by one block, that takes every `parts`-th band.\n"
        "grad is (n, h / 2, w / 2, o), rounded up, in dtype like x.");
}

}  // namespace rf::cuda
