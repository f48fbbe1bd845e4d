// The kernels of conv2d_mma.cu for float32 and float64 without loss.
#include "conv2d_mma.cuh"

namespace fastconv::cuda {

template Status launch_conv2d_mma<float>(const ConvMma&, const Conv2dPlan&, Stream);
template Status launch_conv2d_mma<double>(const ConvMma&, const Conv2dPlan&, Stream);

}  // namespace fastconv::cuda
