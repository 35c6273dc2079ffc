"""Rows for a table of tiles, its text, the kernels of it or what it is refused with."""

import json
from pathlib import Path

import pytest

import cute_kernels
from cute_kernels.compile import source
from cute_kernels.compile import table as generator

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
