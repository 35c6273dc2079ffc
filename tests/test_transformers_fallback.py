"""Other masks, softcap, sinks, biases, dropout of transformers: who answers, or that none does."""

import warnings

import pytest
import tiny_models as tiny
import torch
import transformers
from model_runs import (
    BATCHES,
    HOLES,
    NAME,
    SEQLEN,
    kept_of,
    left_padding,
    noted_calls,
    off,
    results,
    right_padding,
)

from cute_kernels.integrations.transformers import attention
from cute_kernels.interface import flash_attn_func

pytestmark = pytest.mark.usefixtures("in_transformers")
calls = pytest.fixture(noted_calls)


@pytest.mark.parametrize("mask", [HOLES, None], ids=["holes", "user's"])
def test_other_masks_fall_back_with_one_warning(calls, mask):
    """With holes, or of four dimensions."""
    ids = tiny.random_ids()
    if mask is None:
        chance = torch.rand(3, 1, SEQLEN, SEQLEN, generator=torch.Generator().manual_seed(0))
        mask = (chance < 0.5) | torch.eye(SEQLEN, dtype=torch.bool)
    kept = mask.bool() if mask.dim() == 2 else torch.ones(3, SEQLEN, dtype=torch.bool)
    sdpa = results(tiny.DECODERS["mistral"].build("sdpa"), kept, input_ids=ids, attention_mask=mask)
    model = tiny.DECODERS["mistral"].build(NAME)
    with pytest.warns(UserWarning, match="mask is not one of padding") as caught:
        found = results(model, kept, input_ids=ids, attention_mask=mask)
    assert len([w for w in caught if "slower attention" in str(w.message)]) == 1
    assert max(off(found, sdpa)) <= 1e-6
    assert calls == ["sdpa_attention_forward"] * 2


def test_position_bias_falls_back(calls):
    inputs = {"input_ids": tiny.random_ids(), "decoder_input_ids": tiny.random_ids(seed=1)}
    kept = torch.ones(3, SEQLEN, dtype=torch.bool)
    for mask in ({}, {"attention_mask": left_padding(), "decoder_attention_mask": right_padding()}):
        kept = mask.get("decoder_attention_mask", kept).bool()
        right = results(tiny.T5.build("eager"), kept, **inputs, **mask)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = results(tiny.T5.build(NAME), kept, **inputs, **mask)
        assert max(off(found, right)) <= 1e-5
    assert "sdpa_attention_forward" in calls


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcap_and_sinks_are_the_layers_own(monkeypatch, name):
    asked = []

    def kernel(q, k, v, **options):
        asked.append(options)
        return flash_attn_func(q, k, v, **options)

    monkeypatch.setattr(attention, "flash_attn_func", kernel)
    model = tiny.DECODERS[name].build(NAME)
    model(input_ids=tiny.random_ids())
    if name == "gemma2":
        assert {options["softcap"] for options in asked} == {2.0}
    else:
        for layer, options in zip(model.model.layers, asked, strict=True):
            assert torch.equal(options["sinks"], layer.self_attn.sinks)
    assert [options.get("window_size") for options in asked] == [(6, 0), None]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("batch", ["dense", "left", "packed"])
def test_fallback_with_softcap_and_sinks(monkeypatch, name, batch):
    """PyTorch's attention has neither: the model's own answers."""
    monkeypatch.setattr(attention, "unsupported", lambda *_: "nothing goes")
    inputs = {"input_ids": tiny.random_ids(), **BATCHES[batch]}
    kept = kept_of(inputs)
    right = results(tiny.DECODERS[name].build("eager"), kept, **inputs)
    with pytest.warns(UserWarning, match="nothing goes"):
        found = results(tiny.DECODERS[name].build(NAME), kept, **inputs)
    assert max(off(found, right)) <= 1e-6


def test_dropout_is_refused():
    config = transformers.LlamaConfig(**tiny.DECODER, attention_dropout=0.1)
    model = transformers.LlamaForCausalLM(config)
    model.set_attn_implementation(NAME)
    model.eval()(input_ids=tiny.random_ids())
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.1.*variants\.dropout"):
        model.train()(input_ids=tiny.random_ids())
