// 1x1 convolutions of many input channels: a tile of each group of warps, so that one's end runs beside
// the other's products.
#include "conv_gemm_sm90.cuh"

RF_GEMM(128, 128, 1, Pingpong)
