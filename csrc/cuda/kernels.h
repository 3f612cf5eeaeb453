// What the bindings call: launchers that put kernels on a stream of the current device and return.
// They raise runtime_error if a launch fails; no one waits. A stream is CUDA's handle as an integer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/conv_shape.h"
#include "../common/training_args.h"

namespace rf::cuda {

using Stream = uintptr_t;

void launch(DType dtype, const BnStatsArgs& args, Stream stream);
void launch(DType dtype, const BnActArgs& args, Stream stream);
void launch(DType dtype, const BnReduceArgs& args, Stream stream);
void launch(DType dtype, const BnApplyArgs& args, Stream stream);
void launch(DType dtype, const BnPoolApplyArgs& args, Stream stream);
void launch(DType dtype, const AddReluArgs& args, Stream stream);
void launch(DType dtype, const PoolIndexArgs& args, Stream stream);
void launch(DType dtype, const PoolBackwardArgs& args, Stream stream);
void launch(const BnScaleShiftArgs& args, Stream stream);
void launch(const BnGradientVectorsArgs& args, Stream stream);
void launch(const BnUpdateStatsArgs& args, Stream stream);

// What reductions over (rows, c) need, with so many doubles per part and channel.
size_t reduction_scratch_bytes(int64_t rows, int64_t c, int doubles);

// Why CUDA cannot be used in this process, in the driver's own words; null if it can.
const char* fault();

}  // namespace rf::cuda
