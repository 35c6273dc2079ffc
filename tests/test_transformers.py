"""The integration with transformers: tiny models of many architectures, against "eager"."""

import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers
from model_runs import (
    BATCHES,
    NAME,
    POSITIONS,
    SEQLEN,
    implementations,
    kept_of,
    noted_calls,
    off,
    results,
    right_padding,
)
from transformers.masking_utils import AttentionMaskInterface

from cute_kernels.integrations.transformers import unregister

pytestmark = pytest.mark.usefixtures("in_transformers")
calls = pytest.fixture(noted_calls)


def assert_as_right_as_others(architecture, **inputs):
    """In fp32 nearly the same numbers, in bf16 at most twice as far from those in fp32 as the
    others are, and one rounding step."""
    kept = kept_of(inputs)
    right = results(architecture.build("eager"), kept, **inputs)
    for error, allowed in zip(
        off(results(architecture.build(NAME), kept, **inputs), right), (5e-6, 2e-5), strict=True
    ):
        assert error <= allowed
    # bf16's rounding of weights alone is no error of attention
    rounded = architecture.build("eager", torch.bfloat16).float()
    right = results(rounded, kept, **inputs)
    found = {
        name: off(results(architecture.build(name, torch.bfloat16), kept, **inputs), right)
        for name in (NAME, *implementations(architecture))
    }
    for error, *of_others in zip(*found.values(), strict=True):
        assert error <= 2 * min(of_others) + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders(name, batch):
    architecture = tiny.DECODERS[name]
    assert_as_right_as_others(architecture, input_ids=tiny.random_ids(), **BATCHES[batch])


@pytest.mark.parametrize("batch", ["dense", "left", "right"])
@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_encoders(name, batch):
    architecture = tiny.ENCODERS[name]
    assert_as_right_as_others(architecture, input_ids=tiny.random_ids(), **BATCHES[batch])


def test_vision_encoder(calls):
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(3, 10, dtype=torch.bool)
    right = results(tiny.VIT.build("eager"), kept, pixel_values=pixels)
    found = results(tiny.VIT.build(NAME), kept, pixel_values=pixels)
    assert max(off(found, right)) <= 1e-5
    assert calls == ["flash_attn_func"] * 2


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_whisper(calls, side):
    """Cross-attention; the decoder's input may be padded."""
    features = torch.randn(3, 8, 30, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": features, "decoder_input_ids": tiny.random_ids()}
    mask = tiny.padding([18, 23, 12], SEQLEN, side) if side else torch.ones(3, SEQLEN)
    inputs["decoder_attention_mask"] = mask.long()
    right = results(tiny.WHISPER.build("eager"), mask.bool(), **inputs)
    found = results(tiny.WHISPER.build(NAME), mask.bool(), **inputs)
    assert max(off(found, right)) <= 2e-5
    assert calls.count("flash_attn_varlen_func") == (2 if side else 0)
    assert len(calls) == 6 and "sdpa_attention_forward" not in calls


@pytest.mark.parametrize("seqlen", [11, 23])
def test_padded_keys_of_cross_attention_take_no_queries_with_them(calls, seqlen):
    """Also where there are as many queries as keys."""
    model, right = (
        transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=tiny.VOCABULARY,
                d_model=64,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                init_std=0.3,
                attn_implementation=name,
            )
        ).eval()
        for name in (NAME, "eager")
    )
    model.load_state_dict(right.state_dict())
    inputs = {
        "input_ids": tiny.random_ids(),
        "attention_mask": right_padding(),
        "decoder_input_ids": tiny.random_ids(seqlen=seqlen, seed=1),
    }
    kept = torch.ones(3, seqlen, dtype=torch.bool)
    assert max(off(results(model, kept, **inputs), results(right, kept, **inputs))) <= 2e-5
    assert "sdpa_attention_forward" not in calls


def test_attention_matters():
    """Or a wrong one would not be seen."""
    for name, architecture in {**tiny.DECODERS, **tiny.ENCODERS}.items():
        model, ids = architecture.build(NAME), tiny.random_ids()
        other = ids.clone()
        other[:, -4] = (ids[:, -4] + 1) % tiny.VOCABULARY
        with torch.no_grad():
            change = (model(input_ids=ids).logits - model(input_ids=other).logits)[:, -1].norm()
        assert change > 1e-3, name


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        ("llama", "dense", ["flash_attn_func"] * 2),
        ("llama", "ones", ["flash_attn_func"] * 2),
        ("llama", "left", ["flash_attn_varlen_func"] * 2),
        ("mistral", "dense", ["flash_attn_func"] * 2),
        ("gemma3", "right", ["flash_attn_varlen_func"] * 2),
        ("qwen3", "packed", ["flash_attn_varlen_func"] * 2),
        ("deepseek", "dense", ["flash_attn_func"] * 2),
        ("modernbert", "dense", ["flash_attn_func"] * 2),
        ("llama4", "left", ["flash_attn_varlen_func"] * 2),
    ],
)
def test_which_function_answers(calls, name, batch, expected):
    architecture = {**tiny.DECODERS, **tiny.ENCODERS}[name]
    architecture.build(NAME)(input_ids=tiny.random_ids(), **BATCHES[batch])
    assert calls == expected


def test_packed_by_positions_of_a_cached_call(calls):
    """As FlashAttention's integration does, one sequence after the other in a batch of one row."""
    model, ids = tiny.DECODERS["mistral"].build(NAME), tiny.random_ids(1)
    found = model(input_ids=ids, position_ids=POSITIONS[:1]).logits
    assert calls == ["flash_attn_varlen_func"] * 2
    parts = [
        model(input_ids=ids[:, part]).logits for part in (slice(9), slice(9, 12), slice(12, 23))
    ]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)
    calls.clear()
    model(input_ids=ids, position_ids=torch.arange(SEQLEN)[None])
    assert calls == ["flash_attn_func"] * 2


def test_packed_by_arguments(calls):
    ids = tiny.random_ids(1)
    model = tiny.DECODERS["llama"].build(NAME)
    ends = torch.tensor([0, 9, 12, 23])
    found = model(
        input_ids=ids,
        position_ids=POSITIONS[:1],
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=11,
        max_length_k=11,
    ).logits
    assert calls == ["flash_attn_varlen_func"] * 2
    right = tiny.DECODERS["llama"].build("eager")
    expected = right(input_ids=ids, position_ids=POSITIONS[:1], use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_unregister_leaves_nothing_behind():
    unregister()
    unregister()
    assert NAME not in transformers.AttentionInterface._global_mapping
    assert NAME not in AttentionMaskInterface._global_mapping
    with pytest.raises(ValueError, match=NAME):
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**tiny.DECODER, attn_implementation=NAME)
        )


def test_the_package_does_not_import_transformers():
    code = "import sys, cute_kernels; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
