// conv_bn_act from Python: the arguments checked, then the chosen algorithm run.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../common/bn_op_bindings.h"
#include "../common/conv_bindings.h"
#include "device.h"
#include "isa.h"

namespace py = pybind11;

namespace rf {
namespace {

const cpu::ConvAlgorithm& find(const ConvShape& s, const std::string& name) {
  for (const cpu::ConvAlgorithm* a = table_for(s.dtype).conv; a->name; ++a)
    if (name == a->name) {
      if (!a->can_run(s)) fail("algorithm: " + name + " cannot run this shape");
      return *a;
    }
  fail("algorithm: unknown name " + name);
}

// Measured on two Zen 5 cores with ResNet shapes at 1, 2 and 8 images, weights from memory. With few
// tiles, Winograd's larger weights cost more than its fewer products save; products of pairs of bfloat16
// halve what there is to save.
std::string likely_fastest(const ConvShape& s) {
  const int64_t tiles = s.n * ceil_div(s.oh(), 4) * ceil_div(s.ow(), 4);
  // Where that does not run the shape, the first of the others is taken.
  const bool pairs = s.dtype == DType::bf16 && cpu::active_isa() >= cpu::Isa::avx512_bf16;
  if (pairs && cpu::active_isa() == cpu::Isa::amx_bf16) return "amx";
  if (pairs && s.c % 2 && s.c < 16) return "narrow";
  if (pairs) return s.c >= 24 && s.o >= 24 && tiles >= 32 ? "winograd4" : "direct";
  if (s.c < 16 || s.o < 16) return "direct";
  return tiles <= 16 && s.c * s.o >= 256 * 256 ? "winograd2" : "winograd4";
}

int threads_for(const cpu::ConvAlgorithm& a, const ConvShape& s, size_t scratch_bytes) {
  for (int threads = omp_get_max_threads(); threads >= 1; --threads)
    if (a.scratch_bytes(s, threads) <= scratch_bytes) return threads;
  fail("scratch_bytes: too small even for one thread, expected at least " +
       std::to_string(a.scratch_bytes(s, 1)));
}

// Pack-time sizes: a packed buffer depends on the channels, the kernel and the groups alone.
ConvShape weight_shape(const std::string& dtype, int64_t o, int64_t cg, int64_t kh, int64_t kw,
                       int64_t groups) {
  need("c_per_group", cg, 1);
  need("groups", groups, 1);
  return checked({parse_dtype(dtype), 1, kh, kw, cg * groups, o, kh, kw, 1, 1, 0, 0, 1, 1, groups});
}

Block packed_block(const cpu::ConvAlgorithm& a, const ConvShape& s, uintptr_t address, size_t size) {
  const Block packed{"packed", address, a.packed_bytes(s)};
  need_block(packed, 64);
  if (size < packed.bytes)
    fail("packed_bytes: expected at least " + std::to_string(packed.bytes) + ", got " +
         std::to_string(size));
  return packed;
}

std::vector<std::string> algorithms(const std::string& dtype, int64_t n, int64_t h, int64_t w,
                                    int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh,
                                    int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw,
                                    int64_t groups) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  std::vector<std::string> names;
  const cpu::KernelTable* table = cpu::kernels(s.dtype);
  for (const cpu::ConvAlgorithm* a = table ? table->conv : nullptr; a && a->name; ++a)
    if (a->can_run(s)) names.push_back(a->name);
  const std::string best = likely_fastest(s);
  std::stable_partition(names.begin(), names.end(), [&](const std::string& a) { return a == best; });
  return names;
}

size_t packed_bytes(const std::string& dtype, const std::string& algorithm, int64_t o, int64_t cg,
                    int64_t kh, int64_t kw, int64_t groups) {
  const ConvShape s = weight_shape(dtype, o, cg, kh, kw, groups);
  return find(s, algorithm).packed_bytes(s);
}

void pack(uintptr_t weight, uintptr_t packed, size_t packed_size, const std::string& dtype,
          const std::string& algorithm, int64_t o, int64_t cg, int64_t kh, int64_t kw,
          int64_t groups, int64_t along_o, int64_t along_c, int64_t along_tap, bool turned, bool wide) {
  const ConvShape s = weight_shape(dtype, o, cg, kh, kw, groups);
  const cpu::ConvAlgorithm& a = find(s, algorithm);
  need("along_o", along_o, 0, int64_t(1) << 40);
  need("along_c", along_c, 0, int64_t(1) << 40);
  need("along_tap", along_tap, 0, int64_t(1) << 40);
  const double last = double(o - 1) * along_o + double(cg - 1) * along_c +
                      double(kh * kw - 1) * along_tap;
  const size_t item = wide ? sizeof(float) : itemsize(s.dtype);
  const Block from{"weight", weight, need_bytes("weight", last + 1, item)};
  need_block(from, item);
  need_apart(packed_block(a, s, packed, packed_size), from);
  const char* data = pointer<const char>(weight);
  if (turned) {
    data += (kh * kw - 1) * along_tap * int64_t(item);
    along_tap = -along_tap;
  }
  py::gil_scoped_release release;
  a.pack(s, {data, along_o, along_c, along_tap, wide}, pointer<void>(packed));
}

size_t conv_scratch_bytes(const std::string& dtype, const std::string& algorithm, int64_t n, int64_t h,
                          int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh,
                          int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups,
                          int threads) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  need("threads", threads, 1, 1 << 16);
  return find(s, algorithm).scratch_bytes(s, threads);
}

