#pragma once

#include <cstdint>

#include "cute_kernels/attention/variant/dual.hpp"
#include "cute_kernels/sm90/math.hpp"

/// The functions that hooks may call, of numbers and of dual ones: unqualified names mean these,
/// not CUDA's of the same name.
namespace cute_kernels::attention::hook_math {

CUTLASS_DEVICE float exp2(float x) { return sm90::exp2_mufu(x); }
CUTLASS_DEVICE float exp(float x) { return sm90::exp2_mufu(x * sm90::kLog2e); }
CUTLASS_DEVICE float log2(float x) { return ::log2f(x); }
CUTLASS_DEVICE float log(float x) { return ::log2f(x) * sm90::kLn2; }
CUTLASS_DEVICE float sqrt(float x) { return ::sqrtf(x); }
CUTLASS_DEVICE float rsqrt(float x) { return ::rsqrtf(x); }
CUTLASS_DEVICE float sin(float x) { return ::sinf(x); }
CUTLASS_DEVICE float cos(float x) { return ::cosf(x); }
/// Off by 3e-7; tanhf of --use_fast_math would be off by 5e-4.
CUTLASS_DEVICE float tanh(float x) {
  return 1.f - 2.f * sm90::reciprocal_mufu(1.f + exp2(x * (2.f * sm90::kLog2e)));
}
CUTLASS_DEVICE float sigmoid(float x) { return sm90::reciprocal_mufu(1.f + exp(-x)); }
CUTLASS_DEVICE float abs(float x) { return ::fabsf(x); }
CUTLASS_DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
CUTLASS_DEVICE float min(float a, float b) { return ::fminf(a, b); }
CUTLASS_DEVICE int abs(int x) { return x < 0 ? -x : x; }
CUTLASS_DEVICE int max(int a, int b) { return a < b ? b : a; }
CUTLASS_DEVICE int min(int a, int b) { return b < a ? b : a; }

template <int kCount>
CUTLASS_DEVICE Dual<kCount> exp2(Dual<kCount> const& x) {
  float const result = exp2(x.value);
  return x.chain(result, result * sm90::kLn2);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> exp(Dual<kCount> const& x) {
  float const result = exp(x.value);
  return x.chain(result, result);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> log2(Dual<kCount> const& x) {
  return x.chain(log2(x.value), 1.f / (x.value * sm90::kLn2));
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> log(Dual<kCount> const& x) {
  return x.chain(log(x.value), 1.f / x.value);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> sqrt(Dual<kCount> const& x) {
  float const result = sqrt(x.value);
  return x.chain(result, 0.5f / result);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> rsqrt(Dual<kCount> const& x) {
  float const result = rsqrt(x.value);
  return x.chain(result, -0.5f * result / x.value);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> sin(Dual<kCount> const& x) {
  return x.chain(sin(x.value), cos(x.value));
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> cos(Dual<kCount> const& x) {
  return x.chain(cos(x.value), -sin(x.value));
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> tanh(Dual<kCount> const& x) {
  float const result = tanh(x.value);
  return x.chain(result, 1.f - result * result);
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> sigmoid(Dual<kCount> const& x) {
  float const result = sigmoid(x.value);
  return x.chain(result, result * (1.f - result));
}
template <int kCount>
CUTLASS_DEVICE Dual<kCount> abs(Dual<kCount> const& x) {
  return x.chain(abs(x.value), x.value < 0.f ? -1.f : 1.f);
}

#define CUTE_KERNELS_EXTREME(name, op)                                             \
  template <int kCount>                                                            \
  CUTLASS_DEVICE Dual<kCount> name(Dual<kCount> const& a, Dual<kCount> const& b) { \
    return a op b ? a : b;                                                         \
  }                                                                                \
  template <int kCount>                                                            \
  CUTLASS_DEVICE Dual<kCount> name(Dual<kCount> const& a, float b) {               \
    return a op b ? a : Dual<kCount>(b);                                           \
  }                                                                                \
  template <int kCount>                                                            \
  CUTLASS_DEVICE Dual<kCount> name(float a, Dual<kCount> const& b) {               \
    return name(b, a);                                                             \
  }
CUTE_KERNELS_EXTREME(max, >)
CUTE_KERNELS_EXTREME(min, <)
#undef CUTE_KERNELS_EXTREME

/// Evenly distributed numbers from 0 to below 1, the same for the same arguments: Philox 4x32 with
/// ten rounds (Salmon et al., SC 2011), of which four neighbouring keys share a result.
CUTLASS_DEVICE float uniform(int64_t seed, int64_t offset, int batch, int head, int query,
                             int key) {
  uint64_t const stream = static_cast<uint64_t>(seed) + offset * 0x9e3779b97f4a7c15u;
  uint32_t round_key[] = {static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  uint32_t counter[] = {static_cast<uint32_t>(key / 4), static_cast<uint32_t>(query),
                        static_cast<uint32_t>(head), static_cast<uint32_t>(batch)};
  CUTLASS_PRAGMA_UNROLL
  for (int round = 0; round < 10; ++round) {
    uint32_t const low[] = {0xd2511f53u * counter[0], 0xcd9e8d57u * counter[2]};
    uint32_t const high[] = {__umulhi(0xd2511f53u, counter[0]), __umulhi(0xcd9e8d57u, counter[2])};
    counter[0] = high[1] ^ counter[1] ^ round_key[0];
    counter[2] = high[0] ^ counter[3] ^ round_key[1];
    counter[1] = low[1];
    counter[3] = low[0];
    round_key[0] += 0x9e3779b9u;
    round_key[1] += 0xbb67ae85u;
  }
  int const which = key % 4;
  uint32_t const bits =
      which < 2 ? (which == 0 ? counter[0] : counter[1]) : (which == 2 ? counter[2] : counter[3]);
  return static_cast<float>(bits >> 8) * 0x1p-24f;
}

}  // namespace cute_kernels::attention::hook_math
