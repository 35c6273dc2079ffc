#pragma once

#include <iostream>
#include <memory>
#include <utility>
#include <vector>

#include "cute_kernels/attention/schedule/work_list.hpp"

// For programs of tests: what one CTA does on the GPU, on the host, one thread after the other.
namespace cute_kernels::attention {

template <class Builder, int... kPhases>
void run_phases(Builder builder, std::integer_sequence<int, kPhases...>) {
  auto phase = [&](auto number) {
    for (int thread = 0; thread < Builder::kThreads; ++thread) {
      builder.template phase<number()>(thread);
    }
  };
  (phase(std::integral_constant<int, kPhases>{}), ...);
}

/// The tiles of a call of so many sequences, with memory for `most` of them.
template <class Builder>
struct HostWorkList {
  std::unique_ptr<WorkTile[]> memory;
  WorkList list;

  template <class Call>
  HostWorkList(Call const& call, int batch, int64_t most)
      : memory(new WorkTile[work_list_bytes(batch, most) / sizeof(WorkTile) + 1]),
        list(work_list_at(memory.get(), batch, most)) {
    typename Builder::Shared shared;
    run_phases(Builder(call, list, shared), std::make_integer_sequence<int, Builder::kPhases>());
  }
};

/// Numbers from standard input, behind how many they are.
inline std::vector<int> read_numbers() {
  int count;
  std::cin >> count;
  std::vector<int> values(count);
  for (int& value : values) std::cin >> value;
  return values;
}

}  // namespace cute_kernels::attention
