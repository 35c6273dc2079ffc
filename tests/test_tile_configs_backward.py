"""Rows of backward kernels: what they become, and why others are refused."""

import json

import pytest
from tile_rows import GOOD, good, table, write_sources

from cute_kernels.compile import table as generator

BACKWARD = {
    "name": "backward_d128",
    "dtypes": ["bf16", "fp16"],
    "head_dim": 128,
    "tile_m": 64,
    "tile_n": 128,
    "statistics_by_product": True,
    "why": "measured",
}


SPLIT_192_128 = {"head_dim": 192, "head_dim_v": 128, "tile_n": 64, "split_products": True}


def backward(**changes) -> str:
    return table(good()) + table({**BACKWARD, **changes}, of_pass="backward")


def test_backward_rows_become_kernels(tmp_path):
    rows = generator.read_table(backward())
    names = [row["name"] for row in rows if row["pass"] == "backward"]
    assert names == ["bf16_backward_d128", "fp16_backward_d128"]
    sources = write_sources(rows, tmp_path)
    text = (tmp_path / "fp16_backward_d128.cu").read_text()
    assert tmp_path / "fp16_backward_d128.cu" in sources
    assert "using Element = cutlass::half_t;" in text
    for constant, value in {"HeadDim": 128, "TileM": 64, "Stages": 2}.items():
        assert f"static constexpr int k{constant} = {value};" in text
    assert "return backward_workspace_bytes<Tile>(problem);" in text
    assert "return launch_backward<Tile>(problem, stream);" in text
    kernels = (tmp_path / "backward_table.cpp").read_text()
    assert "KernelTable<BackwardKernel> backward_kernels{kBuilt, 2};" in kernels
    assert json.loads((tmp_path / "tile_configs.json").read_text()) == rows


def test_blocks_of_keys_in_registers_are_whole_rows_of_their_swizzle():
    """At 192 channels a slice of dQ has 48, and K rows of 16."""
    split = {"head_dim": 192, "tile_n": 64, "split_products": True}
    assert generator.read_table(backward(**split, key_blocks_in_registers=6))


def test_a_table_without_backward_rows_has_an_empty_one(tmp_path):
    write_sources(generator.read_table(table(good())), tmp_path)
    kernels = (tmp_path / "backward_table.cpp").read_text()
    assert "backward_kernels{nullptr, 0};" in kernels


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pingpong": True}, "unknown field pingpong"),
        ({"tile_m": 80}, "tile_m = 80 must be 64, 128"),
        ({"tile_m": 192, "head_dim": 64}, "tile_m = 192 must be 64 or 128 with head_dim = 64"),
        (
            {"tile_m": 128, "tile_n": 64, "split_products": True},
            "tile_m = 128 must be 64 or 256 with head_dim = 128: dQ is split over 4 warpgroups",
        ),
        (
            {"head_dim": 96, "tile_n": 64, "split_products": True},
            "head_dim = 96 must be a multiple of 64 with tile_m = 64: dQ's channels are split over "
            "4 warpgroups, in swizzled rows of 16",
        ),
        (
            {"tile_n": 192},
            "tile_n = 192 must be 128, 64 keys for each of 2 warpgroups, or 64 with split_products",
        ),
        ({"tile_n": 64}, "tile_n = 64 must be 128, 64 keys for each"),
        ({"split_products": True}, "warpgroups, or 64 with split_products, which they share"),
        (
            {"tile_n": 64, "split_products": True, "statistics_by_product": False},
            "split_products needs statistics_by_product",
        ),
        (
            {"tile_n": 64, "split_products": True, "scores_behind_dk": True},
            "scores_behind_dk needs split_products = false",
        ),
        ({"mask": "window"}, "'window' is none of any, full, causal"),
        ({"stages": 1}, "stages = 1 must be at least 2"),
        ({"consumer_warpgroups": 3}, "consumer_warpgroups = 3 must be 2: of the four warps"),
        ({"name": GOOD["name"]}, "the name stands 2 times"),
        (
            {"tile_m": 128, "statistics_by_product": False},
            "registers of a consumer thread: 128 scores and dP, then dQ + 64 dK + 64 dV + 16 "
            "working = 272 > 240",
        ),
        ({"stages": 4}, "shared memory: 32768 K + 32768 V + 65536 Q + 65536 dO"),
        ({"key_blocks_in_registers": -1}, "key_blocks_in_registers = -1 must be 0 or divide 8"),
        ({"key_blocks_in_registers": 3}, "key_blocks_in_registers = 3 must be 0 or divide 8"),
        ({"key_blocks_in_registers": 16}, "key_blocks_in_registers = 16 must be 0 or divide 8"),
        ({"value_blocks_in_registers": 3}, "value_blocks_in_registers = 3 must be 0 or divide 8"),
        (
            {**SPLIT_192_128, "value_blocks_in_registers": 12},
            "value_blocks_in_registers = 12 must be 0 or divide 8, the blocks of 16 channels that "
            "head_dim_v = 128 has",
        ),
        (
            {"head_dim": 192, "tile_n": 64, "split_products": True, "value_blocks_in_registers": 6},
            "value_blocks_in_registers = 6 must divide 4, the blocks of 16 channels of a swizzled "
            "row, or be a multiple of it",
        ),
        (
            {"head_dim": 96, "value_blocks_in_registers": 3},
            "value_blocks_in_registers = 3 must divide 2, the blocks of 16",
        ),
        (
            {"head_dim": 64, "tile_m": 256, "tile_n": 64, "split_products": True, "any_call": True},
            "any_call needs tile_m of up to 128, but it is 256",
        ),
        ({"scores_ahead": True}, "scores_ahead needs split_products = true, softcap = false"),
        ({**SPLIT_192_128, "stages": 4}, "24576 K + 16384 V + 98304 Q + 65536 dO + 16384 dS"),
        ({"head_dim_v": 80}, "head_dim_v = 80 must be a multiple of 32"),
        (
            {"key_blocks_in_registers": 8},
            "64 scores and dP, then dQ + 32 keys + 8 ones + 64 dK + 64 dV + 16 working = 248 > 240",
        ),
    ],
)
def test_backward_rows_that_make_no_kernel_are_refused(changes, reason):
    with pytest.raises(generator.TableError) as error:
        generator.read_table(backward(**changes))
    assert reason in str(error.value)
