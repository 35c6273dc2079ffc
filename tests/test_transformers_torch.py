"""Models of transformers under PyTorch's checkpointing, autocast, compilers and meta tensors."""

import warnings

import pytest
import tiny_models as tiny
import torch
import transformers
from model_runs import (
    BATCHES,
    NAME,
    POSITIONS,
    SEQLEN,
    kept_of,
    left_padding,
    noted_calls,
    off,
    results,
)
from torch._dynamo.testing import CompileCounterWithBackend

from cute_kernels.integrations.transformers import register

pytestmark = pytest.mark.usefixtures("in_transformers")
calls = pytest.fixture(noted_calls)


@pytest.mark.parametrize("batch", ["dense", "left", "packed"])
def test_gradient_checkpointing(batch):
    architecture, ids = tiny.DECODERS["mistral"], tiny.random_ids()
    inputs = {"input_ids": ids, **BATCHES[batch], "use_cache": False}
    right = results(architecture.build("eager"), kept_of(inputs), **inputs)
    model = architecture.build(NAME).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert max(off(results(model, kept_of(inputs), **inputs), right)) <= 2e-5


def test_norms_in_float32_do_not_widen_attention(calls):
    """As they are left by adapters: only values are in 16 bits then."""
    model = tiny.DECODERS["qwen3"].build(NAME, torch.bfloat16)
    expected = model(input_ids=tiny.random_ids()).logits
    for layer in model.model.layers:
        layer.self_attn.q_norm.float()
        layer.self_attn.k_norm.float()
    found = model(input_ids=tiny.random_ids()).logits
    assert found.dtype == torch.bfloat16
    assert ((found - expected).norm() / expected.norm()).item() < 0.03
    assert calls == ["flash_attn_func"] * 4


def test_autocast(calls):
    ids, kept = tiny.random_ids(), torch.ones(3, SEQLEN, dtype=torch.bool)
    found = {}
    for name in (NAME, "sdpa"):
        model = tiny.DECODERS["llama"].build(name)
        with torch.autocast("cpu", torch.bfloat16):
            found[name] = results(model, kept, input_ids=ids)
    right = results(tiny.DECODERS["llama"].build("eager"), kept, input_ids=ids)
    for error, of_sdpa in zip(*(off(x, right) for x in found.values()), strict=True):
        assert error <= 2 * of_sdpa + torch.finfo(torch.bfloat16).eps
    assert calls.count("flash_attn_func") == 2


def test_compiled_around_padding():
    """The graph breaks once, where the sequences are looked for."""
    torch._dynamo.reset()
    architecture, ids, mask = tiny.DECODERS["mistral"], tiny.random_ids(), left_padding()
    compiled = torch.compile(architecture.build(NAME), backend="eager")
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with torch.no_grad():
        right = architecture.build("eager")(input_ids=ids, attention_mask=mask).logits
        found = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert len(breaks) == 1
    torch.testing.assert_close(found[mask.bool()], right[mask.bool()], atol=1e-5, rtol=1e-5)


def test_exported():
    """With explicit masks, as contents cannot be looked at."""
    model = tiny.DECODERS["mistral"].build(NAME).requires_grad_(False)
    inputs = {"input_ids": tiny.random_ids(), "use_cache": False, "attention_mask": left_padding()}
    program = torch.export.export(model, (), inputs, strict=False).module()
    kept = left_padding().bool()
    found, right = (call(**inputs).logits[kept] for call in (program, model))
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-5)


def test_compiled_whole_with_lengths():
    """As padding-free training has them, with gradients."""
    register(fullgraph=True)
    torch._dynamo.reset()
    architecture, kept = tiny.DECODERS["llama"], torch.ones(1, SEQLEN, dtype=torch.bool)
    ends = torch.tensor([0, 9, 12, 23])
    inputs = {"input_ids": tiny.random_ids(1), "position_ids": POSITIONS[:1], "use_cache": False}
    right = results(architecture.build("eager"), kept, **inputs)
    model = architecture.build(NAME)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = results(model, kept, compiled, **inputs, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert max(off(found, right)) <= 2e-5


def test_compiled_step_on_a_static_cache():
    """One graph serves all steps, without reading how far the cache is filled."""
    torch._dynamo.reset()
    model = tiny.DECODERS["llama"].build(NAME)
    ids = tiny.random_ids()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    whole = model(input_ids=ids).logits
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        model(input_ids=ids[:, :18], cache=cache)
        for i in range(18, SEQLEN):
            logits = step(input_ids=ids[:, i : i + 1], cache=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, i], atol=1e-5, rtol=1e-5)
    assert counter.frame_count <= 2


def test_meta_tensors_have_no_contents(calls):
    with torch.device("meta"):
        model = tiny.DECODERS["llama"].make()
    model.set_attn_implementation(NAME)
    ids = torch.empty(3, SEQLEN, dtype=torch.long, device="meta")
    mask = torch.ones(3, SEQLEN, dtype=torch.long, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model(input_ids=ids, attention_mask=mask).logits.shape == (3, SEQLEN, 97)
