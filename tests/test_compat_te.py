"""Transformer Engine's calls of FlashAttention-3's public functions, as its release 2.20.2 makes
them: with and without softcap and padding between sequences, and of its caches."""

import random

import pytest
import torch
from caches import assert_attention_right, skip_unless_attended
from packed import assert_packed_right, random_grads, random_packed
from parity import assert_gradients_right, assert_right, random_qkv, skip_unless_answered

from cute_kernels.compat import flash_attn_interface as fa3

SCALE = 0.3


def dtype_of(device, softcap):
    skip_unless_answered(device, torch.bfloat16, softcap=softcap > 0)
    return torch.bfloat16 if device == "cuda" else torch.float32


def given(causal, softcap, **others):
    """What all of its calls have by name; softcap is left out where there is none."""
    window = (-1, 0) if causal else (-1, -1)
    common = {"softmax_scale": SCALE, "causal": causal, "window_size": window, "num_splits": 1}
    return {**common, **({"softcap": softcap} if softcap else {}), **others}


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_batches(device, causal, softcap):
    q, k, v = random_qkv(device, dtype_of(device, softcap), seqlen_q=33, seqlen_k=47, key_heads=2)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = fa3.flash_attn_func(*inputs, **given(causal, softcap, deterministic=True))
    assert isinstance(out, torch.Tensor)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, grad_out)
    right = (q.detach(), k.detach(), v.detach(), SCALE, causal)
    _, lse, *_ = fa3._flash_attn_forward(*right[:3], **given(causal, softcap))
    assert_right(out.detach(), lse, *right, softcap=softcap)
    assert_gradients_right(grads, grad_out, None, *right, softcap=softcap)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences(device, padded, softcap):
    dtype = dtype_of(device, softcap)
    slots = ([9, 0, 31], [12, 5, 40])
    packed = random_packed(random.Random(0), device, dtype, *slots, (64, 64), (4, 2), used=padded)
    lengths = packed.lengths()
    by_position = (lengths["cu_seqlens_q"], lengths["cu_seqlens_k"], 31, 40)
    used = {name: lengths[name] for name in ("seqused_q", "seqused_k")} if padded else {}
    inputs = [x.detach().requires_grad_() for x in packed.qkv]
    options = given(True, softcap, deterministic=False, **used)
    out = fa3.flash_attn_varlen_func(*inputs, *by_position, **options)
    grad_out = random_grads(packed)[0]
    grads = torch.autograd.grad(out, inputs, grad_out)
    lse = packed.run(softmax_scale=SCALE, causal=True, softcap=softcap)[1]
    assert_packed_right(
        (out.detach(), lse, *grads),
        packed,
        (grad_out, None),
        softmax_scale=SCALE,
        causal=True,
        softcap=softcap,
    )


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("paged", [False, True])
def test_inference(device, paged, softcap):
    """Packed queries against caches, in pages or an entry a sequence."""
    skip_unless_attended(device, torch.bfloat16, (64, 64))
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = (9, 16, 2, 64) if paged else (3, 48, 2, 64)
    k_cache, v_cache = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for _ in "kv"
    )
    lengths, queries = [5, 40, 17], [1, 4, 2]
    q = torch.randn(7, 4, 64, generator=generator, device=device).to(dtype)
    starts, ends = (
        torch.tensor([0, *x], device=device).cumsum(0).int() for x in (queries, lengths)
    )
    places = {}
    if paged:
        table = torch.randperm(9, generator=generator, device=device).view(3, 3).int()
        places["page_table"] = table
        k, v = (cache[table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
    else:
        k, v = k_cache, v_cache
    options = given(True, softcap, cu_seqlens_q=starts, max_seqlen_q=4, **places)
    options["cache_seqlens"] = ends[1:] - ends[:-1]
    out, lse, *_ = fa3.flash_attn_with_kvcache(
        q, k_cache, v_cache, **options, return_softmax_lse=True
    )
    assert torch.equal(fa3.flash_attn_with_kvcache(q, k_cache, v_cache, **options), out)
    used = [[x[i, :n] for i, n in enumerate(lengths)] for x in (k, v)]
    assert_attention_right(out, lse, q, starts, *used, SCALE, True, softcap=softcap)
