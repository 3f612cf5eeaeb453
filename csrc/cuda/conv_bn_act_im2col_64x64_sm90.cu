// Single images: the smallest tile of wgmma, so that there is work for as many multiprocessors as
// can be.
#include "conv_im2col_sm90.cuh"

RF_IM2COL(64, 64, 1, 4, 3)
