"""Packed sequences as they are benchmarked: counts, what is right, peers, a run on the CPU."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import (
    fa3_library,
    measure,
    packed,
    packed_inputs,
    packed_providers,
    providers,
    report,
    session,
    vllm_library,
)
from bench.cells import BackwardCell
from bench.distributions import draw
from bench.packed_cells import (
    PackedBackwardCell,
    PackedCell,
    documents,
    packed_grid,
    visible_pairs,
)
from bench.packed_inputs import PackedGradientReference, PackedReference
from bench.timing import Spread
from cute_kernels import flash_attn_varlen_func

SHAPE = {"dtype": "bf16", "mask": "causal", "heads": 4, "heads_kv": 2, "head_dim": 32}


def cell_of(kind=PackedCell, lengths=(3, 40, 17), name="some", head_dim_v=32, **more):
    sizes = {"batch": len(lengths), "seqlen": max(lengths), "lengths": tuple(lengths)}
    return kind(**{**SHAPE, **sizes, "name": name, "head_dim_v": head_dim_v, **more})


CELLS = [
    cell_of(name="documents"),
    cell_of(name="equal", lengths=(24, 24, 24)),
    cell_of(name="window", window=7, sinks=True),
    cell_of(name="values", head_dim_v=16),
]


def test_documents_are_those_of_the_page():
    lengths = documents()
    assert len(lengths) == 34 and sum(lengths) == 32768
    assert min(lengths) >= 1 and max(lengths) <= 16384
    assert len(set(lengths)) > 30


@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("window", [-1, 0, 2, 7, 40])
def test_pairs_are_those_that_masks_leave(queries, window):
    keys = 9
    position = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = key <= position
    if window >= 0:
        seen &= position - key <= window
    assert visible_pairs(queries, keys, window) == seen.sum()


def test_counts_are_those_of_dense_calls_but_for_the_diagonal():
    dense = BackwardCell(**{**SHAPE, "batch": 3, "seqlen": 1024})
    packed_cell = cell_of(PackedBackwardCell, [1024] * 3)
    assert packed_cell.flops == pytest.approx(dense.flops, rel=2e-3)
    assert cell_of(lengths=[1024] * 3).flops * 5 == packed_cell.flops * 2
    assert str(packed_cell) == "bf16 some"


def test_grids_have_names_of_their_own():
    for backward in (False, True):
        grid = packed_grid("bf16", backward)
        assert len({cell.name for cell in grid}) == len(grid)
        assert all(sum(cell.lengths) in (16384, 32768) for cell in grid)
        assert any(cell.sinks for cell in grid) != backward
    assert {cell.heads for cell in packed_grid("bf16") if cell.head_dim_v == 128 != cell.head_dim}


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_reference_takes_what_is_right_and_refuses_the_rest(cell):
    inputs = packed_inputs.packed_inputs(cell, "cpu")
    assert [x.shape for x in inputs] == [(sum(cell.lengths), h, d) for h, d in shapes(cell)]
    reference = PackedReference(cell, *inputs)
    out = packed_providers.ours().bind(cell, *inputs)()
    assert reference.error(out) <= reference.tolerance
    assert 0 < reference.rmse(out) < 0.02
    for row in (0, -1):
        wrong = out.clone()
        wrong[row, -1] += 0.5
        assert reference.error(wrong) > reference.tolerance
    wrong[5, 0, 0] = math.nan
    assert reference.error(wrong) == math.inf
    other = packed_providers.ours().bind(replace(cell, lengths=cell.lengths[::-1]), *inputs)()
    assert cell.equal or reference.error(other) > reference.tolerance


def shapes(cell):
    return [
        (cell.heads, cell.head_dim),
        (cell.heads_kv, cell.head_dim),
        (cell.heads_kv, cell.head_dim_v),
    ]


@pytest.mark.parametrize("whole", [2048, 8], ids=["whole", "last rows"])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_gradient_reference(monkeypatch, cell, whole):
    monkeypatch.setattr(packed_inputs, "WHOLE", whole)
    monkeypatch.setattr(packed_inputs, "LAST_ROWS", whole)
    inputs = packed_inputs.packed_inputs_and_gradient(cell, "cpu")
    assert inputs[3].shape == (sum(cell.lengths), cell.heads, cell.head_dim_v)
    reference = PackedGradientReference(cell, *inputs)
    provider = providers.training_step_of(packed_providers.ours())
    with provider.context():
        grads = provider.output(provider.bind(cell, *inputs)())
    assert reference.error(grads) <= reference.tolerance
    for index in range(3):
        wrong = [grad.clone() for grad in grads]
        wrong[index][-1, -1] += 1.0
        assert reference.error(wrong) > reference.tolerance


def test_dense_twin_is_the_same_attention():
    cell = CELLS[1]
    inputs = packed_inputs.packed_inputs(cell, "cpu")
    twin = packed_providers.dense()
    assert twin.takes(cell) and not twin.takes(CELLS[0])
    out, packed_out = (p.bind(cell, *inputs)() for p in (twin, packed_providers.ours()))
    assert torch.equal(out, packed_out)


def names_of(options):
    """Ours of FlashAttention-3's."""
    assert options["is_causal"] is True
    return {
        "cu_seqlens_q": options["cu_seqlens_q"],
        "cu_seqlens_k": options["cu_seqlens_k"],
        "max_seqlen_q": options["max_seqlen_q"],
        "max_seqlen_k": options["max_seqlen_k"],
        "window_size": (options["window_size_left"], options["window_size_right"]),
        "softmax_scale": options["softmax_scale"],
        "causal": True,
    }


