// The kernels of conv2d_mma.cu for float16 and bfloat16.
#include "conv2d_mma.cuh"

namespace fastconv::cuda {

template Status launch_conv2d_mma<__half>(const ConvMma&, const Conv2dPlan&, Stream);
template Status launch_conv2d_mma<__nv_bfloat16>(const ConvMma&, const Conv2dPlan&, Stream);

}  // namespace fastconv::cuda
