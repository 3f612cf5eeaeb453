// Per-channel vectors of BatchNorm from its statistics and sums; Ioffe and Szegedy, arXiv 1502.03167.
#pragma once

#include <cmath>

#include "host_device.h"

namespace rf {

// y = x*scale + shift: scale = weight / sqrt(var + eps), shift = bias - mean*scale.
RF_HOST_DEVICE void bn_scale_shift(float mean, float var, float weight, float bias, float eps,
                                   float& scale, float& shift) {
  scale = weight / sqrtf(var + eps);
  shift = fmaf(-mean, scale, bias);
}

// grad_x = g*a + x*b + d, with sum_gx = sum(g * (x - mean)), over count values per channel.
RF_HOST_DEVICE void bn_gradient_vectors(float mean, float var, float weight, float sum_g,
                                        float sum_gx, float eps, float count, float& a, float& b,
                                        float& d) {
  const float inverse = 1 / sqrtf(var + eps);
  a = inverse * weight;
  b = -(a * inverse * inverse * sum_gx / count);
  d = -(a * sum_g / count) - b * mean;
}

}  // namespace rf
