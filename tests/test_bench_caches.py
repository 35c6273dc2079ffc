"""Attention to caches as it is benchmarked: counts, what is right, peers, a run on the CPU."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench/ is not installed

from bench import (
    cache_cells,
    cache_inputs,
    cache_providers,
    caches,
    measure,
    report,
    session,
    vllm_library,
)
from bench.cache_cells import GRIDS, LATENT, CacheCell
from bench.cache_inputs import CacheReference, Round
from bench.timing import Spread
from cute_kernels import flash_attn_varlen_func, flash_attn_with_kvcache

SHAPE = {"dtype": "bf16", "mask": "causal", "heads": 4, "heads_kv": 2, "head_dim": 32}


def cell_of(name, queries=(1, 1, 1), lengths=(70, 70, 70), **more):
    sizes = {"batch": len(queries), "seqlen": max(queries), "seqlen_k": max(lengths)}
    rows = {"queries": tuple(queries), "lengths": tuple(lengths)}
    return CacheCell(**{**SHAPE, **sizes, **rows, "name": name, "page_size": 16, **more})


LATENT_SHAPE = {"heads": 3, "heads_kv": 1, "head_dim": 64, "latent": True}
CELLS = [
    cell_of("one token"),
    cell_of("mixed", queries=(9, 1, 4), lengths=(70, 33, 4)),
    cell_of("window", queries=(2, 2, 2), window=7, sinks=True),
    cell_of("8 bits", element="e4m3"),
    cell_of("latent", page_size=64, **LATENT_SHAPE),
]


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(cache_cells, "COLD_BYTES", 30_000)


def test_bytes_are_those_of_keys_that_are_seen():
    one, mixed, window, eight, latent = CELLS
    assert one.bytes == 3 * 70 * 2 * (32 + 32) * 2 == 2 * eight.bytes
    assert mixed.bytes == (70 + 33 + 4) * 2 * 64 * 2
    assert window.bytes == 3 * 9 * 2 * 64 * 2
    assert latent.bytes == 3 * 70 * 576 * 2
    assert one.flops == 4 * 3 * 70 * 4 * 32
    assert latent.flops == 2 * 3 * 70 * 3 * (576 + 512)
    assert [cell.copies for cell in (one, window)] == [1, 5]
    assert window.as_dict()["bytes"] == window.bytes
    assert cell_of("half", dtype="fp16").element == "fp16"


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_are_cold_and_have_names_of_their_own(monkeypatch, grid):
    monkeypatch.undo()
    cells = GRIDS[grid]()
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.copies * cell.bytes >= 150e6
        assert all(q <= n for q, n in zip(cell.queries, cell.lengths, strict=True))
    if grid == "decode":
        assert (cells[0].name, cells[0].bytes, cells[0].copies) == ("1 of 1 on 1k", 2**22, 36)


@pytest.mark.parametrize("data", ["sd6", "channels", "spike"])
@pytest.mark.parametrize("cell", [c for c in CELLS if not c.latent], ids=str)
def test_other_data_than_normal(cell, data):
    cell = replace(cell, data=data)
    q, held = cache_inputs.cache_inputs(cell, "cpu")
    normal = cache_inputs.cache_inputs(replace(cell, data="normal"), "cpu")[1]
    assert torch.equal(held.table, normal.table)
    for sequence, length in enumerate(cell.lengths):
        k = cache_inputs.rows_of(held.copies[0][0], held, sequence, length).float()
        if data == "channels":
            assert k[..., :4].std() > 10 * k[..., 4:].std()
        if data == "spike":
            assert (k[0, :, -1] > 1).all() and not k[1:, :, -1].any()
    reference = CacheReference(cell, q, held)
    provider = cache_providers.ours()
    out = provider.output(provider.bind(cell, q, held)())
    assert reference.error(out) <= reference.tolerance


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_reference_takes_what_is_right_and_refuses_the_rest(cell):
    q, held = cache_inputs.cache_inputs(cell, "cpu")
    assert len(held.copies) == cell.copies
    assert sorted(held.table.unique().tolist()) == list(range(sum(cell.pages)))
    reference = CacheReference(cell, q, held)
    provider = cache_providers.ours()
    out = provider.output(provider.bind(cell, q, held)())
    assert reference.error(out) <= reference.tolerance
    wrong = out.clone()
    wrong[-1, -1] *= 3
    assert reference.error(wrong) > reference.tolerance
    wrong[0, 0, 0] = math.nan
    assert reference.error(wrong) == math.inf
    held.table[-1, 0] = (held.table[-1, 0] + 1) % sum(cell.pages)  # another page's keys
    out = provider.output(provider.bind(cell, q, held)())
    assert cell.window >= 0 or reference.error(out) > reference.tolerance


def test_int8_is_right_by_what_its_cache_holds():
    cell = CELLS[3]
    q, held = cache_inputs.cache_inputs(cell, "cpu")
    provider = cache_providers.ours_int8()
    assert provider.takes(cell) and not provider.takes(CELLS[0])
    call = provider.bind(cell, q, held)
    out = provider.output(call())
    assert call.reference.error(out) <= call.reference.tolerance
    assert call.reference.error(out * 1.2) > call.reference.tolerance
    near = CacheReference(cell, q, held)  # of what was quantised
    assert near.rmse(out) < 0.05


def test_a_round_goes_through_all_copies(monkeypatch):
    called = []
    calls = [partial(called.append, number) for number in range(3)]
    monkeypatch.setattr(cache_inputs.CapturedCall, "__init__", captured_seven_times)
    captured = cache_inputs.CapturedRound(Round(calls), 1.5)
    assert called == [0, 1, 2] and captured.calls == 21


def captured_seven_times(self, call, target_ms):
    self.calls = 7
    call()


def test_sum_is_checked_too():
    cell = CELLS[2]
    q, held = cache_inputs.cache_inputs(cell, "cpu")
    call = cache_providers.only_sums().bind(cell, q, held)
    total = call()
    words = held.copies[-1].view(-1).view(torch.float32)[: cell.bytes // 4]
    assert total == words.sum()
    assert call.reference.error(total) <= call.reference.tolerance
    assert call.reference.error(total + words.abs().sum() / 100) > call.reference.tolerance


def vllm_operators():
    """FlashAttention-3's operators of vLLM, by our own on the CPU."""

    def metadata(seqused_k, cu_seqlens_q, **sizes):
        assert sizes["batch_size"] == len(seqused_k) == len(cu_seqlens_q) - 1
        assert sizes["headdim_v"] >= sizes["headdim"] and sizes["page_size"] > 0
        return seqused_k.clone()

    def fwd(q, k, v, scheduler_metadata, seqused_k, s_aux, page_table, **options):
        assert torch.equal(scheduler_metadata, seqused_k) and options["is_causal"] is True
        descales = [options[f"{name}_descale"] for name in "qkv"]
        assert all((x is not None) == (q.dtype == torch.float8_e4m3fn) for x in descales)
        assert q.dtype == k.dtype
        out = flash_attn_varlen_func(
            q,
            k,
            v,
            options["cu_seqlens_q"],
            None,
            options["max_seqlen_q"],
            options["max_seqlen_k"],
            seqused_k=seqused_k,
            softmax_scale=options["softmax_scale"],
            causal=True,
            qv=options["q_v"],
            window_size=(options["window_size_left"], options["window_size_right"]),
            sinks=s_aux,
            page_table=page_table,
        )
        return [out]

    return SimpleNamespace(fwd=fwd, get_scheduler_metadata=metadata)