void convolve(const cpu::ConvAlgorithm& a, const ConvShape& s, uintptr_t x, uintptr_t packed,
              size_t packed_size, uintptr_t scale, uintptr_t shift, uintptr_t residual, uintptr_t y,
              uintptr_t scratch, size_t scratch_size, bool relu, float* mean = nullptr,
              float* var = nullptr) {
  if (s.n == 0) return;
  const size_t item = itemsize(s.dtype), vector_bytes = s.o * sizeof(float);
  const Block in{"x", x, size_t(s.n * s.h * s.w * s.c) * item};
  const Block out{"y", y, size_t(s.n * s.oh() * s.ow() * s.o) * item};
  const Block added{"residual", residual, residual ? out.bytes : 0};
  const Block scales{"scale", scale, scale ? vector_bytes : 0};
  const Block shifts{"shift", shift, shift ? vector_bytes : 0};
  const Block work{"scratch", scratch, scratch_size};
  need_block(in, item);
  need_block(out, item);
  if (residual) need_block(added, item);
  if (scale) need_block(scales, alignof(float));
  if (shift) need_block(shifts, alignof(float));
  if (scratch || scratch_size) need_block(work, 64);
  const Block weights = packed_block(a, s, packed, packed_size);
  if (residual) need_same_or_apart(out, added);
  for (const Block* read : {&in, &weights, &scales, &shifts}) {
    need_apart(out, *read);
    need_apart(work, *read);
  }
  need_apart(work, added);
  need_apart(work, out);
  const int threads = threads_for(a, s, scratch_size);
  py::gil_scoped_release release;
  a.run({s, pointer<const void>(x), pointer<const void>(packed), pointer<const float>(scale),
         pointer<const float>(shift), pointer<const void>(residual), pointer<void>(y),
         pointer<char>(scratch), threads, relu, mean, var});
}

void conv_bn_act(uintptr_t x, uintptr_t packed, size_t packed_size, uintptr_t scale, uintptr_t shift,
                 uintptr_t residual, uintptr_t y, uintptr_t scratch, size_t scratch_size,
                 const std::string& dtype, const std::string& algorithm, int64_t n, int64_t h,
                 int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                 int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups, bool relu) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  convolve(find(s, algorithm), s, x, packed, packed_size, scale, shift, residual, y, scratch, scratch_size,
           relu);
}

