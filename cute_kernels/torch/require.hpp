#pragma once

#include <ostream>
#include <sstream>
#include <stdexcept>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

namespace cute_kernels::binding {

/// Throws std::runtime_error, a Python RuntimeError, with the message's parts joined. Unlike
/// STD_TORCH_CHECK it puts no C++ file and line before what the caller should read.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(Parts const&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void require(bool condition, Parts const&... parts) {
  if (__builtin_expect(!condition, 0)) fail(parts...);
}

/// Throws if a call of libtorch's C shim failed; the parts say what was tried. libtorch has printed
/// its own message by then. Torch's macros for this have other names from release to release.
template <class... Parts>
inline void require_torch(AOTITorchError status, Parts const&... parts) {
  require(status == AOTI_TORCH_SUCCESS, "PyTorch failed to ", parts...,
          "; its own message is on stderr");
}

/// What a check needs to know of a tensor argument, read once: every question to a stable Tensor is
/// a call into libtorch.
struct Argument {
  char const* name;
  torch::stable::Tensor const& tensor;
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
  torch::headeronly::IntHeaderOnlyArrayRef strides;
  torch::headeronly::ScalarType dtype;
  bool is_cuda;
  int device;

  Argument(char const* name, torch::stable::Tensor const& tensor)
      : name(name),
        tensor(tensor),
        sizes(tensor.sizes()),
        strides(tensor.strides()),
        dtype(tensor.scalar_type()),
        is_cuda(tensor.is_cuda()),
        device(tensor.get_device_index()) {}

  int64_t size(int dim) const { return sizes[dim]; }
  int64_t stride(int dim) const { return strides[dim]; }
};

/// Prints (2, 128, 16, 64).
struct Shape {
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
};

inline std::ostream& operator<<(std::ostream& out, Shape const& shape) {
  out << '(';
  for (size_t i = 0; i < shape.sizes.size(); ++i) out << (i == 0 ? "" : ", ") << shape.sizes[i];
  return out << ')';
}

/// Prints torch.float16, as Python does.
struct DtypeOf {
  torch::headeronly::ScalarType dtype;
};

inline std::ostream& operator<<(std::ostream& out, DtypeOf const& dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype.dtype) {
    case ScalarType::Half:
      return out << "torch.float16";
    case ScalarType::BFloat16:
      return out << "torch.bfloat16";
    case ScalarType::Float:
      return out << "torch.float32";
    case ScalarType::Double:
      return out << "torch.float64";
    default:
      return out << dtype.dtype;  // C++'s name
  }
}

/// Prints cuda:0.
struct DeviceOf {
  Argument const& argument;
};

inline std::ostream& operator<<(std::ostream& out, DeviceOf const& device) {
  if (device.argument.is_cuda) return out << "cuda:" << device.argument.device;
  return out << (device.argument.tensor.is_cpu() ? "cpu" : "a device that is neither CUDA nor CPU");
}

}  // namespace cute_kernels::binding
