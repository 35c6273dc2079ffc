"""bench.variants on the CPU, at small sizes and with a clock that always says the same."""

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from configure import ROOT  # noqa: F401
from test_bench import readme_table, report  # which also finds bench/

from bench import (
    comparison,
    measure,
    providers,
    session,
    variant_problems,
    variant_rules,
    variants,
    vllm_library,
)
from bench.check import Reference
from bench.distributions import draw
from bench.timing import Spread
from bench.variant_cells import BACKWARD, CASES, FORWARD, Case

SEQLEN = 160
FLEXIBLE = [name for name, case in CASES.items() if case.rule]


def small(case):
    return replace(case, batch=min(case.batch, 2), heads=2, heads_kv=1 if case.sinks else 2)


@pytest.fixture
def on_the_cpu(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    def times(captured, rounds):
        return {name: Spread(1.0, 0.9, 1.1, rounds) for name in captured}

    def called(call, target_ms):
        call()
        return SimpleNamespace(calls=1, how="graph")

    monkeypatch.delenv(vllm_library.VARIABLE, raising=False)
    monkeypatch.setattr(session, "_machine", lambda: {"gpu": "none", "torch": "2", "cuda": "13"})
    monkeypatch.setattr(measure, "time_cublas", lambda query: {"tflops": 1.0})
    monkeypatch.setattr(measure, "interleaved_gpu_times", times)
    monkeypatch.setattr(measure, "draw", partial(draw, device="cpu"))
    monkeypatch.setattr("bench.timing.captured_or_eager", called)
    monkeypatch.setattr(providers, "backward_of", providers.training_step_of)
    monkeypatch.setattr(variant_problems, "compiled_flex_attention", lambda: flex_attention)
    monkeypatch.setattr(variant_problems, "compile_kernels", lambda rows: None)
    monkeypatch.setattr(variant_rules, "WINDOW", 50)
    for name, case in CASES.items():
        monkeypatch.setitem(CASES, name, small(case))


def test_all_cases(on_the_cpu, tmp_path, capsys):
    """Every candidate passes its check; FlexAttention has no gradient on the CPU."""
    options = f"--seqlen {SEQLEN} --out {tmp_path} --commit abc"
    data = variants.run(variants.parse(options.split()), "cpu")
    path = tmp_path / "variants_bf16.json"
    assert report.load(path)["cells"] == data["cells"]
    assert data["compiled"]["kernels"] == 16
    assert not comparison.failed(data)
    found = {(cell["mask"], cell["of_pass"]): {**cell["results"]} for cell in data["cells"]}
    assert list(found) == list(itertools.product(CASES, (FORWARD, BACKWARD)))
    for (name, of_pass), results in found.items():
        flex = results.pop(variant_problems.FLEX, None)
        assert (flex is not None) == (name in FLEXIBLE)
        assert flex is None or ("error" in flex) == (of_pass == BACKWARD)
        assert len(results) >= 2
        for candidate, result in results.items():
            assert 0 < result["max_error"] < result["tolerance"], (name, of_pass, candidate)
    assert variant_problems.LIBRARY in found["document", BACKWARD]
    variants.print_summary(data)
    printed = capsys.readouterr().out
    assert "vllm==0.33.0" in printed
    header, lines = variants.table(data)
    assert [len(line) for line in lines] == [len(header)] * 20
    assert lines[0][:4] == ["D=128 alibi S=160", "forward", "1.000", "0"]
    assert lines[0][4:7] == [variant_problems.FLEX, "0", "1.00"]
    block = readme_table.cells_block([path], tmp_path)
    assert block.startswith("## Variants, block masks, softcap, sinks, bf16")
    assert "| D=128 alibi S=160 | forward | 1.000 |" in block


def test_one_pass_of_some_cases(on_the_cpu, tmp_path):
    options = f"--seqlen {SEQLEN} --out {tmp_path} --commit abc --forward --cases sinks --peers"
    data = variants.run(variants.parse(options.split()), "cpu")
    assert [(cell["mask"], cell["of_pass"]) for cell in data["cells"]] == [("sinks", FORWARD)]
    assert data["compiled"]["kernels"] == 0
    assert json.loads((tmp_path / "variants_bf16_forward.json").read_text()) == data


def test_other_data(on_the_cpu, tmp_path):
    options = f"--seqlen {SEQLEN} --out {tmp_path} --commit abc --forward --peers"
    options += " --cases document sinks --data normal sd6"
    data = variants.run(variants.parse(options.split()), "cpu")
    assert not comparison.failed(data)
    found = [(cell["mask"], cell.get("data")) for cell in data["cells"]]
    assert found == list(itertools.product(("document", "sinks"), (None, "sd6")))
    lines = [line[0] for line in variants.table(data)[1]]
    assert lines[:2] == ["D=128 document S=160", "D=128 document S=160 sd6"]


def test_passes():
    assert variants.passes(variants.parse([])) == [FORWARD, BACKWARD]
    assert variants.passes(variants.parse(["--forward", "--backward"])) == [FORWARD, BACKWARD]
    assert variants.passes(variants.parse(["--backward"])) == [BACKWARD]


@pytest.mark.parametrize("name", FLEXIBLE)
def test_a_wrong_variant_is_refused(on_the_cpu, name):
    """The reference is of the hooks, and of all batch entries and heads."""
    case = CASES[name]
    rule = variant_rules.rule_of(case.rule, case.batch, case.heads, SEQLEN, "cpu")
    cell = case.cell("bf16", SEQLEN, rule.pairs(case.batch, SEQLEN, "cpu"), FORWARD)
    inputs = measure.random_inputs(cell)
    reference = Reference(cell, *inputs, options=rule.options)
    problem = variant_problems.of_rule(case, rule, SEQLEN, "cpu", [])
    measure.check_provider(problem.candidates[0].provider, cell, inputs, reference)
    plain = providers.ours()
    with pytest.raises(measure.WrongResult):
        measure.check_provider(plain, replace(cell, mask="causal"), inputs, reference)


def test_options_of_some_heads_are_those_of_all():
    rule = variant_rules.rule_of("alibi", 2, 4, 32, "cpu")
    q, k, v = torch.randn(3, 2, 32, 4, 8).bfloat16()
    from oracle import Attention

    exact = Attention(q, k, v, 1.0, **rule.options(slice(None), slice(None)))
    part = slice(1, 2), slice(None), slice(2, 4)
    of_part = Attention(q[part], k[part], v[part], 1.0, **rule.options(slice(1, 2), slice(2, 4)))
    assert torch.equal(of_part.lse, exact.lse[1:, 2:])


def test_documents():
    """They differ from entry to entry, and the packed call is of all of them."""
    rule = variant_rules.rule_of("document", 2, 1, 1000, "cpu")
    starts = [variant_rules.document_starts(1000, seed) for seed in (0, 1)]
    assert starts[0] != starts[1]
    lengths = [b - a for entry in starts for a, b in itertools.pairwise(entry)]
    assert len(lengths) == 2 * variant_rules.DOCUMENTS and min(lengths) > 0
    assert rule.pairs(2, 1000, "cpu") == sum(n * (n + 1) // 2 for n in lengths)
    ids = rule.bound.captured()["of_query"]
    assert [ids[1, i].item() for i in (0, starts[1][1] - 1, starts[1][1])] == [0, 0, 1]


@pytest.mark.parametrize("window_size", [(-1, -1), (5, 0), (500, 0)])
def test_pairs_and_flops(window_size):
    from oracle import visible

    case = Case("some", 3, 4, 2, 16, window_size=window_size)
    problem = variant_problems.of_arguments(case, 40, "cpu", None)
    assert problem.pairs == 3 * visible(40, 40, True, window_size).sum()
    cells = [case.cell("bf16", 40, problem.pairs, of_pass) for of_pass in (FORWARD, BACKWARD)]
    assert [cell.flops for cell in cells] == [n * 4 * 16 * problem.pairs for n in (4, 10)]
    assert str(cells[1]) == "bf16 D=16 some S=40 4/2 heads backward"


def test_what_fa3_is_given():
    """Packed rows, and what the case says."""
    seen = {}

    def fwd(q, k, v, **given):
        seen.update(given, k=k)
        return [q]

    operators = SimpleNamespace(fwd=fwd)
    starts = torch.tensor([0, 8, 16], dtype=torch.int32)
    q, k, v = torch.randn(3, 2, 8, 4, 16)
    case = CASES["sinks-window"]
    call = variant_problems._fa3_call(operators, case, starts, 8, torch.ones(4))
    assert torch.equal(call(q, k, v), q)
    assert seen["k"].shape == (16, 4, 16) and seen["softmax_scale"] == 0.25
    assert seen["k_new"] is None and seen["is_causal"] is True and seen["softcap"] == case.softcap
    assert seen["s_aux"].dtype == torch.bfloat16 and seen["window_size_left"] == 127


@pytest.mark.parametrize("name", ["sinks-window", "softcap-64"])
def test_fa4_is_asked_the_same(name):
    case = replace(CASES[name], batch=1, heads=4, heads_kv=2, head_dim=16)
    seen = {}

    def flash_attn_func(q, k, v, **options):
        seen.update(options)
        return q * 0

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    problem = variant_problems.of_arguments(case, 8, "cpu", None, (module, "a version"))
    (peer,) = (c.provider for c in problem.candidates if c.provider.name == "fa4")
    q, k, v = (torch.randn(1, 8, h, 16, dtype=torch.bfloat16) for h in (4, 2, 2))
    peer.bind(case.cell("bf16", 8, 36, BACKWARD), q, k, v)()
    assert seen["causal"] is True and seen["softcap"] == case.softcap
    if case.sinks:
        assert seen["window_size"] == (127, 0) and peer.parameters[0].dtype == torch.bfloat16
        assert peer.parameters[0] is seen["learnable_sink"]
    else:
        assert seen["window_size"] == (None, None) and seen["learnable_sink"] is None


def test_what_was_not_captured_is_said():
    cell = CASES["sinks"].cell("bf16", 8, 36, BACKWARD).as_dict()
    results = {"ours": {"timed_by": "graph"}, "flex-attention": {"timed_by": "eager"}}
    (line,) = variants.by_events({"cells": [{**cell, "results": results}]})
    assert line.startswith("flex-attention [D=64 sinks S=8 64/8 heads backward]")


def test_a_library_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.delenv(vllm_library.VARIABLE, raising=False)
    for path in (None, tmp_path / "none.so"):
        with pytest.raises(providers.Unavailable, match=r"vllm==0\.33\.0"):
            variant_problems.load_fa3(path)
