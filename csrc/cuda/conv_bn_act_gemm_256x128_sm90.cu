// 1x1 convolutions of few input channels, whose time goes into reading the residual and writing y: both
// groups of warps on one tile, so that the largest pieces are under way.
#include "conv_gemm_sm90.cuh"

RF_GEMM(256, 128, 1, Cooperative)
