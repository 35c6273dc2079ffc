#pragma once

namespace cutlass {

template <class T, int kCount>
struct Array {
  T elements[kCount];
  T operator[](int i) const { return elements[i]; }
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) AlignedArray {
  T elements[kCount];
  T& operator[](int i) { return elements[i]; }
  T operator[](int i) const { return elements[i]; }  // no reference: CUTLASS packs 16 bits
  void clear() { *this = {}; }
};

}  // namespace cutlass
