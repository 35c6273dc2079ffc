#include <cuda.h>
#include <cuda_runtime_api.h>

// CuTe encodes TMA descriptors by calling cuTensorMapEncodeTiled, a function of the driver
// (CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL). Linking libcuda would tie the import to a driver, and
// CUTLASS's other way looks the function up for every descriptor, four times a call. So this
// library has a function of that name, hidden from others, that looks the driver's up once.

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
  if (encode == nullptr) return CUDA_ERROR_NOT_FOUND;
  return encode(map, type, rank, address, sizes, strides, box, element_strides, interleave, swizzle,
                promotion, out_of_bounds);
}
