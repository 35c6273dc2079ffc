"""The integration with transformers on a GPU: as right as the others, steps that do not wait."""

import pytest
import tiny_models as tiny
import torch
from model_runs import (
    BATCHES,
    NAME,
    SEQLEN,
    implementations,
    kept_of,
    left_padding,
    noted_calls,
    off,
    results,
)
from parity import skip_unless_answered
from transformers.masking_utils import causal_mask_function

from cute_kernels.integrations.transformers import attention, masks
from cute_kernels.interface import flash_attn_func

pytestmark = pytest.mark.usefixtures("in_transformers")
calls = pytest.fixture(noted_calls)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", tiny.DECODERS)
def test_decoders_on_a_gpu(hopper, name, batch):
    """bf16: at most twice as far from fp32 as the others."""
    skip_unless_answered(hopper, torch.bfloat16, *((192, 128) if name == "deepseek" else (64,)))
    architecture = tiny.DECODERS[name]
    inputs = {"input_ids": tiny.random_ids(), **BATCHES[batch]}
    kept = kept_of(inputs)
    right = results(architecture.build("eager", torch.bfloat16).float(), kept, **inputs)
    on_gpu = {k: x.to(hopper) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    found = {}
    for implementation in (NAME, *implementations(architecture)):
        model = architecture.build(implementation, torch.bfloat16).to(hopper)
        found[implementation] = [x.cpu() for x in results(model, kept.to(hopper), **on_gpu)]
    errors = [off(x, right) for x in found.values()]
    for error, *of_others in zip(*errors, strict=True):
        assert error <= 2 * min(of_others) + torch.finfo(torch.bfloat16).eps


def test_fp32_on_a_gpu_falls_back(hopper, calls):
    model = tiny.DECODERS["llama"].build(NAME).to(hopper)
    with pytest.warns(UserWarning, match="no float32 on cuda"):
        model(input_ids=tiny.random_ids().to(hopper))
    assert calls == ["sdpa_attention_forward"] * 2


def test_a_step_on_a_static_cache_does_not_wait(hopper):
    skip_unless_answered(hopper, torch.bfloat16)
    layer = torch.nn.Module()
    layer.is_causal = True
    q, k, v = (
        torch.randn(3, heads, seqlen, 64, device=hopper, dtype=torch.bfloat16)
        for heads, seqlen in ((4, 1), (2, 40), (2, 40))
    )
    filled = torch.tensor(18, device=hopper)

    def step():
        mask = masks.mask(3, 1, 40, filled, 0, causal_mask_function, None, device=hopper)
        return attention.attention(layer, q, k, v, mask)[0]

    first = step()  # loads what is waited for
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = flash_attn_func(*(x.transpose(1, 2) for x in (q, k[:, :, :19], v[:, :, :19])))
    for found in (first, second):
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_on_a_gpu(hopper, cache):
    """Static caches run compiled steps."""
    options = {"max_new_tokens": 9, "do_sample": False}
    if cache is not None:
        options["cache_implementation"] = cache
    skip_unless_answered(hopper, torch.bfloat16)
    mask = left_padding().to(hopper)
    model = tiny.DECODERS["mistral"].build(NAME, torch.bfloat16).to(hopper)
    tokens = model.generate(tiny.random_ids().to(hopper), attention_mask=mask, **options)
    assert tokens.shape == (3, SEQLEN + 9)
    # Each token is one of nearly the largest logits of the model in fp32 that sees what came before
    right = tiny.DECODERS["mistral"].build("eager", torch.bfloat16).float()
    whole = torch.cat([left_padding(), torch.ones(3, 9, dtype=torch.long)], dim=1)
    logits = right(input_ids=tokens.cpu(), attention_mask=whole).logits[:, SEQLEN - 1 : -1]
    chosen = logits.gather(2, tokens.cpu()[:, SEQLEN:, None])[..., 0]
    assert (logits.amax(-1) - chosen <= 0.05 * logits.abs().amax()).all()
