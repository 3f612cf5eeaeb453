// Outputs of 64 channels, as in a ResNet's first stage, of which 128 would leave half a tile empty.
#include "conv_im2col_sm90.cuh"

RF_IM2COL(128, 64, 1, 4, 2)
