"""The benchmarks of whole models, on the CPU with a tiny one."""

import itertools
import sys

import pytest
import torch
from configure import ROOT

pytest.importorskip("transformers", "5", reason="needs transformers 5 or newer")
sys.path.append(str(ROOT))

from bench import decode_step, train_step
from cute_kernels.integrations.transformers import unregister

TINY = ["--device", "cpu", "--shape", "tiny"]


@pytest.fixture(autouse=True)
def _unregister():
    yield
    unregister()


def test_documents_fill_the_tokens():
    starts = train_step.document_starts(8192)
    assert starts[0] == 0 and starts[-1] == 8192
    lengths = torch.tensor(starts).diff()
    assert len(lengths) > 3 and (lengths > 0).all()
    packed = train_step.packing(8192, "cpu")
    assert packed["max_length_q"] == lengths.max()
    assert (packed["position_ids"] == 0).sum() == len(lengths)


@pytest.mark.parametrize("options", [[], ["--checkpointing"]])
def test_training_falls_alike(options):
    given = [*TINY, "--eager", "--rounds", "2", "--tokens", "128", *options]
    arguments = train_step.parse([*given, "--attentions", "cute_kernels", "sdpa-math", "nothing"])
    results = train_step.time_steps(arguments)
    ours, sdpa = (torch.tensor(results[name]["losses"]) for name in arguments.attentions[:2])
    assert torch.allclose(ours, sdpa, atol=0.01) and ours[-1] < ours[0] - 0.05
    assert "error" in results["nothing"]
    header, lines = train_step.table(results)
    assert [len(line) for line in lines] == [len(header)] * 3


def test_packed_training_is_of_the_documents():
    """The same as each document by itself."""
    from bench import llama

    model = llama.build("tiny", "cpu").eval()
    ids = torch.randint(0, 256, (1, 3000))
    llama.choose(model, "cute_kernels")
    found = model.model(input_ids=ids, use_cache=False, **train_step.packing(3000, "cpu"))
    llama.choose(model, "sdpa")
    starts = train_step.document_starts(3000)
    for begin, end in itertools.pairwise(starts):
        alone = model.model(input_ids=ids[:, begin:end], use_cache=False).last_hidden_state
        off = found.last_hidden_state[:, begin:end] - alone
        assert off.norm() <= 0.02 * alone.norm()


def test_all_caches_give_the_same_logits():
    arguments = decode_step.parse([*TINY, "--context", "70", "--batch", "3"])
    from bench import llama

    with torch.no_grad():
        model = llama.build("tiny", "cpu", torch.float32).eval()
        results = decode_step.time_steps(arguments, model, 3)
    assert [results[name]["logits_off"] < 1e-5 for name in decode_step.VARIANTS] == [True] * 3
    header, lines = decode_step.table([{"batch": 3, "context": 70, "results": results}])
    assert [len(line) for line in lines] == [len(header)] * 3
