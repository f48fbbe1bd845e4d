// The kernels of conv2d_mma.cu for float32 rounded to tf32.
#include "conv2d_mma.cuh"

namespace fastconv::cuda {

template Status launch_conv2d_mma<Tf32>(const ConvMma&, const Conv2dPlan&, Stream);

}  // namespace fastconv::cuda
