"""The benchmarks' own arithmetic: counts, ratios, tables. Nothing here needs a GPU."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # bench/ is no part of the installed package

from bench import ablation, plot, power, providers, readme_table, report, search  # noqa: E402
from bench.cells import (  # noqa: E402
    BackwardCell,
    Cell,
    latency_grid,
    llama_grid,
    paper_cell,
    paper_grid,
)
from bench.check import Reference  # noqa: E402
from bench.check_backward import GradientReference  # noqa: E402
from bench.timing import Spread, turns  # noqa: E402
from cute_kernels import Tuned  # noqa: E402


def entry(ours, head_dim=128, mask="full", seqlen=2048, **peers):
    results = {"ours": ours, **{name.replace("_", "-"): speed for name, speed in peers.items()}}
    return {
        "head_dim": head_dim,
        "mask": mask,
        "seqlen": seqlen,
        "batch": 8,
        "results": {
            name: {"error": "RuntimeError: no"} if speed is None else {"tflops": speed}
            for name, speed in results.items()
        },
    }


def test_flops_of_the_papers_own_example():
    full = Cell(dtype="bf16", mask="full", batch=4, seqlen=8448, heads=16, head_dim=128)
    causal = Cell(dtype="bf16", mask="causal", batch=4, seqlen=8448, heads=16, head_dim=128)
    assert full.flops == 4 * 4 * 16 * 8448**2 * 128
    assert causal.flops * 2 == full.flops
    # FlashAttention-3's paper: 3.538 ms is 661 TFLOP/s
    assert full.tflops(3.538) == pytest.approx(661, abs=1)


def test_paper_grid_keeps_tokens_and_hidden_size():
    grid = paper_grid("bf16")
    assert len(grid) == 36 == len(set(grid))
    assert {cell.batch * cell.seqlen for cell in grid} == {16384}
    assert {cell.heads * cell.head_dim for cell in grid} == {2048}


def test_flops_of_chunked_prefill_count_what_the_mask_shows():
    shape = {"dtype": "bf16", "batch": 1, "seqlen": 512, "seqlen_k": 32768, "heads": 64}
    full = Cell(mask="full", heads_kv=8, head_dim=128, **shape)
    causal = Cell(mask="causal", heads_kv=8, head_dim=128, **shape)
    assert full.flops == 4 * 64 * 128 * 512 * 32768
    assert causal.flops == 4 * 64 * 128 * (512 * 32768 - 512 * 512 // 2)
    assert str(causal) == "bf16 D=128 causal S=512 on 32768 keys 64/8 heads"


def test_other_grids_are_what_they_say():
    latency = latency_grid("bf16", [64, 128], ["full"])
    assert len(latency) == 10 == len(set(latency))
    assert {(cell.batch, cell.heads) for cell in latency} == {(1, 16)}
    llama = llama_grid("bf16", ["full", "causal"])
    assert len(llama) == 14 == len(set(map(str, llama)))
    assert {(cell.heads, cell.heads_kv, cell.head_dim) for cell in llama} == {(64, 8, 128)}
    assert [c.seqlen for c in llama if c.seqlen_k != c.seqlen] == [512, 2048, 512, 2048]


def test_backward_counts_five_products():
    grid = paper_grid("bf16", [128], ["causal"], [1024], BackwardCell)
    (forward,) = paper_grid("bf16", [128], ["causal"], [1024])
    assert [cell.flops * 2 for cell in grid] == [forward.flops * 5]
    assert grid[0].as_dict() == {**forward.as_dict(), "flops": grid[0].flops}


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_gradient_reference_tells_right_from_wrong(mask):
    """Two providers that run on the CPU, through autograd as they are timed."""
    shape = {"dtype": "bf16", "batch": 2, "seqlen": 40, "heads": 4, "head_dim": 16}
    cell = BackwardCell(mask=mask, heads_kv=2, **shape)
    sizes = [(2, 40, heads, 16) for heads in (4, 2, 2, 4)]
    inputs = [torch.randn(size, dtype=torch.bfloat16) for size in sizes]
    reference = GradientReference(cell, *inputs)
    for forward in (providers.ours(), providers.PEERS["sdpa-flash"]()):
        provider = providers.training_step_of(forward)
        assert provider.name == forward.name
        with provider.context():
            grads = provider.output(provider.bind(cell, *inputs)())
        assert [grad.shape for grad in grads] == [x.shape for x in inputs[:3]]
        assert reference.error(grads) <= reference.tolerance
        assert 0 < reference.rmse(grads) < 0.02
        for index in range(3):
            wrong = [grad.clone() for grad in grads]
            wrong[index][-1, 3, -1, 3] += 1.0
            assert reference.error(wrong) > reference.tolerance
            wrong[index][0, 0, 0, 0] = math.nan
            assert reference.error(wrong) == math.inf


def test_spread():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 1)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_ratio_is_to_the_fastest_peer_that_was_timed():
    peers = ["sdpa-cudnn", "fa3-fwd", "fa4"]
    cell = entry(600.0, sdpa_cudnn=500.0, fa3_fwd=None)
    assert report.best_peer(cell, peers) == ("sdpa-cudnn", 500.0)
    assert report.ratio(cell, peers) == pytest.approx(1.2)
    assert report.ratio(entry(None, sdpa_cudnn=500.0), peers) is None
    assert report.ratio(entry(600.0, fa3_fwd=None), peers) is None


def forward_data():
    return {
        "kind": "forward",
        "commit": "abc",
        "date": "today",
        "machine": {
            "gpu": "NVIDIA H100 80GB",
            "torch": "2",
            "cuda": "13",
            "cublas_bf16": {"tflops": 790.0},
        },
        "settings": {"dtype": "bf16"},
        "providers": {
            "ours": {"label": "cute_kernels"},
            "ours:row": {"label": "row"},
            "sdpa-cudnn": {"label": "SDPA cuDNN"},
            "fa4": {"label": "fa4", "missing": "not installed"},
        },
        "cells": [
            entry(600.0, sdpa_cudnn=500.0),
            entry(400.0, mask="causal", sdpa_cudnn=500.0),
            entry(500.0, mask="causal", seqlen=4096, sdpa_cudnn=None),
        ],
        "host": {"results": {"sdpa-cudnn": {"median_us": 30.0}, "ours": {"median_us": 20.0}}},
    }


def test_forward_report():
    data = forward_data()
    header, rows = report.cell_rows(data)
    assert header == ["cell", "ours", "sdpa-cudnn", "ours/best"]
    assert rows[0] == ["D=128 full S=2048", "600", "500", "1.20"]
    assert rows[2] == ["D=128 causal S=4096", "500", "failed", "-"]
    means = dict(report.ratio_means(data))
    assert means["D=128 causal"] == pytest.approx(0.8)
    assert means["all"] == pytest.approx(math.sqrt(1.2 * 0.8))
    assert report.host_row(data) == (["ours", "sdpa-cudnn"], [["20.0", "30.0"]])
    assert report.failures(data) == [
        "fa4 [not run]: not installed",
        "sdpa-cudnn [D=128 causal S=4096]: RuntimeError: no",
    ]


def test_backward_report(tmp_path):
    import json

    data = forward_data() | {"kind": "backward"}
    data["providers"] = {
        "ours:deterministic": {"label": "cute_kernels, deterministic"},
        **data["providers"],
    }
    for cell, speed in zip(data["cells"], (500.0, 400.0, None), strict=True):
        cell["results"]["ours:deterministic"] = {} if speed is None else {"tflops": speed}
    (means,) = (report.variant_means(data)[name] for name in ["ours:deterministic"])
    assert dict(means)["D=128"] == pytest.approx(math.sqrt(1.2))
    path = tmp_path / "backward_bf16.json"
    path.write_text(json.dumps(data))
    block = readme_table.cells_block([path], tmp_path)
    assert block.startswith("## Backward, bf16, the paper's grid, H100\n")
    assert "Time of cute_kernels, deterministic / ours, geometric mean: D=128 1.10" in block
    assert "Host time of forward and backward of a small call" in block


def test_plot_draws_either_pass():
    pytest.importorskip("matplotlib")
    for kind in ("forward", "backward"):
        figure = plot.draw(forward_data() | {"kind": kind})
        assert kind in figure.get_suptitle()


def test_text_table_lines_up():
    lines = report.text_table(["a", "long"], [["longer", "1"], ["b", "22"]]).splitlines()
    assert lines == ["a       long", "longer     1", "b         22"]


def searched(automatic, seqlen=2048, **seconds):
    sizes = {"head_dim": 128, "causal": False, "seqlen_q": seqlen}
    return Tuned(
        kind={"sizes": sizes},
        name=automatic,
        automatic=automatic,
        samples={name: [value] * 3 for name, value in seconds.items()},
        rows={},
        refused={},
        failed={},
    )


def test_search_ranks_rows_timed_everywhere():
    runs = [searched("a", a=1.0, b=0.5, c=0.1), searched("b", seqlen=4096, b=2.0, a=2.5)]
    assert search.gains(runs) == {
        (128, "full"): {"b": pytest.approx(math.sqrt(2)), "a": pytest.approx(math.sqrt(0.8))}
    }


def test_ablation_names_the_switches_and_holds_the_papers_cell():
    assert ablation.variant({"pingpong": True, "overlap": True}) == "pingpong + overlap"
    assert ablation.variant({"pingpong": False, "overlap": False}) == "neither"
    cells = ablation.ablation_cells("bf16", 128, [16384], ["full"])
    assert [(c.batch, c.seqlen) for c in cells] == [(1, 16384), (4, 8448)]
    assert len(ablation.ablation_cells("bf16", 64, [16384], ["full"])) == 1


def test_readme_block_is_replaced_and_nothing_else():
    text = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    new = readme_table.replace_block(text, "new")
    assert new == f"before\n{readme_table.BEGIN}\nnew\n{readme_table.END}\nafter\n"
    assert readme_table.replace_block(new, "new") == new
    with pytest.raises(ValueError, match="markers"):
        readme_table.replace_block("no markers", "new")


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_pages_have_the_markers(page):
    text = (ROOT / page).read_text()
    assert text.count(readme_table.BEGIN) == 1 == text.count(readme_table.END)


def test_pages_hold_what_is_recorded():
    results = sorted((ROOT / "bench" / "results").glob("*.json"))
    blocks = {
        "README.md": readme_table.means_block(results),
        "docs/benchmarks.md": readme_table.cells_block(results, ROOT / "docs"),
    }
    for page, block in blocks.items():
        text = (ROOT / page).read_text()
        assert readme_table.replace_block(text, block) == text


def test_cells_of_a_results_file(tmp_path):
    import json

    path = tmp_path / "results" / "forward_bf16.json"
    path.parent.mkdir()
    path.write_text(json.dumps(forward_data()))
    path.with_suffix(".svg").touch()
    block = readme_table.cells_block([path], tmp_path / "docs")
    assert "| D=128 full S=2048 | 600 | 500 | 1.20 |" in block
    assert "abc" in block and "NVIDIA H100 80GB" in block and "20.0 µs" in block
    assert "](../results/forward_bf16.svg)" in block


def test_means_of_results_files(tmp_path):
    """Columns are those of all files, and a file has a dash where it has no cell."""
    import json

    forward, backward = tmp_path / "forward_bf16.json", tmp_path / "backward_bf16.json"
    forward.write_text(json.dumps(forward_data()))
    data = forward_data() | {"kind": "backward", "date": "2026-01-02 03:04 UTC"}
    data["cells"] = [entry(330.0, head_dim=64, sdpa_cudnn=300.0)]
    backward.write_text(json.dumps(data))
    lines = readme_table.means_block([backward, forward]).splitlines()
    assert lines[0] == (
        "| ours / best peer | peers | D=128 full | D=128 causal | D=64 full | all | lowest cell |"
    )
    assert lines[2:] == [
        "| Forward, bf16, the paper's grid, H100 | sdpa-cudnn | 1.20 | 0.80 | - | 0.98 | 0.80 |",
        "| Backward, bf16, the paper's grid, H100 | sdpa-cudnn | - | - | 1.10 | 1.10 | 1.10 |",
        "",
        "NVIDIA H100 80GB; 2026-01-02 to today; of commits abc.",
    ]
    assert readme_table.means_block([]) == ""


def test_both_pages_are_written(tmp_path, monkeypatch):
    import json

    path = tmp_path / "forward_bf16.json"
    path.write_text(json.dumps(forward_data()))
    pages = tmp_path / "README.md", tmp_path / "benchmarks.md"
    for page in pages:
        page.write_text(f"before\n{readme_table.BEGIN}\n{readme_table.END}\nafter\n")
    command = ["readme_table", str(path), "--readme", str(pages[0]), "--benchmarks", str(pages[1])]
    monkeypatch.setattr(sys, "argv", command)
    assert readme_table.main() == 0
    means, cells = (page.read_text() for page in pages)
    assert "| 1.20 | 0.80 | 0.98 | 0.80 |" in means and "S=2048" not in means
    assert "| D=128 full S=2048 | 600 | 500 | 1.20 |" in cells
    path.write_text(json.dumps({"kind": "power"}))
    assert readme_table.main() == 2
    assert pages[0].read_text() == means


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_check_accepts_attention_and_refuses_what_is_not(mask):
    cell = Cell(dtype="bf16", mask=mask, batch=2, seqlen=96, heads=3, head_dim=64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 96, 3, 64, generator=generator).bfloat16()
    reference = Reference(cell, q, k, v)
    q_, k_, v_ = (t.transpose(1, 2).double() for t in (q, k, v))
    right = torch.nn.functional.scaled_dot_product_attention(q_, k_, v_, is_causal=cell.causal)
    right = right.transpose(1, 2).bfloat16()
    assert reference.error(right) <= reference.tolerance
    assert reference.error(right * 1.1) > reference.tolerance
    assert 0 < reference.rmse(right) < reference.error(right)
    assert reference.rmse(right * 1.1) > 10 * reference.rmse(right)
    unwritten = right.clone()
    unwritten[1, 41, 2, 5] = float("nan")
    assert reference.error(unwritten) == float("inf")


def test_paper_cell_of_a_length_beyond_the_grid():
    assert paper_cell("fp16", 64, "full", 32768).batch == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    "script", ["forward", "backward", "packed", "caches", "variants", "ablation", "search", "power"]
)
def test_scripts_say_that_they_need_a_gpu(script):
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{script}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Hopper" in done.stderr


def test_power_is_that_of_the_settled_half():
    lines = ["300.5, 1980", "[N/A], 1980", "500, 1700", "690, 1500", "710, 1400", ""]
    samples = power.parse_samples(lines)
    assert samples == [(300.5, 1980), (500, 1700), (690, 1500), (710, 1400)]
    cell = paper_cell("bf16", 128, "full", 16384)
    result = power.settle(cell, cell.flops / 700e12 * 1e3, samples, multiprocessors=132)
    assert result["tflops"] == pytest.approx(700)
    assert (result["watts"], result["clock_mhz"]) == (700, 1450)
    assert result["joules_per_tflop"] == pytest.approx(1)
    assert result["tensor_share"] == pytest.approx(700e12 / (132 * 4096 * 1450e6))
    with pytest.raises(ValueError, match="no sample"):
        power.settle(cell, 1.0, [], multiprocessors=132)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_candidate_follows_every_other_equally_often(count):
    """What runs before may heat the GPU: nobody always runs behind the same one."""
    names = [str(i) for i in range(count)]
    rounds = count if count % 2 == 0 else 2 * count
    orders = list(turns(names, rounds))
    assert all(sorted(order) == names for order in orders)
    assert set(Counter(order[0] for order in orders).values()) == {rounds // count}
    pairs = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(pairs) == set(itertools.permutations(names, 2))
    assert len(set(pairs.values())) <= 1


def test_eight_bits_on_models_of_images(tmp_path):
    """Against the best of the peers that were timed, with what quantisation costs."""
    import json

    from bench import cells, fp8

    grid = cells.diffusion_grid("bf16")
    assert all(cell.seqlen == cell.seqlen_k and not cell.causal for cell in grid)
    timed = {"sdpa-cudnn:bf16": 3.0, "fa3-xformers:bf16": 2.0, f"{fp8.OURS}:bf16": 1.6}
    results = {name: {"median_ms": ms, "tflops": 1 / ms} for name, ms in timed.items()}
    results[fp8.WHOLE] = {"median_ms": 1.0, "tflops": 1.0, "relative_error": 0.0412}
    data = forward_data() | {"kind": "fp8", "cells": [{**grid[0].as_dict(), "results": results}]}
    _, lines = fp8.whole_table(data)
    assert lines == [[grid[0].name, "1.60", "1.00", "3.00", "2.00", "1.25", "2.00", "4.1%"]]
    path = tmp_path / "fp8.json"
    for settings, shown in ({"grid": "diffusion"}, True), ({}, False):
        path.write_text(json.dumps(data | {"settings": data["settings"] | settings}))
        assert bool(readme_table.cells_block([path], tmp_path)) is shown
