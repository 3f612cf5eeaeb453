// 1x1 convolutions to and from many channels: the most products for a byte fetched that two groups of
// warps can hold the sums of; two blocks share the weight.
#include "conv_gemm_sm90.cuh"

RF_GEMM(128, 256, 2, Cooperative)