def xformers_operators():
    """What xformers' library registers, by our own operators on the CPU."""

    def fwd(q, k, v, **options):
        out, lse = flash_attn_varlen_func(q, k, v, return_lse=True, **names_of(options))
        return out, lse, None, None

    def bwd(grad_out, q, k, v, out, lse, deterministic, **options):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = flash_attn_varlen_func(*leaves, **names_of(options))
        assert torch.equal(again, out)  # what forward gave
        return *torch.autograd.grad(again, leaves, grad_out), None

    return SimpleNamespace(fwd=fwd, bwd=bwd)


def vllm_operators():
    def fwd(q, k, v, s_aux, **options):
        assert s_aux is None or s_aux.dtype == q.dtype
        return [flash_attn_varlen_func(q, k, v, sinks=s_aux, **names_of(options))]

    return SimpleNamespace(fwd=fwd)


class Called:
    calls, how = 1, "no graph"

    def __init__(self, call, target_ms):
        call()


def times(captured, rounds):
    return {name: Spread(0.01, 0.009, 0.011, rounds) for name in captured}


@pytest.fixture
def on_cpu(monkeypatch):
    """A clock that always says the same, and peers that are ours."""
    monkeypatch.setattr(session, "_machine", lambda: {"gpu": "none", "torch": "2"})
    monkeypatch.setattr(measure, "time_cublas", lambda query: {"tflops": 1.0})
    monkeypatch.setattr(measure, "interleaved_gpu_times", times)
    monkeypatch.setattr(fa3_library, "load", lambda path: xformers_operators())
    monkeypatch.setattr(vllm_library, "load_attention", lambda path: vllm_operators())
    for name in ("FORWARD", "BACKWARD"):
        task = replace(getattr(measure, name), repeated=Called)
        monkeypatch.setattr(measure, name, task)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_run(on_cpu, monkeypatch, tmp_path, capsys, backward):
    monkeypatch.setattr(packed_inputs, "draw", lambda cell, _, seed: draw(cell, "cpu", seed))
    kind = PackedBackwardCell if backward else PackedCell
    grid = [kind(**vars(cell)) for cell in CELLS if not (backward and cell.sinks)]
    monkeypatch.setattr(packed, "packed_grid", lambda dtype, of_backward: grid)
    if backward:  # without streams
        monkeypatch.setattr(providers, "backward_of", providers.training_step_of)
    options = ["--vllm-library", "a.so", "--fa3-library", "b.so", "--data", "normal", "sd6"]
    options += ["--backward"] if backward else []
    arguments = packed.parse([*options, "--commit", "abc", "--out", str(tmp_path)])
    data = packed.run(arguments)
    path = tmp_path / ("packed_backward_bf16.json" if backward else "packed_bf16.json")
    assert report.load(path)["cells"] == report_of(data)
    assert data["commit"] == "abc" and len(data["cells"]) == 2 * len(grid)
    for entry in data["cells"]:
        for result in entry["results"].values():
            assert result["max_error"] <= result["tolerance"] and result["tflops"] > 0
    dense = [entry["name"] for entry in data["cells"] if "ours:dense" in entry["results"]]
    assert set(dense) == {"equal"}
    packed.print_summary(data)
    header, *lines = capsys.readouterr().out.splitlines()[3:]
    peers = ["fa3-xformers", "fa3-xformers:deterministic"] if backward else ["fa3-vllm"]
    assert all(name in header for name in [*peers, "ours/best", "ours:dense/best"])
    assert any(line.startswith("equal sd6") and "10.0" in line for line in lines)
    assert not any("failed" in line for line in lines)


