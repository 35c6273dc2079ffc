#pragma once

#include <type_traits>

#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include "cute_kernels/attention/variant/arguments.hpp"
#include "cute_kernels/attention/variant/dual.hpp"
#include "cute_kernels/attention/variant/place.hpp"

namespace cute_kernels::attention {

/// An element, read through the cache of what nobody writes; of 16 bits as float.
template <class T>
CUTLASS_DEVICE auto read_captured(T const* element) {
  if constexpr (std::is_same_v<T, bool>) {
    return __ldg(reinterpret_cast<unsigned char const*>(element)) != 0;
  } else if constexpr (std::is_same_v<T, cutlass::bfloat16_t> ||
                       std::is_same_v<T, cutlass::half_t>) {
    return static_cast<float>(T::bitcast(__ldg(reinterpret_cast<unsigned short const*>(element))));
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return static_cast<int64_t>(__ldg(reinterpret_cast<long long const*>(element)));
  } else {
    return __ldg(element);
  }
}

/// How a hook reads a captured tensor: as what it holds.
struct Plain {
  static constexpr bool kHasSlope = false;
  template <class T>
  CUTLASS_DEVICE static auto read(T const* element) {
    return read_captured(element);
  }
};

/// As the variable of a derivative.
template <int kCount, int kIndex>
struct Variable {
  static constexpr bool kHasSlope = true;
  template <class T>
  CUTLASS_DEVICE static Dual<kCount> read(T const* element) {
    return Dual<kCount>::variable(static_cast<float>(read_captured(element)), kIndex);
  }
};

/// What is left of a captured tensor once its axes before kAxis are indexed.
template <class T, class Reading, int kAxis, Axis... kAxes>
class CapturedView;

template <class T, class Reading, int kAxis, Axis kFirst, Axis... kRest>
class CapturedView<T, Reading, kAxis, kFirst, kRest...> {
 public:
  CUTLASS_DEVICE CapturedView(T const* data, CapturedTensor const& tensor)
      : data_(data), tensor_(tensor) {}

  /// By what the axis counts: it is inside.
  CUTLASS_DEVICE auto operator[](Coordinate<kFirst> index) const { return at(index.value); }

  /// By anything else: the nearest index that there is.
  CUTLASS_DEVICE auto operator[](int index) const {
    static_assert(!Reading::kHasSlope,
                  "a captured tensor with a gradient is indexed by its own axes, in their order");
    return at(max(0, min(index, tensor_.sizes[kAxis] - 1)));
  }

 private:
  CUTLASS_DEVICE auto at(int index) const {
    T const* const part = data_ + static_cast<int64_t>(tensor_.strides[kAxis]) * index;
    if constexpr (sizeof...(kRest) == 0) {
      return Reading::read(part);
    } else {
      return CapturedView<T, Reading, kAxis + 1, kRest...>(part, tensor_);
    }
  }

  T const* data_;
  CapturedTensor const& tensor_;
};

/// A captured tensor, as hooks see it: a number, or what is indexed.
template <class T, class Reading, Axis... kAxes>
CUTLASS_DEVICE auto captured(CapturedTensor const& tensor) {
  auto const* const data = static_cast<T const*>(tensor.data);
  if constexpr (sizeof...(kAxes) == 0) {
    return Reading::read(data);
  } else {
    return CapturedView<T, Reading, 0, kAxes...>(data, tensor);
  }
}

}  // namespace cute_kernels::attention
