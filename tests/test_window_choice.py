"""Which rows of the table calls with short windows get, by the estimate in C++. No GPU."""

import subprocess

import pytest
from compilers import compile_program
from test_tile_configs import TABLE

from cute_kernels.compile import source
from cute_kernels.compile import table as generator
from cute_kernels.compile.passes import PASSES

ANY, DENSE = "d64_any_m256n64", "d64_m128n128"
WIDE, DEEP = "d64_window_m256n136", "d64_window_m192n144"
# batch, tokens, query heads, key heads, window, whether packed: the row
CASES = {
    (4, 8192, 64, 8, 128, True): WIDE,  # gpt-oss's
    (4, 8192, 64, 8, 128, False): WIDE,
    (1, 512, 64, 8, 128, False): WIDE,
    (1, 131072, 64, 8, 128, True): WIDE,
    (4, 8192, 64, 8, 129, True): WIDE,
    (4, 8192, 64, 8, 130, True): DEEP,
    (4, 8192, 64, 8, 137, True): DEEP,
    (4, 8192, 64, 8, 138, True): ANY,
    (4, 8192, 64, 4, 128, True): WIDE,
    (4, 8192, 64, 1, 129, True): WIDE,
    (4, 8192, 64, 16, 121, True): WIDE,
    (4, 8192, 64, 16, 128, True): DEEP,
    (4, 8192, 64, 16, 129, True): DEEP,
    (4, 8192, 64, 16, 130, True): ANY,
    (4, 8192, 64, 32, 64, True): ANY,  # groups of two
    (4, 8192, 64, 8, 1, True): WIDE,
    (256, 140, 64, 8, 128, True): WIDE,
    (256, 64, 64, 8, 128, True): WIDE,
    (1, 128, 64, 8, 128, False): DENSE,  # nothing is hidden
}
MAIN = r"""
#include <cstdio>
#include "cute_kernels/attention/tile_config.hpp"

namespace cute_kernels::attention {
ForwardKernel const kForward[] = {%s};
KernelTable<ForwardKernel> forward_kernels{kForward, std::size(kForward)};
KernelTable<BackwardKernel> backward_kernels{nullptr, 0};
}  // namespace cute_kernels::attention

using namespace cute_kernels::attention;

int main() {
  int batch, tokens, heads_q, heads_kv, window, packed;
  while (std::scanf("%%d %%d %%d %%d %%d %%d", &batch, &tokens, &heads_q, &heads_kv, &window,
                    &packed) == 6) {
    AttentionCall call{{batch, tokens, tokens, heads_q, heads_kv, 64, 64},
                       {std::nullopt, window - 1, 0}, 1.f};
    int const starts[] = {0};  // only asked whether it is there
    if (packed) {
      call.packed = {starts, starts, nullptr, nullptr, nullptr, batch * tokens, batch * tokens};
    }
    std::printf("%%s\n", choose_forward(ElementType::kBFloat16, call, 132)->config.name);
  }
}
"""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    pass_ = PASSES["forward"]
    rows = [
        row
        for row in generator.read_table(TABLE.read_text())
        if row["pass"] == "forward" and row["dtype"] == "bf16" and row["head_dim"] == 64
    ]
    configs = [source.kernel_entry(row, pass_).partition("}")[0] for row in rows]
    kernels = ", ".join(f"{config}}}, nullptr, nullptr}}" for config in configs)
    program = compile_program(MAIN % kernels, tmp_path_factory.mktemp("choice"))
    words = "\n".join(" ".join(str(int(x)) for x in case) for case in CASES)
    said = subprocess.run([program], input=words, capture_output=True, text=True, check=True)
    names = [line.removeprefix("bf16_") for line in said.stdout.splitlines()]
    return dict(zip(CASES, names, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_rows_of_short_windows_where_they_fit(chosen, case):
    assert chosen[case] == CASES[case]