def flashmla_operators():
    def dense_decode_fwd(q, cache, head_dim_v, lengths, table, scale, causal, plan, splits, out):
        assert (head_dim_v, out) == (LATENT, None) and (plan is None) == (splits is None)
        values, keys = cache.split([head_dim_v, cache.shape[-1] - head_dim_v], -1)
        result = flash_attn_with_kvcache(
            q[..., head_dim_v:],
            keys,
            values,
            qv=q[..., :head_dim_v],
            cache_seqlens=lengths,
            page_table=table,
            softmax_scale=scale,
            causal=causal,
        )
        return result, None, lengths, lengths

    return SimpleNamespace(dense_decode_fwd=dense_decode_fwd)


class Called:
    calls, how = 1, "no graph"

    def __init__(self, call, target_ms):
        call()


def times(captured, rounds):
    return {name: Spread(0.02 if name == "ours" else 0.01, 0.01, 0.03, rounds) for name in captured}


def test_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "_machine", lambda: {"gpu": "none", "torch": "2"})
    monkeypatch.setattr(measure, "interleaved_gpu_times", times)
    monkeypatch.setattr(vllm_library, "load_attention", lambda path: vllm_operators())
    monkeypatch.setattr(vllm_library, "load_flashmla", lambda path: flashmla_operators())
    monkeypatch.setattr(
        cache_inputs, "cache_inputs", partial(cache_inputs.cache_inputs, device="cpu")
    )
    monkeypatch.setattr(cache_inputs, "CapturedRound", Called)
    monkeypatch.setitem(GRIDS, "decode", lambda dtype: CELLS)
    options = ["--vllm-library", "a.so", "--flashmla-library", "b.so", "--commit", "abc"]
    data = caches.run(caches.parse([*options, "--out", str(tmp_path)]), "decode")
    saved = report.load(tmp_path / "caches_decode.json")
    assert saved["grid"] == "decode" and saved["commit"] == "abc"
    assert [entry["name"] for entry in saved["cells"]] == [cell.name for cell in CELLS]
    for cell, entry in zip(CELLS, saved["cells"], strict=True):
        expected = {"ours", "sum", "fa3-vllm"}
        expected |= {"flashmla"} if cell.latent else set()
        expected |= {"ours:int8"} if cell.element == "e4m3" else set()
        assert set(entry["results"]) == expected
        for result in entry["results"].values():
            assert result["max_error"] <= result["tolerance"]
        assert entry["results"]["ours"]["tb_s"] == pytest.approx(cell.bytes / 0.02e-3 / 1e12)
    caches.print_summary(data)
    printed = capsys.readouterr().out.splitlines()
    header = next(line for line in printed if line.startswith("cell"))
    assert header.split()[-3:] == ["ours/best", "ours:int8/best", "ours/sum"]
    line = next(line for line in printed if line.startswith("8 bits"))
    assert line.split()[-3:] == ["0.50", "1.00", "0.50"]


def test_peers_that_are_missing_say_how_to_get_them(monkeypatch):
    for variable in (vllm_library.VARIABLE, vllm_library.FLASHMLA_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    loaded, missing = cache_providers.load(None, Path("no/such.so"))
    assert [provider.name for provider in loaded] == ["ours", "ours:int8", "sum"]
    assert "vllm_flash_attn" in missing["fa3-vllm"]
    assert "no file no/such.so" in missing["flashmla"] and "_flashmla_C" in missing["flashmla"]
