// The CPU kernels run on torch's own pool of threads, and the launchers' errors become exceptions.
#include <stdexcept>

#include "device.h"

namespace fastconv::ops {

cpu::Parallel torch_threads() {
  const auto run = [](int workers, void (*body)(int, void*), void* context) {
    struct Call {
      void (*body)(int, void*);
      void* context;
    } call{body, context};
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, workers, 1,
        [](int64_t begin, int64_t end, void* opaque) {
          const Call& c = *static_cast<Call*>(opaque);
          for (int64_t worker = begin; worker < end; ++worker) c.body(int(worker), c.context);
        },
        &call));
  };
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return {int(threads), run};
}

void check(const cuda::Status& status) {
  if (!status.ok())
    throw std::runtime_error(std::string("CUDA error: ") + status.error + " (fastconv: " + status.where + ")");
}

}  // namespace fastconv::ops
