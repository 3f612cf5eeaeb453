// Maps of few pixels and many channels, as in the last stages: two blocks on a multiprocessor, one's
// end beside the other's products.
#include "conv_im2col_sm90.cuh"

RF_IM2COL(64, 128, 1, 4, 2)
