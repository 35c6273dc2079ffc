"""Stand-ins for the headers that softmax.hpp includes, of forward and of decode, on the host."""

STAND_INS = {
    "cute/tensor.hpp": """
#pragma once
#include <type_traits>
#include <cutlass/cutlass.h>
namespace cute {
template <int kMode, class Fragment>
constexpr std::integral_constant<int, kMode == 0 ? Fragment::kRows : Fragment::kColumns> size(
    Fragment const&) {
  return {};
}
}
""",
    "cute_kernels/sm90/math.hpp": """
#pragma once
#include <cutlass/cutlass.h>
namespace cute_kernels::sm90 {
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline float exp2_mufu(float x) {
  float const y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? 0.f : y;
}
}
""",
}
