#pragma once

#include <cutlass/cutlass.h>

namespace cute_kernels::attention {

/// A number and its derivatives: with respect to the score, and to some captured tensors. Compiling
/// a hook for it instead of float yields both (forward-mode differentiation).
template <int kCount>
struct Dual {
  float value;
  float slopes[kCount];

  /// A constant.
  CUTLASS_DEVICE Dual(float value) : value(value), slopes{} {}

  /// The variable number `index`.
  CUTLASS_DEVICE static Dual variable(float value, int index) {
    Dual result(value);
    result.slopes[index] = 1.f;
    return result;
  }

  /// A function of one number, of which value and derivative are known.
  CUTLASS_DEVICE Dual chain(float result, float derivative) const {
    Dual chained(result);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) chained.slopes[i] = slopes[i] * derivative;
    return chained;
  }

  CUTLASS_DEVICE friend Dual operator+(Dual a, Dual const& b) {
    a.value += b.value;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) a.slopes[i] += b.slopes[i];
    return a;
  }
  CUTLASS_DEVICE friend Dual operator*(Dual const& a, Dual const& b) {
    Dual product(a.value * b.value);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCount; ++i) {
      product.slopes[i] = a.slopes[i] * b.value + a.value * b.slopes[i];
    }
    return product;
  }

  // With constants, whose derivatives are not added up as zeros, which the compiler would have to.
  CUTLASS_DEVICE friend Dual operator+(Dual a, float b) {
    a.value += b;
    return a;
  }
  CUTLASS_DEVICE friend Dual operator*(Dual const& a, float b) { return a.chain(a.value * b, b); }

  CUTLASS_DEVICE friend Dual operator-(Dual const& a) { return a.chain(-a.value, -1.f); }
  CUTLASS_DEVICE friend Dual operator+(float a, Dual const& b) { return b + a; }
  CUTLASS_DEVICE friend Dual operator-(Dual const& a, Dual const& b) { return a + -b; }
  CUTLASS_DEVICE friend Dual operator-(Dual const& a, float b) { return a + -b; }
  CUTLASS_DEVICE friend Dual operator-(float a, Dual const& b) { return -b + a; }
  CUTLASS_DEVICE friend Dual operator*(float a, Dual const& b) { return b * a; }
  CUTLASS_DEVICE friend Dual operator/(Dual const& a, float b) {
    return a.chain(a.value / b, 1.f / b);
  }
  CUTLASS_DEVICE friend Dual operator/(float a, Dual const& b) {
    float const quotient = a / b.value;
    return b.chain(quotient, -quotient / b.value);
  }
  CUTLASS_DEVICE friend Dual operator/(Dual const& a, Dual const& b) {
    return a / b.value + (a.value / b - a.value / b.value);
  }

  template <class Other>
  CUTLASS_DEVICE Dual& operator+=(Other const& other) {
    return *this = *this + other;
  }
  template <class Other>
  CUTLASS_DEVICE Dual& operator-=(Other const& other) {
    return *this = *this - other;
  }
  template <class Other>
  CUTLASS_DEVICE Dual& operator*=(Other const& other) {
    return *this = *this * other;
  }
  template <class Other>
  CUTLASS_DEVICE Dual& operator/=(Other const& other) {
    return *this = *this / other;
  }

#define CUTE_KERNELS_COMPARE(op)                                                          \
  CUTLASS_DEVICE friend bool operator op(Dual const& a, Dual const& b) {                  \
    return a.value op b.value;                                                            \
  }                                                                                       \
  CUTLASS_DEVICE friend bool operator op(Dual const& a, float b) { return a.value op b; } \
  CUTLASS_DEVICE friend bool operator op(float a, Dual const& b) { return a op b.value; }
  CUTE_KERNELS_COMPARE(<)
  CUTE_KERNELS_COMPARE(>)
  CUTE_KERNELS_COMPARE(<=)
  CUTE_KERNELS_COMPARE(>=)
  CUTE_KERNELS_COMPARE(==)
  CUTE_KERNELS_COMPARE(!=)
#undef CUTE_KERNELS_COMPARE
};

}  // namespace cute_kernels::attention
