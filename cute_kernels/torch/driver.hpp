#pragma once

#include <sstream>
#include <string>

namespace cute_kernels::binding {

/// Prints 12.8 for 12080, as CUDA counts its versions.
struct CudaVersion {
  int number;
};

inline std::ostream& operator<<(std::ostream& out, CudaVersion version) {
  return out << version.number / 1000 << '.' << version.number % 1000 / 10;
}

/// The first NVIDIA driver for a major version of CUDA, 0 if unknown.
/// Source: NVIDIA, CUDA Compatibility, "CUDA minor version compatibility".
constexpr int first_driver(int cuda_major) {
  return cuda_major == 12 ? 525 : cuda_major == 13 ? 580 : 0;
}

/// Why the driver cannot run what is linked with a CUDA runtime, or "" if it can: any driver for
/// the runtime's major version of CUDA can. `runtime` and `driver` are versions of CUDA, such as
/// 12080: the one linked and the newest that the driver knows, 0 without a driver. `release` is
/// the driver's own number, such as 570.86.10, "" if unknown.
inline std::string driver_refusal(int runtime, int driver, std::string const& release) {
  int const major = runtime / 1000;
  if (driver / 1000 >= major) return "";
  std::ostringstream message;
  message << "this build of cute_kernels (CUDA " << CudaVersion{runtime} << ") needs ";
  if (int const first = first_driver(major)) {
    message << "NVIDIA driver " << first << " or newer";
  } else {
    message << "an NVIDIA driver for CUDA " << major;
  }
  message << ", but ";
  if (driver == 0) {
    message << "there is no driver";
  } else if (release.empty()) {
    message << "the driver is for CUDA " << CudaVersion{driver};
  } else {
    message << "the driver is " << release << " (CUDA " << CudaVersion{driver} << ')';
  }
  return message.str();
}

}  // namespace cute_kernels::binding
