// What plans need to know of a device.
#include "launch.cuh"

namespace fastconv::cuda {

Status device_info(int device, DeviceInfo* info) {
  const auto attribute = [&](cudaDeviceAttr which, int* value) {
    const cudaError_t error = cudaDeviceGetAttribute(value, which, device);
    return error == cudaSuccess ? Status{} : Status{"cudaDeviceGetAttribute", cudaGetErrorString(error)};
  };
  if (const cudaError_t error = cudaDriverGetVersion(&info->driver); error != cudaSuccess)
    return {"cudaDriverGetVersion", cudaGetErrorString(error)};
  int major = 0, minor = 0;
  if (Status s = attribute(cudaDevAttrComputeCapabilityMajor, &major); !s.ok()) return s;
  if (Status s = attribute(cudaDevAttrComputeCapabilityMinor, &minor); !s.ok()) return s;
  info->sm = 10 * major + minor;
  return attribute(cudaDevAttrMultiProcessorCount, &info->num_sms);
}

}  // namespace fastconv::cuda
