"""Generation with transformers: caches of its own kinds, step by step, against "eager"."""

import itertools

import pytest
import tiny_models as tiny
import torch
from model_runs import NAME, SEQLEN, left_padding, noted_calls

from cute_kernels.cache import flash_attn_with_kvcache
from cute_kernels.integrations.transformers import attention
from cute_kernels.interface import flash_attn_func

pytestmark = pytest.mark.usefixtures("in_transformers")
calls = pytest.fixture(noted_calls)

GENERATIONS = list(itertools.product(["llama", "mistral"], [None, "static"], [None, "left"]))
GENERATIONS += [(name, None, "left") for name in tiny.DECODERS if name not in ("llama", "mistral")]
GENERATIONS += [("gemma3", "static", "left")]


@pytest.mark.parametrize(("name", "cache", "side"), GENERATIONS)
def test_greedy_tokens(name, cache, side):
    mask = left_padding() if side else torch.ones(3, SEQLEN, dtype=torch.long)
    options = {"max_new_tokens": 9, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    tokens = [
        tiny.DECODERS[name]
        .build(implementation)
        .generate(tiny.random_ids(), attention_mask=mask, **options)
        for implementation in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (3, SEQLEN + 9)


@pytest.mark.parametrize(("name", "option"), [("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_a_steps_softcap_and_sinks_go_to_the_attention_of_caches(monkeypatch, name, option):
    asked = []

    def with_kvcache(q, *caches, **options):
        asked.append(options)
        return flash_attn_with_kvcache(q, *caches, **options)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", with_kvcache)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = [
        tiny.DECODERS[name].build(implementation).generate(tiny.random_ids(), **options)
        for implementation in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert [option in options for options in asked] == [True] * 6  # of two layers, three steps
    assert {options.get("softcap") for options in asked} == {2.0 if name == "gemma2" else None}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_single_queries_go_to_the_attention_of_caches(monkeypatch, calls, cache, side):
    """Keys stay where they are, whatever their strides: sequences by where they start and stop."""
    lengths = []

    def with_kvcache(q, k, v, cache_leftpad, cache_seqlens, causal, softmax_scale):
        assert q.shape[:2] == (3, 1) and not k.requires_grad
        stops = cache_seqlens.tolist() if isinstance(cache_seqlens, torch.Tensor) else None
        stops = [cache_seqlens] * 3 if stops is None else stops
        starts = [0] * 3 if cache_leftpad is None else cache_leftpad.tolist()
        lengths.append([b - a for a, b in zip(starts, stops, strict=True)])
        options = {"causal": causal, "softmax_scale": softmax_scale}
        one_by_one = [
            flash_attn_func(q[i : i + 1], k[i : i + 1, a:b], v[i : i + 1, a:b], **options)
            for i, (a, b) in enumerate(zip(starts, stops, strict=True))
        ]
        return torch.cat(one_by_one)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", with_kvcache)
    mask = left_padding() if side else torch.ones(3, SEQLEN, dtype=torch.long)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    if cache is not None:
        options["cache_implementation"] = cache
    tokens = [
        tiny.DECODERS["llama"].build(name).generate(tiny.random_ids(), **options)
        for name in ("eager", NAME)
    ]
    assert torch.equal(*tokens)
    assert len(calls) == 2  # of two layers, for the prompt
    prompt = mask.sum(1)
    expected = [(prompt + i).tolist() for i in range(1, 6) for _ in range(2)]
    assert lengths == expected


def test_tokens_without_a_cache_are_the_same():
    model = tiny.DECODERS["mistral"].build(NAME)
    options = {"attention_mask": left_padding(), "max_new_tokens": 5, "do_sample": False}
    cached, plain = (
        model.generate(tiny.random_ids(), use_cache=use_cache, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_chunks_of_a_prompt(calls):
    """More queries than one after others: bottom-right aligned."""
    model = tiny.DECODERS["mistral"].build(NAME)
    ids, mask = tiny.random_ids(), left_padding()
    whole = model(input_ids=ids, attention_mask=mask).logits
    cache = model(input_ids=ids[:, :15], attention_mask=mask[:, :15]).cache
    rest = model(input_ids=ids[:, 15:], attention_mask=mask, cache=cache).logits
    kept = mask[:, 15:].bool()
    torch.testing.assert_close(rest[kept], whole[:, 15:][kept], atol=1e-5, rtol=1e-5)
    assert set(calls) == {"flash_attn_varlen_func"}