// What convolve_once puts where in its scratch memory: bytes from its beginning.
struct Once {
  size_t work, activation, norm, stats, end;

  Once(const cpu::ConvAlgorithm& a, const ConvShape& s, int threads, bool normalised, bool with_stats) {
    const auto after = [](size_t begin, size_t bytes) { return begin + (bytes + 63) / 64 * 64; };
    const int64_t rows = s.n * s.h * s.w;
    work = after(0, a.packed_bytes(s));
    activation = after(work, a.scratch_bytes(s, threads));
    norm = after(activation, normalised ? rows * s.c * itemsize(s.dtype) : 0);
    stats = after(norm, normalised ? bn_act_scratch_bytes<Cpu>(rows, s.c) : 0);
    end = after(stats, with_stats ? Cpu::scratch_bytes(s.n * s.oh() * s.ow(), s.o, kStatsResults) : 0);
  }
};

size_t once_scratch_bytes(const std::string& dtype, const std::string& algorithm, int64_t n, int64_t h,
                          int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                          int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups, int threads,
                          bool normalised, bool with_stats) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  need("threads", threads, 1, 1 << 16);
  return Once(find(s, algorithm), s, threads, normalised, with_stats).end;
}

void convolve_once(uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t y, uintptr_t scratch,
                   size_t scratch_size, const std::string& dtype, const std::string& algorithm, int64_t n,
                   int64_t h, int64_t w, int64_t c, int64_t o, int64_t kh, int64_t kw, int64_t sh,
                   int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw, int64_t groups,
                   int64_t along_o, int64_t along_c, int64_t along_tap, bool turned, bool wide, int threads,
                   uintptr_t norm_mean, uintptr_t norm_var, uintptr_t norm_weight, uintptr_t norm_bias,
                   double eps, bool relu, uintptr_t mean, uintptr_t var) {
  const ConvShape s = checked(
      {parse_dtype(dtype), n, h, w, c, o, kh, kw, sh, sw, ph, pw, dh, dw, groups});
  need("threads", threads, 1, 1 << 16);
  if (!norm_mean != !norm_var) fail_together("norm_var", "norm_mean");
  if (!mean != !var) fail_together("var", "mean");
  const cpu::ConvAlgorithm& a = find(s, algorithm);
  const Once at(a, s, threads, norm_mean, mean);
  need_block({"scratch", scratch, scratch_size}, 64);
  if (scratch_size < at.end)
    fail("scratch_bytes: expected at least " + std::to_string(at.end) + ", got " +
         std::to_string(scratch_size));
  const size_t item = itemsize(s.dtype), out = n * s.oh() * s.ow() * o * item;
  const Block maps[] = {
      {"x", x, n * h * w * c * item}, {"y", y, out}, {"residual", residual, residual ? out : 0}};
  for (const Block& map : maps) need_apart({"scratch", scratch, at.end}, map);
  if (mean)
    for (const Block& moment : {Block{"mean", mean, o * sizeof(float)}, {"var", var, o * sizeof(float)}})
      need_block(moment, alignof(float));
  pack(weight, scratch, at.work, dtype, algorithm, o, c / groups, kh, kw, groups, along_o, along_c,
       along_tap, turned, wide);
  if (norm_mean) {
    bn_act<Cpu>(x, norm_mean, norm_var, norm_weight, norm_bias, 0, scratch + at.activation, 0,
                scratch + at.norm, at.stats - at.norm, dtype, n * h * w, c, eps, relu);
    x = scratch + at.activation;
  }
  const bool given = mean && a.gives_moments && !residual && n;
  convolve(a, s, x, scratch, at.work, 0, 0, residual, y, scratch + at.work, at.activation - at.work, false,
           given ? pointer<float>(mean) : nullptr, given ? pointer<float>(var) : nullptr);
  if (mean && !given)
    bn_stats<Cpu>(y, mean, var, scratch + at.stats, at.end - at.stats, dtype, n * s.oh() * s.ow(), o);
}

}  // namespace

