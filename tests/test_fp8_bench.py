"""bench/fp8.py on small tensors on the CPU, with a clock that always says the same."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import fp8, measure, report, timing
from bench.cells import Cell, on_data
from bench.check import FP8, Reference
from bench.distributions import DISTRIBUTIONS, draw


@pytest.fixture
def no_gpu(monkeypatch):
    """Everything of bench.fp8 that needs a GPU or a peer, replaced."""

    class Called:
        def __init__(self, call, target_ms):
            call()

    def times(captured, rounds):
        return {name: timing.Spread(1.0, 0.9, 1.1, rounds) for name in captured}

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)  # even where it is installed
    monkeypatch.setattr(timing, "CapturedCall", Called)
    monkeypatch.setattr(timing, "interleaved_gpu_times", times)
    monkeypatch.setattr(measure, "random_inputs", lambda cell: draw(cell, "cpu"))
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
    assert "geometric mean of ours/fa3-fwd on N(0, 1): 2.000" in text
    assert "| D=64 causal | 2.00 |" in text
    assert "quantiser, D=64, TB/s: copy 2.00, rows 1.90" in text


def test_a_wrong_result_is_not_timed(no_gpu, monkeypatch):
    shape = {"dtype": "bf16", "mask": "full", "batch": 1, "heads": 2, "head_dim": 64}
    cell = Cell(seqlen=32, **shape)
    right = Reference(cell, *draw(cell, "cpu"), **FP8)
    for wrong in (torch.zeros(1, 32, 2, 64), torch.full((1, 32, 2, 64), torch.nan)):
        candidate = fp8.Candidate(lambda wrong=wrong: wrong, right)
        monkeypatch.setattr(fp8, "kernel_candidates", lambda *_, c=candidate: {fp8.OURS: c})
        results = fp8.time_cell(cell, fp8.parse([]))
        assert "tolerance" in results[fp8.OURS]["error"] and "tflops" not in results[fp8.OURS]


def test_right_on_all_data_however_far_quantised_tensors_are_from_others(no_gpu):
    shape = {"dtype": "bf16", "mask": "causal", "batch": 1, "heads": 2, "head_dim": 64}
    arguments = fp8.parse(["--data", "all"])
    assert fp8.parse([]).data == ["normal"]
    errors = {}
    for cell in on_data([Cell(seqlen=256, **shape)], DISTRIBUTIONS):
        results = fp8.time_cell(cell, arguments)
        assert all("tflops" in result for result in results.values()), (cell.data, results)
        errors[cell.data] = results[fp8.OURS]["relative_error"]
    assert 0.01 < errors["normal"] < 0.06
    assert errors["rising"] > 3 * errors["normal"]  # 8 bits do not hold such scores
