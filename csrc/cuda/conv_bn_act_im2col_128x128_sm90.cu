// Large maps with 128 channels and more, the bulk of a ResNet's 3x3 convolutions: the most products
// for a byte fetched that one group of warps can hold the sums of. Its registers leave room for one
// block on a multiprocessor, so the stages fill the shared memory, and two blocks share the weight.
#include "conv_im2col_sm90.cuh"

RF_IM2COL(128, 128, 2, 6, 1)
