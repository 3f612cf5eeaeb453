// 1x1 convolutions with a residual, whose time goes into reading it and writing y: neither waits for
// the other.
#include "conv_gemm_sm90.cuh"

RF_GEMM(gemm_add, "gemm-add", Apart)
