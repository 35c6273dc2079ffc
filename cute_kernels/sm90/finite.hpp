#pragma once

#include <cstdint>
#include <type_traits>

#include <cutlass/cutlass.h>
#include <cutlass/half.h>

// Which 16-bit floats are NaN or infinite: those whose exponent is all ones. Questions about bits,
// which no compiler option answers otherwise.
namespace cute_kernels::sm90 {

/// The bits of infinity, the least of all magnitudes that are not finite.
template <class Element>
inline constexpr uint32_t kInfinityBits =
    std::is_same_v<Element, cutlass::half_t> ? 0x7c00 : 0x7f80;

template <class Element>
CUTLASS_DEVICE bool is_finite(Element const& x) {
  return (reinterpret_cast<uint16_t const&>(x) & 0x7fffu) < kInfinityBits<Element>;
}

/// 0 times both of a pair, added to what came of other pairs: 0 if all have been finite.
template <class Element>
CUTLASS_DEVICE uint32_t probe_pair(uint32_t pair, uint32_t probe) {
  if constexpr (std::is_same_v<Element, cutlass::half_t>) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(probe) : "r"(pair), "r"(0));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(probe) : "r"(pair), "r"(0));
  }
  return probe;
}

/// Whether a thread's share of kElements elements in shared memory, every kThreads-th run of 16
/// bytes, is finite. `data` is a multiple of 16.
template <int kThreads, int kElements, class Element>
CUTLASS_DEVICE bool all_finite(Element const* data, int thread) {
  constexpr int kVectors = kElements / 8;
  uint32_t most = 0;  // of magnitudes, in both halves
#pragma unroll 2
  for (int i = thread; i < kVectors; i += kThreads) {
    uint4 const x = reinterpret_cast<uint4 const*>(data)[i];
    most = __vmaxu2(most, x.x & 0x7fff7fffu);
    most = __vmaxu2(most, x.y & 0x7fff7fffu);
    most = __vmaxu2(most, x.z & 0x7fff7fffu);
    most = __vmaxu2(most, x.w & 0x7fff7fffu);
  }
  return (most & 0xffffu) < kInfinityBits<Element> && most >> 16 < kInfinityBits<Element>;
}

/// Makes what is not finite in that share 0.
template <int kThreads, int kElements, class Element>
CUTLASS_DEVICE void clear_nonfinite(Element* data, int thread) {
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = thread; i < kElements / 2; i += kThreads) {
    uint32_t& pair = reinterpret_cast<uint32_t*>(data)[i];
    uint32_t const both = pair & 0x7fff7fffu;
    uint32_t const low = (both & 0xffffu) < kInfinityBits<Element> ? 0xffffu : 0u;
    uint32_t const high = both >> 16 < kInfinityBits<Element> ? 0xffff0000u : 0u;
    if ((low | high) != 0xffffffffu) pair &= low | high;
  }
}

}  // namespace cute_kernels::sm90
