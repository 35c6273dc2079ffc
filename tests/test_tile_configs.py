"""From the table of tiles to the kernels of a build. Nothing here needs a GPU or a compiler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from configure import ROOT, failing_configure
from tile_rows import GOOD, good, refusal, table, write_sources

import cute_kernels
from cute_kernels.compile import passes, source
from cute_kernels.compile import table as generator
from cute_kernels.compile.decode import decode_shared_memory

PACKAGE = Path(cute_kernels.__file__).parent
TABLE = ROOT / "cute_kernels" / "attention" / "tile_configs.toml"


def test_a_row_becomes_one_kernel_per_dtype_with_defaults_filled_in():
    rows = generator.read_table(table(GOOD))
    assert [row["name"] for row in rows] == ["bf16_d128_m128n176", "fp16_d128_m128n176"]
    assert rows[0] == {
        "name": "bf16_d128_m128n176",
        "pass": "forward",
        "dtype": "bf16",
        "head_dim": 128,
        "head_dim_v": 128,
        "any_call": False,
        "grouped": False,
        "softcap": False,
        "mask": "any",
        "tile_m": 128,
        "tile_n": 176,
        "stages": 2,
        "consumer_warpgroups": 2,
        "pingpong": True,
        "overlap": True,
        "separate_output": False,
        "sum_in_pairs": False,
        "speed": 1.0,
        "overhead": 0,
        "why": "measured",
    }


def test_order_of_the_table_is_kept():
    rows = [good(name=name, dtypes=["fp16"]) for name in ("z", "a", "m")]
    names = [row["name"] for row in generator.read_table(table(*rows))]
    assert names == ["fp16_z", "fp16_a", "fp16_m"]


def test_every_wrong_row_is_named_at_once():
    message = refusal(good(name="first", tile_n=8), good(), good(name="third", mask="half"))
    assert "row first" in message
    assert "row third" in message


def test_names_are_unique():
    assert "row d128_m128n176: the name stands 2 times" in refusal(good(), good(tile_n=128))


def test_other_passes_and_broken_files_are_refused():
    with pytest.raises(generator.TableError, match="unknown table sideways"):
        generator.read_table("[[sideways]]\nname = 'x'\n")
    with pytest.raises(generator.TableError, match="not TOML"):
        generator.read_table("[[forward]\n")


def test_selection_by_head_dim_and_dtype():
    rows = generator.read_table(table(good(), good(name="d64", head_dim=64)))
    chosen = generator.select(rows, [64], ["bf16"])
    assert [row["name"] for row in chosen] == ["bf16_d64"]
    assert generator.select(rows, [], []) == rows
    with pytest.raises(generator.TableError, match="no row has head_dim 256"):
        generator.select(rows, [256], [])
    with pytest.raises(generator.TableError, match="'float' is none of bf16, fp16"):
        generator.select(rows, [], ["float"])


def test_the_sources_carry_every_constant_and_change_only_where_they_must(tmp_path):
    rows = generator.read_table(table(good(), good(name="d64", head_dim=64)))
    sources = write_sources(rows, tmp_path)
    assert [path.name for path in sources] == [
        *(f"{row['name']}.cu" for row in rows),
        "forward_table.cpp",
        "backward_table.cpp",
        "forward_fp8_table.cpp",
        "decode_table.cpp",
        "decode_fp8_table.cpp",
        "prefill_table.cpp",
        "latent_table.cpp",
    ]
    text = (tmp_path / "fp16_d128_m128n176.cu").read_text()
    assert "using Element = cutlass::half_t;" in text
    for constant, value in {
        "int kHeadDim": 128,
        "int kHeadDimV": 128,
        "int kTileN": 176,
        "int kStages": 2,
        "int kConsumerWarpgroups": 2,
        "bool kPingpong": "true",
        "bool kOverlap": "true",
        "bool kSeparateOutput": "false",
    }.items():
        assert f"static constexpr {constant} = {value};" in text
    assert json.loads((tmp_path / "tile_configs.json").read_text()) == rows

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    rows[0]["why"] = "measured again"
    write_sources(rows[:3], tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name for path in before if path not in after} == {"fp16_d64.cu"}
    changed = {path.name for path in after if after[path] != before[path]}
    assert changed == {"tile_configs.json", "forward_table.cpp"}  # no kernel is compiled again


@pytest.mark.parametrize(
    ("name", "headers"),
    [
        ("forward", ["forward/tile_traits.hpp", "forward/traits.hpp", "window/traits.hpp"]),
        ("forward_fp8", ["forward/tile_traits.hpp", "forward/fp8_traits.hpp"]),
        ("backward", ["backward/traits.hpp"]),
        ("decode", ["decode/traits.hpp"]),
        (
            "decode_fp8",
            [f"decode/{x}traits.hpp" for x in ("", "fp8_", "fp8_warps_", "fp8_wide_")],
        ),
        ("latent", ["latent/traits.hpp"]),
        ("prefill", ["forward/tile_traits.hpp", "forward/traits.hpp", "prefill/traits.hpp"]),
    ],
)
def test_traits_read_the_constants_that_the_generator_writes(name, headers):
    folder = ROOT / "cute_kernels" / "attention"
    traits = "".join((folder / header).read_text() for header in headers)
    written = {field.constant for field in source.constants(passes.PASSES[name])}
    # What the headers say themselves of all rows of the pass
    own = set(re.findall(r"static constexpr \w+ (k\w+)", traits.partition("PrefillTile :")[2]))
    assert set(re.findall(r"Tile::(k\w+)", traits)) - own == written - own


TWO_HEADS = {
    "name": "two",
    "dtypes": ["bf16"],
    "head_dim": 64,
    "tile_m": 128,
    "tile_n": 64,
    "stages": 6,
    "heads": 2,
    "why": "measured",
}


def test_a_row_of_two_heads_becomes_a_kernel():
    (row,) = generator.read_table(table(TWO_HEADS, of_pass="decode"))
    (of_one,) = generator.read_table(
        table({**TWO_HEADS, "heads": 1, "head_dim": 128}, of_pass="decode")
    )
    shared, of_wider = (decode_shared_memory(x) for x in (row, of_one))
    assert (shared["K"], shared["V"]) == (of_wider["K"], of_wider["V"])  # as of rows twice as long


@pytest.mark.parametrize("change", [{"heads": 3}, {"head_dim": 128, "stages": 2}, {"tile_m": 64}])
def test_rows_of_several_heads_that_cannot_be_are_refused(change):
    with pytest.raises(
        generator.TableError, match=r"heads = \d must be 1, or 2 with head_dim = 64"
    ):
        generator.read_table(table({**TWO_HEADS, **change}, of_pass="decode"))


def test_rows_of_a_cache_that_lanes_do_not_share_are_refused():
    with pytest.raises(generator.TableError, match="tile_n = 96 must be 32, 64 or 128"):
        generator.read_table(
            table({**TWO_HEADS, "heads": 1, "tile_n": 96, "stages": 3}, of_pass="decode")
        )


def test_the_projects_own_table_is_right_and_serves_every_call():
    rows = generator.read_table(TABLE.read_text())
    for dtype in passes.DTYPES:
        of_caches = [r for r in rows if (r["pass"], r["dtype"]) == ("decode", dtype)]
        of_any_call = [row for row in of_caches if row["heads"] == 1]
        assert {row["head_dim"] for row in of_any_call} == {64, 128, 256}
        for mask in ("full", "causal"):
            fitting = [
                row for row in rows if row["dtype"] == dtype and row.get("mask") in ("any", mask)
            ]
            assert {64, 128, 256} <= {row["head_dim"] for row in fitting}
        forward, backward = (
            {
                (row["head_dim"], row.get("head_dim_v", row["head_dim"]))
                for row in rows
                if row["pass"] == of_pass
                and row["dtype"] == dtype
                and row["any_call"]
                and not row["softcap"]
            }
            for of_pass in ("forward", "backward")
        )
        assert {(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)} <= forward
        assert backward == forward
    for dtype, head_dims in (
        ("int8", {(64, 64), (128, 128), (192, 128), (256, 256)}),
        ("e4m3", {(128, 128), (256, 256)}),
    ):
        of_any_call = {
            (row["head_dim"], row["head_dim_v"])
            for row in rows
            if row["pass"] == "forward_fp8" and row["dtype"] == dtype and row["any_call"]
        }
        assert of_any_call == head_dims


def test_tile_configs_are_copies_of_the_rows_built():
    built = cute_kernels.tile_configs("forward")
    assert built
    names = [row["name"] for row in built]
    assert len(set(names)) == len(names)
    fields = {"pass", "dtype", "consumer_warpgroups"} | {f.name for f in passes.FORWARD_FIELDS}
    assert set(built[0]) == fields - {"dtypes"}
    built[0]["tile_n"] = -1
    assert cute_kernels.tile_configs("forward")[0]["tile_n"] != -1


def run_generator(*arguments: str) -> subprocess.CompletedProcess:
    """As CMake does."""
    return subprocess.run(
        [sys.executable, "-m", "compile.generate", "--include", cute_kernels.get_include()]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )


def test_command_line(tmp_path):
    out = tmp_path / "out"
    done = run_generator(
        "--table", TABLE, "--out", out, "--head-dims", "64,128", "--dtypes", "bf16"
    )
    assert done.returncode == 0, done.stderr
    sources = [Path(source) for source in done.stdout.split(";")]
    assert all(source.exists() for source in sources)
    kinds = {"bf16_d64", "bf16_d12", "forward_", "backward"}
    assert kinds <= {source.name[:8] for source in sources}
    assert not any(name.startswith(("fp16", "e4m3")) for name in (s.name for s in sources))

    passes = ("--passes", "forward;forward_fp8")
    done = run_generator("--table", TABLE, "--out", out, "--dtypes", "bf16", *passes)
    assert {"e4m3_fp8", "int8_fp8"} < {Path(s).name[:8] for s in done.stdout.split(";")}

    done = run_generator("--table", TABLE, "--out", out, "--head-dims", "big")
    assert done.returncode == 1
    assert "CUTE_KERNELS_HEAD_DIMS" in done.stderr

    done = run_generator("--table", str(tmp_path / "none.toml"), "--out", out)
    assert done.returncode == 1
    assert "none.toml" in done.stderr
    assert "Traceback" not in done.stderr


def test_cmake_stops_with_the_arithmetic(tmp_path):
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(table(good(stages=3)))
    message = failing_configure(tmp_path / "build", CUTE_KERNELS_TILE_CONFIGS=wrong)
    assert "304128 > 232448 bytes" in message