def report_of(data):
    """As JSON has it."""
    return [{**entry, "lengths": list(entry["lengths"])} for entry in data["cells"]]


def test_peers_that_are_missing_say_how_to_get_them(monkeypatch):
    for variable in (fa3_library.VARIABLE, vllm_library.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    loaded, missing = packed_providers.load(False, None, Path("no/such.so"))
    assert [provider.name for provider in loaded][:2] == ["ours", "ours:dense"]
    assert "fa4" in missing and "flash_attn.cute cannot be imported" in missing["fa4"]
    assert "xformers==" in missing["fa3-xformers"]
    assert "no file no/such.so" in missing["fa3-vllm"] and "vllm==" in missing["fa3-vllm"]
    loaded, missing = packed_providers.load(True, None, None)
    assert [provider.name for provider in loaded][2] == "ours:deterministic"
    assert {"fa3-xformers", "fa3-xformers:deterministic"} < set(missing)


@pytest.mark.parametrize("window", [-1, 5])
def test_fa4_is_asked_the_same(monkeypatch, window):
    """By its names; sinks in bfloat16, None where others say -1."""
    cell = next(c for c in packed_grid("bf16") if c.sinks and c.window > 0)
    cell = replace(
        cell, batch=2, seqlen=9, lengths=(9, 4), heads=4, heads_kv=2, head_dim_v=64, window=window
    )

    def theirs(q, k, v, *, learnable_sink, window_size, **options):
        assert learnable_sink.dtype == torch.bfloat16
        left, right = window_size
        assert left == (None if window < 0 else window) and right in (None, 0)
        return flash_attn_varlen_func(
            q, k, v, sinks=learnable_sink.float(), window_size=cell.window_size, **options
        ), None

    module = SimpleNamespace(flash_attn_varlen_func=theirs)
    monkeypatch.setattr(packed_providers, "fa4_module", lambda: (module, "a version"))
    inputs = packed_inputs.packed_inputs(cell, "cpu")
    peer = packed_providers.fa4()
    reference = PackedReference(cell, *inputs)
    assert reference.error(peer.output(peer.bind(cell, *inputs)())) <= reference.tolerance


def test_varlen_attn_is_no_peer_of_what_it_has_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peer = packed_providers.varlen_attn()
    taken = {cell.name for cell in packed_grid("bf16") if peer.takes(cell)}
    refused = {cell.name for cell in packed_grid("bf16")} - taken
    assert refused and all("sinks" in name or "V's" in name for name in refused)
