"""bench/fp8.py on small tensors on the CPU, with a clock that always says the same."""

import sys
from pathlib import Path

import pytest
import torch
from parity import random_qkv

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import fp8, measure, report, timing
from bench.cells import Cell


@pytest.fixture
def no_gpu(monkeypatch):
    """Everything of bench.fp8 that needs a GPU or a peer, replaced."""

    class Called:
        def __init__(self, call, target_ms):
            call()

    def times(captured, rounds):
        return {name: timing.Spread(1.0, 0.9, 1.1, rounds) for name in captured}

    def inputs(cell):
        return random_qkv(
            "cpu",
            torch.bfloat16,
            cell.batch,
            cell.seqlen,
            cell.seqlen,
            cell.heads,
            None,
            cell.head_dim,
        )

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)  # even where it is installed
    monkeypatch.setattr(timing, "CapturedCall", Called)
    monkeypatch.setattr(timing, "interleaved_gpu_times", times)
    monkeypatch.setattr(measure, "random_inputs", inputs)
    monkeypatch.setattr(fp8, "WHOLE_FROM", 64)
    monkeypatch.setattr(fp8, "BF16_PEERS", ())


def test_cells_and_summary(no_gpu):
    arguments = fp8.parse(["--rounds", "3"])
    shape = {"dtype": "bf16", "mask": "causal", "batch": 1, "heads": 2, "head_dim": 64}
    cells = [Cell(seqlen=seqlen, **shape) for seqlen in (32, 64)]
    entries = [{**cell.as_dict(), "results": fp8.time_cell(cell, arguments)} for cell in cells]
    assert set(entries[0]["results"]) == {fp8.OURS, fp8.OTHER}
    assert set(entries[1]["results"]) == {fp8.OURS, fp8.OTHER, fp8.WHOLE, "ours:bf16"}
    for entry in entries:
        assert all("error" not in result for result in entry["results"].values())
        rmse = {name: result["rmse"] for name, result in entry["results"].items()}
        assert rmse[fp8.OURS] < rmse[fp8.OTHER]  # int8 is the default
        entry["results"][fp8.PEER] = {"tflops": report.tflops(entry, fp8.OURS) / 2}
    data = {
        "machine": {"gpu": "none", "torch": "2", "cublas_fp8_tflops": 1400.0},
        "qk_dtype": "int8",
        "providers": {},
        "cells": entries,
        "quantiser_tb_s": {"64": {"copy": 2.0, "rows": 1.9}},
    }
    text = fp8.summary(data)
    assert "geometric mean of ours/fa3-fwd: 2.000" in text
    assert "quantiser, D=64, TB/s: copy 2.00, rows 1.90" in text


def test_a_wrong_result_is_not_timed(no_gpu, monkeypatch):
    wrong = {fp8.OURS: lambda: torch.zeros(1, 32, 2, 64)}
    monkeypatch.setattr(fp8, "kernel_calls", lambda *_: wrong)
    shape = {"dtype": "bf16", "mask": "full", "batch": 1, "heads": 2, "head_dim": 64}
    results = fp8.time_cell(Cell(seqlen=32, **shape), fp8.parse([]))
    assert "RMSE" in results[fp8.OURS]["error"] and "tflops" not in results[fp8.OURS]
