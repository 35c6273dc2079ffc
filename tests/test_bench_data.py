"""Data as an axis of the benchmarks: options, records, tables."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_bench import ROOT, entry, forward_data  # which also finds bench/

from bench import (
    backward,
    cells,
    comparison,
    fa3_library,
    forward,
    measure,
    plot,
    readme_table,
    report,
    session,
)
from bench.cells import Cell
from bench.distributions import DISTRIBUTIONS, chosen, draw
from bench.timing import Spread


def data_with_an_axis():
    """forward_data's first two problems on other data; ours fails on one of them."""
    data = forward_data()
    more = [
        entry(300.0, sdpa_cudnn=500.0) | {"data": "sd6"},
        entry(550.0, sdpa_cudnn=500.0) | {"data": "channels"},
        entry(None, sdpa_cudnn=500.0) | {"data": "rising"},
        entry(450.0, mask="causal", sdpa_cudnn=500.0) | {"data": "sd6"},
        entry(50.0, mask="causal", sdpa_cudnn=500.0) | {"data": "rising"},
        entry(450.0, mask="causal", sdpa_cudnn=None) | {"data": "falling"},
    ]
    return data | {"cells": [*data["cells"], *more]}


def test_lowest_ratio_by_data():
    data = data_with_an_axis()
    peers = report.peers_of(data)
    assert report.ratio_means(data) == report.ratio_means(forward_data())  # of N(0, 1) alone
    assert report.lowest_rows(data, peers) == (
        ["lowest of any length", "normal", "sd6", "channels", "rising", "falling"],
        [
            ["D=128 full", "1.20", "0.60", "1.10", "failed", "-"],
            ["D=128 causal", "0.80", "0.90", "-", "0.10", "-"],
        ],
    )
    value, worst = report.lowest(report.other_data(data["cells"])["other data"], peers)
    assert (value, worst["data"]) == (0.6, "sd6")
    assert report.lowest([], peers) is None
    _, rows = report.cell_rows(data)
    assert rows[3] == ["D=128 full S=2048 sd6", "300", "500", "0.60"]
    assert "ours [D=128 full S=2048 rising]: RuntimeError: no" in report.failures(data)


def test_pages_say_the_worst_beside_the_mean_where_there_is_data(tmp_path):
    path = tmp_path / "forward_bf16.json"
    path.write_text(json.dumps(forward_data()))
    plain = readme_table.cells_block([path], tmp_path)
    assert "lowest" not in plain.lower()
    path.write_text(json.dumps(data_with_an_axis()))
    block = readme_table.cells_block([path], tmp_path)
    means = next(line for line in plain.splitlines() if line.startswith("Geometric mean"))
    assert means in block.splitlines()
    assert (
        "Lowest ours / best peer of any cell: on N(0, 1) 0.80 D=128 causal S=2048, "
        "on other data 0.60 D=128 full S=2048 sd6, "
        "on adversarial data failed D=128 full S=2048 rising."
    ) in block
    assert "| D=128 causal | 0.80 | 0.90 | - | 0.10 | - |" in block
    assert "| D=128 full S=2048 | 600 | 500 | 1.20 | 0.60 sd6 | failed rising |" in block
    assert "| D=128 causal S=4096 | 500 | - | - | - | - |" in block
    header, _, line, *_ = readme_table.means_block([path]).splitlines()
    assert header.endswith("| lowest cell | lowest on other data | lowest on adversarial data |")
    assert line.endswith("| 1.20 | 0.80 | 0.98 | 0.80 | 0.60 | failed |")
    only_other = data_with_an_axis()
    only_other["cells"] = only_other["cells"][3:]
    path.write_text(json.dumps(only_other))
    block = readme_table.cells_block([path], tmp_path)
    assert "| D=128 full S=2048 | - | - | - | 0.60 sd6 | failed rising |" in block


