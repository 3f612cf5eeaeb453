// Maps of few pixels and 128 channels or more: half the sums of 128x128, so that two blocks fit a
// multiprocessor, one's end beside the other's products. A wgmma of 128 columns reads three quarters
// of the shared memory that two of 64 columns read for the same products.
#include "conv_im2col_sm90.cuh"

RF_IM2COL(64, 128, 1, 4, 2)
