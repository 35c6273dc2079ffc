#include <sstream>
#include <stdexcept>

#include <cuda.h>
#include <cuda_runtime_api.h>

// CuTe encodes TMA descriptors by calling cuTensorMapEncodeTiled, a function of the driver
// (CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL). Linking libcuda would tie the import to a driver, and
// CUTLASS's other way looks the function up for every descriptor, four times a call. So the
// extension and every plug-in have a function of that name, hidden from others, that looks the
// driver's up once, and throws where the driver refuses: an exception of libstdc++, which they
// share.

extern "C" CUresult CUDAAPI cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    cuuint64_t const* sizes, cuuint64_t const* strides, cuuint32_t const* box,
    cuuint32_t const* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill out_of_bounds) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  CUresult const result =
      encode == nullptr ? CUDA_ERROR_NOT_FOUND
                        : encode(map, type, rank, address, sizes, strides, box, element_strides,
                                 interleave, swizzle, promotion, out_of_bounds);
  // CuTe would print it and launch the kernel all the same.
  if (result != CUDA_SUCCESS) {
    std::ostringstream message;
    message << "the driver refuses a TMA descriptor (cuTensorMapEncodeTiled: error " << result
            << "): rank " << rank << ", address " << address << ", sizes";
    for (cuuint32_t i = 0; i < rank; ++i) message << ' ' << sizes[i];
    message << ", strides in bytes";
    for (cuuint32_t i = 0; i + 1 < rank; ++i) message << ' ' << strides[i];
    throw std::runtime_error(message.str());
  }
  return result;
}