def test_recorded_results_read_as_before():
    """Where they have no word of data, it is N(0, 1)."""
    for path in (ROOT / "bench" / "results").glob("forward*.json"):
        cells = report.load(path)["cells"]
        without = [cell for cell in cells if "data" not in cell]
        assert report.normal_cells({"cells": cells}) == without and without
        assert bool(report.other_data(cells)) is (len(without) < len(cells))


@pytest.mark.parametrize("script", [forward, backward])
def test_data_option(script, capsys):
    assert script.parse([]).data == ["normal"]
    assert chosen(script.parse(["--data", "sd6", "spike"]).data) == ["sd6", "spike"]
    assert chosen(script.parse(["--data", "all"]).data) == list(DISTRIBUTIONS)
    with pytest.raises(SystemExit):
        script.parse(["--data", "uniform"])
    assert "invalid choice: 'uniform'" in capsys.readouterr().err


def test_a_run_over_data(monkeypatch, tmp_path, capsys):
    """bench.forward on the CPU, with a clock that always says the same."""

    class Called:
        calls, how = 1, "no graph"

        def __init__(self, call, target_ms):
            call()

    def times(captured, rounds):
        return {name: Spread(1.0, 0.9, 1.1, rounds) for name in captured}

    monkeypatch.delenv(fa3_library.VARIABLE, raising=False)
    monkeypatch.setattr(cells, "PAPER_TOKENS", 192)
    monkeypatch.setattr(cells, "PAPER_HIDDEN", 128)
    monkeypatch.setattr(session, "_machine", lambda: {"gpu": "none", "torch": "2", "cuda": "13"})
    monkeypatch.setattr(measure, "time_cublas", lambda query: {"tflops": 1.0})
    monkeypatch.setattr(measure, "interleaved_gpu_times", times)
    monkeypatch.setattr(measure, "draw", partial(draw, device="cpu"))
    monkeypatch.setattr(measure, "FORWARD", replace(measure.FORWARD, repeated=Called))
    options = "--head-dims 64 --seqlens 96 --peers sdpa-flash fa3-xformers --host-batches 0"
    more = ["--data", "normal", "sd6", "rising", "--commit", "abc", "--out", str(tmp_path)]
    data = forward.run(forward.parse([*options.split(), *more]))
    path = tmp_path / "forward_bf16.json"
    assert report.load(path)["cells"] == data["cells"]
    assert [entry.get("data") for entry in data["cells"]] == [None, "sd6", "rising"] * 2
    for cell in data["cells"]:
        assert {"ours", "sdpa-flash"} == set(cell["results"])
        for result in cell["results"].values():
            assert 0 < result["max_error"] < result["tolerance"] and result["tflops"] > 0
    assert not comparison.failed(data)
    assert "xformers==0.0.34" in data["providers"]["fa3-xformers"]["missing"]
    comparison.print_summary(data)
    printed = capsys.readouterr().out
    assert "lowest of any length  normal   sd6  rising" in printed
    assert "D=64 causal             1.00  1.00    1.00" in printed
    block = readme_table.cells_block([path], tmp_path)
    assert "on adversarial data 1.00 D=64 full S=96 rising." in block


@pytest.mark.parametrize("data", ["normal", "sd6"])
def test_gradients_inputs_are_those_of_the_data(monkeypatch, data):
    monkeypatch.setattr(measure, "draw", partial(draw, device="cpu"))
    cell = Cell(dtype="bf16", mask="full", batch=1, seqlen=64, heads=2, head_dim=64, data=data)
    *qkv, grad = measure.random_inputs_and_gradient(cell)
    assert all(map(torch.equal, qkv, draw(cell, "cpu")))
    assert grad.std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(grad, qkv[0])


def test_plot_is_of_the_normal_cells():
    pytest.importorskip("matplotlib")
    bars = [
        [len(axes.patches) for axes in plot.draw(data).axes]
        for data in (forward_data(), data_with_an_axis())
    ]
    assert bars[0] == bars[1] and sum(bars[0])
