#include "cute_kernels/torch/device.hpp"

#include <array>
#include <fstream>
#include <mutex>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "cute_kernels/torch/driver.hpp"
#include "cute_kernels/torch/require.hpp"

// Only a CUDA build of libtorch has it. Weak, so that the same binary imports beside a CPU build.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace cute_kernels::binding {
namespace {

constexpr int kMaxDevices = 128;

struct DeviceFacts {
  std::once_flag once;
  int major;
  int minor;
  attention::Device device;
};

/// Throws if the driver is too old for the CUDA runtime in this binary: PyTorch, which has a
/// runtime of its own, may run with it all the same.
void require_driver() {
  int driver = 0;
  require_success(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  std::string release;
  std::ifstream("/sys/module/nvidia/version") >> release;  // not in every container
  std::string const refusal = driver_refusal(CUDART_VERSION, driver, release);
  require(refusal.empty(), refusal);
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  require_success(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

attention::Device const& hopper(int index) {
  static std::array<DeviceFacts, kMaxDevices> all_facts;
  require(index >= 0 && index < kMaxDevices, "cuda:", index, " is beyond the ", kMaxDevices,
          " devices supported");
  DeviceFacts& facts = all_facts[index];
  std::call_once(facts.once, [&] {
    require_driver();
    facts.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    facts.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
    facts.device.index = index;
    facts.device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  });
  require(facts.major == 9 && facts.minor == 0,
          "cute_kernels needs a Hopper GPU (compute capability 9.0: H100, H200), but cuda:", index,
          " has ", facts.major, ".", facts.minor);
  return facts.device;
}

attention::Device hopper(int index, int64_t sm_margin) {
  require(sm_margin >= 0, "sm_margin is below 0");
  return attention::leaving(hopper(index), sm_margin);
}

cudaStream_t current_stream(int index) {
  require(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
  void* stream = nullptr;
  require_torch(aoti_torch_get_current_cuda_stream(index, &stream),
                "name the current stream of cuda:", index);
  return static_cast<cudaStream_t>(stream);
}

void require_success(cudaError_t status, char const* what) {
  require(status == cudaSuccess, what, ": ", cudaGetErrorString(status), " (",
          cudaGetErrorName(status), ")");
}

}  // namespace cute_kernels::binding