#define RF_WEIGHT \
  py::arg("o"), py::arg("c_per_group"), py::arg("kh"), py::arg("kw"), py::arg("groups")

void register_conv_bn_act(py::module_& m) {
  m.def("conv_bn_act_algorithms", &algorithms, py::arg("dtype"), RF_SHAPE,
        "Names that can run the shape, the likely fastest first; empty where this processor has no\n"
        "kernels for the dtype ('float32', 'bfloat16' or 'float16').");
  m.def("conv_bn_act_packed_bytes", &packed_bytes, py::arg("dtype"), py::arg("algorithm"), RF_WEIGHT,
        "Bytes of the packed weights. They depend on the algorithm and the instruction set too.");
  m.def("conv_bn_act_pack", &pack, py::arg("weight"), py::arg("packed"), py::arg("packed_bytes"),
        py::arg("dtype"), py::arg("algorithm"), RF_WEIGHT, py::arg("along_o"), py::arg("along_c"),
        py::arg("along_tap"), py::arg("turned") = false, py::arg("wide") = false,
        "Packs a weight into a 64-byte aligned buffer. along_* are the elements from one output\n"
        "channel, input channel or tap to the next. turned: each kernel is read from its last tap to\n"
        "its first; with along_o and along_c exchanged the convolution gives an input's gradient. wide: the\n"
        "weight is float32, rounded to dtype.");
  m.def("conv_bn_act_scratch_bytes", &conv_scratch_bytes, py::arg("dtype"), py::arg("algorithm"), RF_SHAPE,
        py::arg("threads"), "Bytes of scratch a call wants to run on that many threads.");
  m.def("conv_bn_act", &conv_bn_act, py::arg("x"), py::arg("packed"), py::arg("packed_bytes"),
        py::arg("scale"), py::arg("shift"), py::arg("residual"), py::arg("y"), py::arg("scratch"),
        py::arg("scratch_bytes"), py::arg("dtype"), py::arg("algorithm"), RF_SHAPE, py::arg("relu"),
        "y = act(conv(x, weight) * scale + shift + residual), act = ReLU or nothing.\n\n"
        "x, residual and y are dense NHWC in dtype; scale and shift float32. 0 leaves out scale,\n"
        "shift or residual. y may be the residual itself; else what is written, y and scratch, lies\n"
        "apart from all else. packed and scratch are 64-byte aligned, the rest as their elements. Runs\n"
        "on omp_get_max_threads() threads, or as many as the scratch is enough for; the result does not\n"
        "depend on their number. Allocates nothing.");
  m.def("convolve_once_scratch_bytes", &once_scratch_bytes, py::arg("dtype"), py::arg("algorithm"), RF_SHAPE,
        py::arg("threads"), py::arg("normalised"), py::arg("with_stats"),
        "Bytes of scratch that convolve_once needs.");
  m.def("convolve_once", &convolve_once, py::arg("x"), py::arg("weight"), py::arg("residual"), py::arg("y"),
        py::arg("scratch"), py::arg("scratch_bytes"), py::arg("dtype"), py::arg("algorithm"), RF_SHAPE,
        py::arg("along_o"), py::arg("along_c"), py::arg("along_tap"), py::arg("turned"), py::arg("wide"),
        py::arg("threads"), py::arg("norm_mean"), py::arg("norm_var"), py::arg("norm_weight"),
        py::arg("norm_bias"), py::arg("eps"), py::arg("relu"), py::arg("mean"), py::arg("var"),
        "y = conv(a, weight) + residual by one call, the weight packed in the scratch memory and not\n"
        "kept: a is x or, with norm_mean and norm_var, what bn_act makes of it by these. mean and var, if\n"
        "not 0, receive y's own. All else as in conv_bn_act_pack, bn_act, conv_bn_act and bn_stats.");
}

}  // namespace rf
