// 1x1 convolutions with nothing to add: the pieces of the residual, which they do not fetch, lend y
// their memory, and more of x and the weight is fetched ahead.
#include "conv_gemm_sm90.cuh"

RF_GEMM(gemm, "gemm", InPlace)
