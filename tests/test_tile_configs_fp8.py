"""Rows of forward kernels of 8 bits: what they become, and why others are refused."""

import json

import pytest
from tile_rows import good, table, write_sources

from cute_kernels.compile import table as generator

FP8_ROW = """
[[forward_fp8]]
name = "fp8"
dtypes = ["e4m3", "int8"]
head_dim = 128
tile_m = {tile_m}
tile_n = {tile_n}
linear_exp = {linear_exp}
overlap = {overlap}
moves_of_four = {moves_of_four}
any_call = {any_call}
promote_every = {promote_every}
why = "measured"
"""


def fp8_table(**changes):
    values = {"tile_m": 128, "tile_n": 128, "linear_exp": "false", "overlap": "true"}
    values |= {"any_call": "false", "promote_every": 0, "moves_of_four": 0}
    return table(good()) + FP8_ROW.format(**{**values, **changes})


def test_fp8_rows_become_kernels(tmp_path):
    rows = generator.read_table(fp8_table(linear_exp="true", overlap="false"))
    names = [row["name"] for row in rows if row["pass"] == "forward_fp8"]
    assert names == ["e4m3_fp8", "int8_fp8"]
    assert len(generator.select(rows, [128], ["bf16"])) == 3
    write_sources(rows, tmp_path)
    text = (tmp_path / "int8_fp8.cu").read_text()
    assert "using ElementQk = int8_t;" in text
    assert "static constexpr bool kLinearExp = true;" in text
    assert json.loads((tmp_path / "tile_configs.json").read_text()) == rows
    assert (tmp_path / "forward_fp8_table.cpp").read_text().count("::launch}") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_n": 96}, "multiple of 64"),
        ({"tile_n": 192, "linear_exp": "true"}, "linear_exp needs 8 more channels of V"),
        ({"linear_exp": "true"}, "linear_exp needs overlap = false"),
        ({"any_call": "true", "tile_n": 256}, "any_call needs tile_n of 64 or 128"),
        ({"promote_every": -1}, "promote_every = -1 must be 0 or more"),
        ({"promote_every": 1}, "promote_every = 1 needs overlap = false"),
        ({"tile_m": 256}, "registers of a consumer thread: 64 scores [+] 64 output"),
        ({"tile_m": 100}, "tile_m = 100"),
        ({"moves_of_four": 5}, "moves_of_four = 5 must be 0 to 4"),
    ],
)
def test_fp8_rows_that_cannot_fit_are_refused(change, message):
    with pytest.raises(generator.TableError, match=message):
        generator.read_table(fp8_table(**change))


CACHE_ROW = {
    "name": "cache",
    "dtypes": ["fp8"],
    "head_dim": 128,
    "tile_m": 32,
    "tile_n": 64,
    "stages": 11,
    "why": "measured",
}
MANY_ROWS = {"tile_m": 128, "stages": 3, "staged": 5}
MOST_ROWS = {"tile_m": 192, "stages": 3, "staged": 4, "consumer_warpgroups": 3, "least_rows": 129}


@pytest.mark.parametrize("change", [{}, MANY_ROWS, MOST_ROWS])
def test_rows_of_caches_become_kernels(tmp_path, change):
    rows = generator.read_table(table({**CACHE_ROW, **change}, of_pass="decode_fp8"))
    assert [row["name"] for row in rows] == ["fp8_cache"]
    write_sources(rows, tmp_path)
    text = (tmp_path / "fp8_cache.cu").read_text()
    assert f"kTileM = {rows[0]['tile_m']};" in text
    assert f"kConsumerWarpgroups = {rows[0]['consumer_warpgroups']};" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_m": 64}, "tile_m = 64 must be 32, 128 or 192"),
        ({"ctas": 2}, "ctas = 2 and consumer_warpgroups = 2 must be 1 and 2"),
        ({"consumer_warpgroups": 1}, "consumer_warpgroups = 1 must be"),
        ({"heads": 2}, "heads = 2 must be 1"),
        ({"stages": 3}, "stages = 3 must be at least 4: consumer warps take turns"),
        ({"stages": 12}, "shared memory"),
        ({"staged": 1}, "staged = 1 must be 0 with tile_m = 32"),
        ({**MANY_ROWS, "stages": 1}, "stages = 1 must be at least 2: consumer warpgroups"),
        ({**MANY_ROWS, "staged": 0}, "staged = 0 must be at least 1 with tile_m = 128"),
        ({**MANY_ROWS, "staged": 9}, "shared memory"),
        ({**MOST_ROWS, "stages": 2}, "stages = 2 must be at least 3: consumer warpgroups"),
        ({**MOST_ROWS, "tile_n": 96}, "a block must be one slot"),
        ({**MOST_ROWS, "consumer_warpgroups": 2}, "must be 1 and 3"),
        ({**MANY_ROWS, "head_dim": 256, "tile_n": 128}, "registers of a consumer thread"),
        ({"head_dim": 192}, "head_dim = 192 must be 64, 128 or 256"),
        ({"tile_n": 96, "stages": 5}, "tile_n = 96 must be 32, 64 or 128: the lanes of a warp"),
        (
            {"tile_m": 192, "tile_n": 96, "stages": 3, "staged": 1, "consumer_warpgroups": 3},
            r"tile_n = 96 with tile_m = 192: a block must be one slot",
        ),
    ],
)
def test_rows_of_caches_that_cannot_fit_are_refused(change, message):
    with pytest.raises(generator.TableError, match=message):
        generator.read_table(table({**CACHE_ROW, **change}, of_pass="decode_fp8"))
