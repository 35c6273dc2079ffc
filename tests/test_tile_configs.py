"""From the table of tiles to the kernels of a build. Nothing here needs a GPU or a compiler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from configure import failing_configure

import cute_kernels
from cute_kernels.compile import passes, source
from cute_kernels.compile import table as generator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(cute_kernels.__file__).parent
TABLE = ROOT / "cute_kernels" / "attention" / "tile_configs.toml"

GOOD = {
    "name": "d128_m128n176",
    "dtypes": ["bf16", "fp16"],
    "head_dim": 128,
    "tile_m": 128,
    "tile_n": 176,
    "why": "measured",
}


def table(*rows: dict, of_pass: str = "forward") -> str:
    text = ""
    for row in rows:
        text += f"[[{of_pass}]]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in row.items())
    return text


def write_sources(rows: list[dict], out: Path) -> list[Path]:
    return source.write_sources(rows, out, Path(cute_kernels.get_include()))


def good(**changes) -> dict:
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


def refusal(*rows: dict) -> str:
    with pytest.raises(generator.TableError) as error:
        generator.read_table(table(*rows))
    return str(error.value)


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


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"stagse": 2}, ["row 1 (d128_m128n176)", "unknown field stagse", "stages"]),
        ({"tile_n": None}, ["tile_n is missing"]),
        ({"why": None}, ["why is missing"]),
        ({"why": " "}, ["why is empty"]),
        ({"stages": True}, ["stages is True, expected int"]),
        ({"pingpong": 1}, ["pingpong is 1, expected bool"]),
        ({"name": "D 128"}, ["'D 128' must be lower case"]),
        ({"dtypes": []}, ["at least one"]),
        ({"dtypes": ["bf16", "bf16"]}, ["once"]),
        ({"dtypes": ["fp8"]}, ["'fp8' is none of bf16, fp16"]),
        ({"mask": "window"}, ["'window' is none of any, full, causal"]),
        ({"head_dim": 80}, ["head_dim = 80 must be a multiple of 32"]),
        ({"head_dim_v": 80}, ["head_dim_v = 80 must be a multiple of 32"]),
        ({"softcap": True}, ["softcap needs any_call = true"]),
        ({"any_call": True, "mask": "causal"}, ["any_call needs mask = 'any', but it is 'causal'"]),
        ({"head_dim": 320}, ["head_dim = 320", "at most 256"]),
        ({"head_dim_v": 256}, ["head_dim_v = 256 > head_dim = 128", "separate_output"]),
        ({"tile_n": 136}, ["tile_n = 136 must be a multiple of 16", "K of P V"]),
        ({"tile_n": 272}, ["tile_n = 272", "at most 256"]),
        ({"tile_m": 96}, ["tile_m = 96 must be 64, 128, 192 or 256"]),
        ({"tile_m": 320}, ["tile_m = 320 must be 64, 128, 192 or 256"]),
        ({"tile_m": 64}, ["pingpong needs two or more", "has one"]),
        ({"stages": 0}, ["stages = 0"]),
        ({"speed": 0.0}, ["speed = 0.0 must be above 0"]),
        ({"speed": 1}, ["speed is 1, expected float"]),
        ({"overhead": -1}, ["overhead = -1", "at least 0"]),
    ],
)
def test_a_row_that_makes_no_kernel_is_refused(changes, reasons):
    message = refusal(good(**changes))
    for reason in reasons:
        assert reason in message


def test_one_consumer_warpgroup_without_pingpong_is_a_row():
    assert generator.read_table(table(good(tile_m=64, pingpong=False)))


def test_head_dims_of_half_a_swizzled_row_and_of_v_are_rows():
    (row, _) = generator.read_table(table(good(head_dim=96, head_dim_v=64, tile_n=128)))
    assert (row["head_dim"], row["head_dim_v"]) == (96, 64)


def test_v_and_the_output_have_their_own_head_dim():
    wide = {"head_dim": 192, "tile_n": 128, "separate_output": True}
    assert generator.read_table(table(good(**wide, head_dim_v=128)))
    message = refusal(good(**wide))
    assert "98304 K + 98304 V + 49152 Q + 24576 O + 1024 barriers = 271360 > 232448" in message
    message = refusal(good(head_dim=192, head_dim_v=128, tile_n=224, stages=1))
    assert "112 scores + 64 output + 56 packed P + 16 working = 248 > 240" in message


def test_shared_memory_is_refused_with_its_sum():
    # K and V: 3 stages of 176 * 128 elements of 2 bytes; Q: 128 * 128 of them
    message = refusal(good(stages=3))
    assert (
        "shared memory: 135168 K + 135168 V + 32768 Q + 1024 barriers = 304128 > 232448 bytes"
        in message
    )
    message = refusal(good(separate_output=True, tile_m=192, tile_n=160))
    assert "+ 49152 Q + 49152 O + 1024 barriers = 263168 > 232448 bytes" in message


def test_two_warpgroups_share_an_output_buffer_where_two_do_not_fit():
    assert generator.read_table(table(good(separate_output=True)))
    message = refusal(good(separate_output=True, tile_n=192))
    assert "+ 32768 Q + 16384 O + 1024 barriers = 246784 > 232448 bytes" in message


def test_four_warpgroups_share_no_output_buffer():
    """Turns of one parity would let the third pass beside the first."""
    changes = {"tile_m": 256, "tile_n": 32, "stages": 7, "separate_output": True}
    text = refusal(good(**changes))
    assert "shared memory" in text
    assert "65536 O" in text


def test_registers_are_refused_with_their_sum():
    # 64 * 256 scores and 64 * 128 outputs over 128 threads, the scores once more as packed halves
    message = refusal(good(tile_n=256, stages=1))
    assert (
        "registers of a consumer thread: 128 scores + 64 output + 64 packed P + 16 working = 272 "
        "> 240 with 2 consumer warpgroups" in message
    )
    # What fits two warpgroups need not fit three
    row = {"head_dim": 64, "tile_n": 176, "stages": 1}
    assert generator.read_table(table(good(**row)))
    assert "> 160 with 3 consumer warpgroups" in refusal(good(tile_m=192, **row))
    row = {"head_dim": 64, "tile_n": 96, "stages": 1}
    assert generator.read_table(table(good(tile_m=192, **row)))
    assert "> 112 with 4 consumer warpgroups" in refusal(good(tile_m=256, **row))


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
        ("forward", ["forward/tile_traits.hpp", "forward/traits.hpp"]),
        ("forward_fp8", ["forward/tile_traits.hpp", "forward/fp8_traits.hpp"]),
        ("backward", ["backward/traits.hpp"]),
        ("decode", ["decode/traits.hpp"]),
        ("decode_fp8", ["decode/traits.hpp", "decode/fp8_traits.hpp"]),
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


def test_the_projects_own_table_is_right_and_serves_every_call():
    rows = generator.read_table(TABLE.read_text())
    for dtype in passes.DTYPES:
        of_caches = [r for r in rows if (r["pass"], r["dtype"]) == ("decode", dtype)]
        assert {row["head_dim"] for row in of_caches} == {64, 128, 256}
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
promote = {promote}
why = "measured"
"""


def fp8_table(**changes):
    values = {"tile_m": 128, "tile_n": 128, "linear_exp": "false", "overlap": "true"}
    values |= {"any_call": "false", "promote": "false"}
    return table(good()) + FP8_ROW.format(**{**values, "moves_of_four": 0, **changes})


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
        ({"promote": "true"}, "promote needs overlap = false"),
        ({"tile_m": 256}, "registers of a consumer thread: 64 scores [+] 64 output"),
        ({"tile_m": 100}, "tile_m = 100"),
        ({"moves_of_four": 5}, "moves_of_four = 5 must be 0 to 4"),
    ],
)
def test_fp8_rows_that_cannot_fit_are_refused(change, message):
    with pytest.raises(generator.TableError, match=message):
        generator.read_table(fp8_table(**change))
