// Per-channel vectors of BatchNorm from its statistics and sums; Ioffe and Szegedy, arXiv 1502.03167.
#pragma once

#include <cmath>

#include "host_device.h"
#include "training_args.h"

namespace rf {

// y = x*scale + shift: scale = weight / sqrt(var + eps), shift = bias - mean*scale.
RF_HOST_DEVICE void bn_scale_shift(float mean, float var, float weight, float bias, float eps,
                                   float& scale, float& shift) {
  scale = weight / sqrtf(var + eps);
  shift = fmaf(-mean, scale, bias);
}

// The weight's gradient, and grad_x = g*a + x*b + d, with sum_gx = sum(g * (x - mean)), over count
// values per channel.
RF_HOST_DEVICE void bn_gradient_vectors(float mean, float var, float weight, float sum_g,
                                        float sum_gx, float eps, float count, float& a, float& b,
                                        float& d, float& grad_weight) {
  const float inverse = 1 / sqrtf(var + eps);
  grad_weight = sum_gx * inverse;
  a = inverse * weight;
  b = -(a * inverse * inverse * sum_gx / count);
  d = -(a * sum_g / count) - b * mean;
}

// Channel i of the vectors; weight and bias may be absent.
RF_HOST_DEVICE void bn_scale_shift(const BnNorm& g, int64_t i, float& scale, float& shift) {
  bn_scale_shift(g.mean[i], g.var[i], g.weight ? g.weight[i] : 1, g.bias ? g.bias[i] : 0, g.eps, scale,
                 shift);
}

RF_HOST_DEVICE void bn_scale_shift(const BnScaleShiftArgs& g, int64_t i) {
  bn_scale_shift(g, i, g.scale[i], g.shift[i]);
}

RF_HOST_DEVICE void bn_gradient_vectors(const BnGradientVectorsArgs& g, int64_t i, float sum_g,
                                        float sum_gx) {
  float grad_weight;
  bn_gradient_vectors(g.mean[i], g.var[i], g.weight ? g.weight[i] : 1, sum_g, sum_gx, g.eps, g.count,
                      g.a[i], g.b[i], g.d[i], grad_weight);
  if (g.grad_weight) g.grad_weight[i] = grad_weight;
}

// The running statistics of channel i, moved in place; that of channel 0 counts the batch.
RF_HOST_DEVICE void bn_update_stats(const BnUpdateStatsArgs& g, int64_t i) {
  if (i == 0 && g.num_batches_tracked) ++*g.num_batches_tracked;
  g.running_mean[i] = g.running_mean[i] * g.keep + g.mean[i] * g.share;
  g.running_var[i] = g.running_var[i] * g.keep + g.var[i] * g.unbiased * g.share;
}

}  // namespace rf
