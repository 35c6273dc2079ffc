"""FlashAttention's modules on our kernels: its functions, and how other libraries call them."""

import importlib
import importlib.metadata
import inspect
import math
import random
import subprocess
import sys

import pytest
import torch
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads, random_packed
from parity import (
    assert_gradients_right,
    assert_right,
    random_qkv,
    skip_unless_answered,
    skip_unless_built,
)

import cute_kernels
from cute_kernels import compat
from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat import flash_attn_interface as fa3
from cute_kernels.compat.flash_attn import bert_padding
from cute_kernels.compat.flash_attn import flash_attn_interface as fa2_interface

SCALE = 0.3
MASKS = [(False, (-1, -1)), (True, (-1, -1)), (False, (5, 9))]


def dtype_of(device):
    return torch.bfloat16 if device == "cuda" else torch.float32


def skip_without_rows(device):
    skip_unless_answered(device, torch.bfloat16)
    for causal in (False, True) if device == "cuda" else ():
        skip_unless_built(torch.bfloat16, 64, causal)


def inputs_of(device, **sizes):
    skip_without_rows(device)
    sizes = {"seqlen_q": 33, "seqlen_k": 47, "heads": 4, "key_heads": 2, **sizes}
    return random_qkv(device, dtype_of(device), **sizes)


def packed_of(device, **options):
    skip_without_rows(device)
    chance = random.Random(0)
    slots = ([9, 0, 31], [12, 5, 40])
    return random_packed(chance, device, dtype_of(device), *slots, (64, 64), (4, 2), **options)


def like(*tensors):
    """Where gradients are to be written: NaN, and with strides of their own."""
    return [torch.full((*x.shape[:-1], 80), math.nan).to(x)[..., : x.shape[-1]] for x in tensors]


# Transformer Engine's context parallelism, of batches and of packed sequences


def te_forward(starts_q=None, starts_k=None, most_q=None, most_k=None, used_q=None, used_k=None):
    """What it passes after q, k and v, by position."""
    head = [None] * 4  # k_new, v_new, qv, out
    lengths = [starts_q, starts_k, None, used_q, used_k, most_q, most_k]
    return [*head, *lengths, *[None] * 9]  # page_table to v_descale


def te_backward(
    grads, starts_q=None, starts_k=None, most_q=None, most_k=None, used_q=None, used_k=None
):
    """What it passes after dout, q, k, v, out and softmax_lse."""
    return [starts_q, starts_k, used_q, used_k, most_q, most_k, *grads]


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("older", [False, True])
def test_calls_of_context_parallelism(device, causal, window, older):
    """`older`: the names that FlashAttention-3 had for the window and for causal before."""
    q, k, v = inputs_of(device)
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    options = {"softmax_scale": SCALE, **({"window_size": window} if older else sides)}
    lengths = (None, None, 33, 47)
    out, lse, *rest = fa3._flash_attn_forward(
        q, k, v, *te_forward(*lengths), causal=causal, num_splits=1, **options
    )
    assert_right(out, lse, q, k, v, SCALE, causal, window_size=window)
    assert [x.numel() for x in rest] == [0, 0]
    grads, dout = like(q, k, v), torch.randn_like(out)
    options["causal" if older else "is_causal"] = causal
    fa3._flash_attn_backward(
        dout, q, k, v, out, lse, *te_backward(grads, *lengths), deterministic=True, **options
    )
    assert_gradients_right(grads, dout, None, q, k, v, SCALE, causal, window_size=window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_packed_calls_of_context_parallelism(device, causal, used):
    """`used`: with padding between sequences."""
    packed = packed_of(device, used=used)
    given = packed.lengths()
    slots = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    used_rows, longest = (given["seqused_q"], given["seqused_k"]), (31, 40)
    options = {"softmax_scale": SCALE, "window_size_left": -1, "window_size_right": -1}
    out, lse, *_ = fa3._flash_attn_forward(
        *packed.qkv,
        *te_forward(*slots, *longest, *used_rows),
        causal=causal,
        **options,
    )
    grads, grad_out = like(*packed.qkv), random_grads(packed)[0]
    fa3._flash_attn_backward(
        grad_out,
        *packed.qkv,
        out,
        lse,
        *te_backward(grads, *slots, *longest, *used_rows),
        is_causal=causal,
        **options,
    )
    assert_packed_right(
        (out, lse, *grads), packed, (grad_out, None), softmax_scale=SCALE, causal=causal
    )


def test_gradients_of_a_part_of_the_keys_add_up(device):
    """With the output and the LSE of all keys, as rings have them."""
    q, k, v = inputs_of(device)
    out, lse, *_ = fa3._flash_attn_forward(q, k, v)
    dout, total = torch.randn_like(out), torch.zeros(q.shape, device=device)
    keys = []
    for part in (slice(0, 20), slice(20, 47)):
        ours = [x[:, part] for x in (k, v)]
        grads = like(q, *ours)
        fa3._flash_attn_backward(dout, q, *ours, out, lse, dq=grads[0], dk=grads[1], dv=grads[2])
        total += grads[0].float()
        keys.append(grads[1:])
    grads = [total, *(torch.cat(x, dim=1) for x in zip(*keys, strict=True))]
    exact = Attention(q, k, v, q.shape[-1] ** -0.5, False).gradients(dout)
    for name, grad, (right, allowed) in zip("qkv", grads, exact, strict=True):
        assert_rows(name, grad, right, 2 * allowed)  # rounded in parts


def test_softcap_of_the_gradients():
    """Those of the public function."""
    inputs = [x.requires_grad_() for x in inputs_of("cpu")]
    options = {"softcap": 0.5, "window_size": (30, -1)}
    out, lse, *_ = fa3._flash_attn_forward(*inputs, **options)
    expected = torch.autograd.grad(out, inputs, torch.ones_like(out))
    with torch.no_grad():
        grads = like(*inputs)
        names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        fa3._flash_attn_backward(torch.ones_like(out), *inputs, out, lse, **names, **options)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("causal", [False, True])
def test_used_lengths_of_a_batch(device, causal):
    """seqused of tensors that are not packed."""
    q, k, v = inputs_of(device)
    used_q, used_k = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in ([33, 12], [40, 17])
    )
    used = {"seqused_q": used_q, "seqused_k": used_k}
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, **used, causal=causal)
    assert out.shape == q.shape and lse.shape == (2, 4, 33)
    grads, dout = like(q, k, v), torch.randn_like(out)
    options = {"sequed_q": used_q, "sequed_k": used_k, "is_causal": causal}
    fa3._flash_attn_backward(
        dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], **options
    )
    for i, (of_q, of_k) in enumerate(zip(used_q.tolist(), used_k.tolist(), strict=True)):
        one = (q[i : i + 1, :of_q], k[i : i + 1, :of_k], v[i : i + 1, :of_k])
        assert_right(out[i : i + 1, :of_q], lse[i : i + 1, :, :of_q], *one, 64**-0.5, causal)
        parts = [grad[i : i + 1, :n] for grad, n in zip(grads, (of_q, of_k, of_k), strict=True)]
        assert_gradients_right(parts, dout[i : i + 1, :of_q], None, *one, 64**-0.5, causal)
        assert not any(grad[i, n:].any() for grad, n in zip(grads, (of_q, of_k, of_k), strict=True))


def test_output_is_written_where_asked(device):
    q, k, v = inputs_of(device)
    expected, _, *_ = fa3._flash_attn_forward(q, k, v)
    for name in ("out_", "out"):
        place = like(q)[0]
        out, *_ = fa3._flash_attn_forward(q, k, v, **{name: place})
        assert out is place and torch.equal(place, expected)


# Megatron's inference: packed queries, keys in pages


def megatron_forward(q, k, v, **given):
    names = (
        "k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
        "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
        "seqlens_rotary q_descale k_descale v_descale"
    )
    options = {
        **dict.fromkeys(names.split()),
        "softmax_scale": SCALE,
        "causal": True,
        "window_size": (-1, -1),
        "attention_chunk": 0,
        "softcap": 0.0,
        "rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,
        "pack_gqa": None,
        "sm_margin": 0,
    }
    return fa3._flash_attn_forward(q=q, k=k, v=v, **{**options, **given})


def test_calls_of_paged_inference(monkeypatch):
    """They go to flash_attn_with_kvcache, with its names."""
    asked = {}

    def with_kvcache(q, k_cache, v_cache, **options):
        asked.update(options)
        return q, q.new_zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(fa3, "flash_attn_with_kvcache", with_kvcache)
    q, cache = torch.randn(7, 4, 64), torch.randn(10, 16, 2, 64)
    table = torch.zeros(3, 4, dtype=torch.int32)
    used = torch.tensor([5, 40, 9], dtype=torch.int32)
    starts = torch.tensor([0, 1, 2, 7], dtype=torch.int32)
    given = {"cu_seqlens_q": starts, "seqused_k": used, "page_table": table, "max_seqlen_q": 5}
    out, lse, *_ = megatron_forward(q, cache, cache, max_seqlen_k=64, **given)
    assert out is q and lse.shape == (4, 7)
    assert asked["page_table"] is table and asked["cache_seqlens"] is used
    assert asked["cu_seqlens_q"] is starts and asked["max_seqlen_q"] == 5
    assert asked["causal"] is True and asked["softmax_scale"] == SCALE
    assert asked["return_softmax_lse"] is True and asked["num_splits"] == 0


def test_paged_inference_is_right():
    """And so is a cache with pages that FlashAttention-2 is asked for."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(10, 16, 2, 2, 64, generator=generator)
    table = torch.randperm(10, generator=generator)[:9].view(3, 3).int()
    used, lengths = [5, 40, 17], [1, 4, 2]
    q = torch.randn(sum(lengths), 4, 64, generator=generator)
    starts = torch.tensor([0, 1, 5, 7], dtype=torch.int32)
    out, lse, *_ = megatron_forward(
        q,
        pages[..., 0, :],
        pages[..., 1, :],
        cu_seqlens_q=starts,
        seqused_k=torch.tensor(used, dtype=torch.int32),
        page_table=table,
        max_seqlen_q=4,
        max_seqlen_k=48,
    )
    for i, n in enumerate(used):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        k, v = pages[table[i].long()].flatten(0, 1)[None, :n].unbind(-2)
        assert_right(out[None, rows], lse[None, :, rows], q[None, rows], k, v, SCALE, True)
    ends = torch.tensor([0, 5, 45, 62], dtype=torch.int32)
    options = {"softmax_scale": SCALE, "causal": True, "block_table": table}
    cache = (pages[..., 0, :], pages[..., 1, :])
    assert torch.equal(fa2.flash_attn_varlen_func(q, *cache, starts, ends, 4, 48, **options), out)


# Public functions


def test_flash_attention_3_has_our_names():
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        theirs, ours = (
            inspect.signature(getattr(module, name)).parameters for module in (fa3, cute_kernels)
        )
        assert [p for p in theirs if p != "s_aux"] == list(ours)
        assert theirs["s_aux"].default is None
    assert set(fa3.__all__) <= set(vars(fa3))


def test_the_positional_order_is_flash_attention_3s():
    """As its callers rely on it."""
    expected = {
        "flash_attn_func": "q k v softmax_scale causal qv q_descale k_descale v_descale "
        "window_size attention_chunk softcap num_splits pack_gqa deterministic sm_margin "
        "return_attn_probs",
        "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
        "seqused_q seqused_k softmax_scale causal qv q_descale k_descale v_descale window_size "
        "attention_chunk softcap num_splits pack_gqa deterministic sm_margin return_attn_probs",
        "_flash_attn_backward": "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q "
        "sequed_k max_seqlen_q max_seqlen_k dq dk dv softmax_scale is_causal window_size_left "
        "window_size_right softcap deterministic sm_margin",
        "_flash_attn_forward": "q k v k_new v_new qv out_ cu_seqlens_q cu_seqlens_k "
        "cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table kv_batch_idx "
        "leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale "
        "softmax_scale causal window_size_left window_size_right attention_chunk softcap "
        "rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin",
    }
    for name, order in expected.items():
        parameters = inspect.signature(getattr(fa3, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order.split()


def test_tensors_without_a_contiguous_last_dimension(device):
    q, k, v = inputs_of(device)
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in apart)
    for function in (fa3.flash_attn_func, fa2.flash_attn_func):
        assert torch.equal(function(*apart), cute_kernels.flash_attn_func(q, k, v))
        named = dict(zip("qkv", apart, strict=True))
        assert torch.equal(function(**named), cute_kernels.flash_attn_func(q, k, v))
    with pytest.raises(TypeError, match="k is a int"):
        fa3.flash_attn_func(q, 3, v)


def test_sinks_are_never_dropped():
    """transformers passes s_aux where a signature has it."""
    q, k, v = inputs_of("cpu")
    sinks = torch.randn(4)
    expected = cute_kernels.flash_attn_func(q, k, v, sinks=sinks)
    assert torch.equal(fa3.flash_attn_func(q, k, v, s_aux=sinks), expected)
    assert not torch.equal(expected, cute_kernels.flash_attn_func(q, k, v))


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("form", ["apart", "kv", "qkv"])
def test_flash_attention_2(device, form, causal, window):
    q, k, v = inputs_of(device, seqlen_q=47, key_heads=4 if form == "qkv" else 2)
    options = {"causal": causal, "window_size": window, "return_attn_probs": True}
    if form == "apart":
        results = fa2.flash_attn_func(q, k, v, 0.0, SCALE, **options)
    elif form == "kv":
        packed = torch.stack([k, v], dim=2)
        results = fa2.flash_attn_kvpacked_func(q, packed, 0.0, SCALE, **options)
    else:
        packed = torch.stack([q, k, v], dim=2)
        results = fa2.flash_attn_qkvpacked_func(packed, softmax_scale=SCALE, **options)
    out, lse, probabilities = results
    assert_right(out, lse, q, k, v, SCALE, causal, window_size=window)
    assert probabilities.numel() == 0


@pytest.mark.parametrize("form", ["apart", "kv", "qkv"])
def test_packed_sequences_of_flash_attention_2(device, form):
    packed = packed_of(device)
    if form == "qkv":
        packed.q = packed.k.new_zeros(57, 2, 64).normal_()
        packed.slots_q = packed.slots_k
    given = packed.lengths()
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"], 40, 40)
    options = {"causal": True, "return_attn_probs": True}
    kv = torch.stack(packed.qkv[1:], dim=1)
    if form == "apart":
        results = fa2.flash_attn_varlen_func(*packed.qkv, *lengths, **options)
    elif form == "kv":
        results = fa2.flash_attn_varlen_kvpacked_func(packed.q, kv, *lengths, **options)
    else:
        qkv = torch.stack(packed.qkv, dim=1)
        results = fa2.flash_attn_varlen_qkvpacked_func(qkv, lengths[0], 40, **options)
    assert_packed_right(results[:2], packed, causal=True)


def test_lengths_of_the_longest_may_be_tensors():
    """As many callers have them, of a batch that is on the GPU: FlashAttention waits for it."""
    starts = torch.tensor([0, 7, 20], dtype=torch.int32)
    longest = starts.diff().max()
    q, k, v = torch.randn(3, 20, 2, 16)
    expected = cute_kernels.flash_attn_varlen_func(q, k, v, starts, starts, causal=True)
    call = (q, k, v, starts, starts)
    for module in (fa2, fa3):
        given = module.flash_attn_varlen_func(*call, longest, longest, causal=True)
        assert torch.equal(given, expected)
        by_name = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        assert torch.equal(module.flash_attn_varlen_func(*call, **by_name, causal=True), expected)
    qkv = torch.stack([q, k, v], 1)
    given = fa2.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True)
    assert torch.equal(given, expected)
    caches, rotary = torch.randn(2, 2, 32, 2, 16), torch.ones(40, 8)
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    new = {"k": torch.ones(2, 1, 2, 16), "v": torch.ones(2, 1, 2, 16), "rotary_seqlens": lengths}
    options = {"rotary_cos": rotary, "rotary_sin": rotary, "cu_seqlens_q": starts, **new}
    results = [
        fa3.flash_attn_with_kvcache(
            q, *caches.clone(), cache_seqlens=lengths, max_seqlen_q=number, **options
        )
        for number in (13, longest)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("head_dim", [33, 60, 64])
def test_head_dims_are_padded(device, head_dim):
    inputs = [x.requires_grad_() for x in inputs_of(device, head_dim=head_dim)]
    out, lse, _ = fa2.flash_attn_func(*inputs, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, dout)
    q, k, v = (x.detach() for x in inputs)
    assert_right(out.detach(), lse.detach(), q, k, v, head_dim**-0.5, True)
    assert_gradients_right(grads, dout, None, q, k, v, head_dim**-0.5, True)


def test_rings_of_flash_attention_2(device):
    """The functions below the public ones, by position."""
    q, k, v = inputs_of(device)
    out, lse, *rest = fa2_interface._flash_attn_forward(
        q, k, v, 0.0, SCALE, True, -1, -1, 0.0, None, False
    )
    assert len(rest) == 2 and not out.requires_grad
    assert_right(out, lse, q, k, v, SCALE, True)
    grads, dout = like(q, k, v), torch.randn_like(out)
    fa2_interface._flash_attn_backward(
        dout, q, k, v, out, lse, *grads, 0.0, SCALE, True, -1, -1, 0.0, None, True
    )
    assert_gradients_right(grads, dout, None, q, k, v, SCALE, True)


def test_packed_rings_of_flash_attention_2(device):
    packed = packed_of(device)
    given = packed.lengths()
    lengths = (given["cu_seqlens_q"], given["cu_seqlens_k"], 31, 40)
    out, lse, *_ = fa2_interface._flash_attn_varlen_forward(*packed.qkv, *lengths, 0.0, SCALE, True)
    grads, grad_out = like(*packed.qkv), random_grads(packed)[0]
    fa2_interface._flash_attn_varlen_backward(
        grad_out, *packed.qkv, out, lse, *grads, *lengths, 0.0, SCALE, True, -1, -1, 0.0, None, True
    )
    results = (out, lse, *grads)
    assert_packed_right(results, packed, (grad_out, None), softmax_scale=SCALE, causal=True)


@pytest.mark.parametrize("unused", [False, True])
def test_padding(device, unused):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], device=device)
    extra = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], device=device)
    x = torch.randn(3, 4, 2, 8, device=device, requires_grad=True)
    given = (x, mask, extra) if unused else (x, mask)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(*given)
    kept = (mask + extra if unused else mask).bool()
    assert torch.equal(rows, x[kept])
    assert cu_seqlens.tolist() == ([0, 3, 3, 7] if unused else [0, 2, 2, 6])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert longest == 4 and used.tolist() == [2, 0, 4]
    padded = bert_padding.pad_input(rows, indices, 3, 4)
    assert torch.equal(padded, x * kept[..., None, None])
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, kept[..., None, None].expand_as(x).to(grad))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_batch", [False, True])
def test_alibi_falls_on_both_sides(by_batch, causal):
    """On CUDA a variant compiles, see test_variants_gpu.py."""
    q = torch.randn(2, 5, 4, 16, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 9, 2, 16, dtype=torch.float64)
    slopes = torch.rand(2, 4) if by_batch else torch.rand(4)
    apart = (torch.arange(5)[:, None] + 4 - torch.arange(9)).abs()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 4
    scores = scores - slopes.view(-1, 4, 1, 1) * apart
    if causal:
        scores = scores.masked_fill(torch.arange(9) > torch.arange(5)[:, None] + 4, -math.inf)
    right = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.repeat_interleave(2, 2))
    dense = fa2.flash_attn_func(q, k, v, causal=causal, alibi_slopes=slopes)
    ends = [torch.arange(3, dtype=torch.int32) * n for n in (5, 9)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    of_packed = fa2.flash_attn_varlen_func(*packed, *ends, 5, 9, causal=causal, alibi_slopes=slopes)
    (exact,) = torch.autograd.grad(right.square().sum(), q)
    for out in (dense, of_packed.view_as(right)):
        assert torch.allclose(out, right, rtol=1e-6, atol=1e-7)
        (grad,) = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
        assert torch.allclose(grad, exact, rtol=1e-5, atol=1e-6)


def test_dropout_leaves_some_of_p():
    """Scores are all 0, and V shows P."""
    zeros = torch.zeros(2, 64, 2, 64)
    shown = torch.eye(64)[None, :, None].expand(2, 64, 2, 64)
    torch.manual_seed(1)
    found = [fa2.flash_attn_func(zeros, zeros, shown, 0.25) for _ in range(2)]
    torch.manual_seed(1)
    assert torch.equal(fa2.flash_attn_func(zeros, zeros, shown, 0.25), found[0])
    for p in found:
        kept = p > 0
        assert torch.allclose(p[kept], torch.tensor(1 / 64 / 0.75))
        assert 0.72 < kept.float().mean() < 0.78
    assert 0.5 < ((found[0] > 0) == (found[1] > 0)).float().mean() < 0.75


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: fa2.flash_attn_interface._flash_attn_forward(x, x, x, 0.1, None, False),
            NotImplementedError,
            "dropout_p is 0.1, must be 0 here; flash_attn_func takes it",
        ),
        (
            lambda x: fa2.flash_attn_with_kvcache(x, x, x, alibi_slopes=torch.ones(4)),
            NotImplementedError,
            "alibi_slopes is given, must be None here",
        ),
        (
            lambda x: fa2.flash_attn_func(x, x, x, 0.1, alibi_slopes=torch.ones(4)),
            NotImplementedError,
            "dropout_p is 0.1, must be 0 with alibi_slopes",
        ),
        (
            lambda x: fa2.flash_attn_func(x, x, x, alibi_slopes=torch.ones(())),
            ValueError,
            r"alibi_slopes has shape \(\), must be \(heads,\) or \(batch, heads\)",
        ),
        (lambda x: fa2.flash_attn_qkvpacked_func(x), ValueError, r"qkv has shape .*3, heads"),
        (
            lambda x: fa3._flash_attn_backward(x, x, x, x, x, x[..., 0], dq=x, dk=x),
            ValueError,
            "dv is None",
        ),
        (
            lambda x: fa3._flash_attn_backward(x, x, x, x, x, x[..., 0], dq=x[:1], dk=x, dv=x),
            ValueError,
            r"dq has shape .*like q",
        ),
        (lambda x: compat.install([4]), ValueError, "versions has 4"),
        (
            lambda x: fa3._flash_attn_forward(x, x, x, x, x, seqused_q=torch.ones(1).int()),
            NotImplementedError,
            "seqused_q is given, must be None with a cache",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 8, 4, 64))


# install and uninstall

NAMES = ("flash_attn", "flash_attn.bert_padding", "flash_attn_interface")


@pytest.fixture
def installed():
    before = {name: module for name, module in sys.modules.items() if "flash_attn" in name}
    finders = list(sys.meta_path)
    compat.install()
    yield
    compat.uninstall()
    after = {name: module for name, module in sys.modules.items() if "flash_attn" in name}
    assert after == before and sys.meta_path == finders


def test_install(installed):
    from flash_attn import flash_attn_func as second
    from flash_attn.bert_padding import pad_input
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
    from flash_attn_3.flash_attn_interface import _flash_attn_forward
    from flash_attn_interface import flash_attn_func as third

    assert second is fa2.flash_attn_func and third is fa3.flash_attn_func
    assert pad_input is bert_padding.pad_input
    assert _flash_attn_forward is fa3._flash_attn_forward
    assert _flash_attn_varlen_forward is fa2_interface._flash_attn_varlen_forward
    for name in NAMES:
        assert importlib.util.find_spec(name) is not None
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.ops")
    assert importlib.metadata.version("flash-attn-3") == "3.0.0"
    assert importlib.metadata.version("flash_attn") == fa2.__version__
    owners = importlib.metadata.packages_distributions()
    assert owners["flash_attn_interface"] == ["flash-attn-3"] == owners["flash_attn_3"]
    assert owners["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.version("cute-kernels") == cute_kernels.__version__


def test_uninstall_leaves_nothing_behind(installed):
    compat.install([3])  # instead of the one before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    compat.uninstall()
    compat.uninstall()
    for name in NAMES:
        assert name not in sys.modules
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-3")


TRANSFORMERS = """
from cute_kernels import compat
compat.install()
from transformers.utils import import_utils
import torch, transformers.modeling_flash_attention_utils as utils
import_utils.is_torch_cuda_available = lambda: True
assert import_utils.is_flash_attn_3_available() and import_utils.is_flash_attn_2_available()
(dense, packed, *_), (process, _) = utils.lazy_import_flash_attention("flash_attention_3")
from cute_kernels.compat import flash_attn_interface
assert dense is flash_attn_interface.flash_attn_func
q = torch.randn(2, 9, 4, 16)
mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
found = utils._flash_attention_forward(
    q, q, q, mask, 9, True, attn_implementation="flash_attention_3", sliding_window=3
)
right = dense(q[:1, 4:], q[:1, 4:], q[:1, 4:], causal=True, window_size=(2, 0))
torch.testing.assert_close(found[:1, 4:], right)
assert process(query_length=9, key_length=9, is_causal=True, s_aux=q)["s_aux"] is q
print("right")
"""


def test_transformers_finds_it():
    pytest.importorskip("transformers", reason="needs transformers")
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr


def test_used_queries_of_pages():
    """Which FlashAttention-3's operator takes by position."""
    q = torch.randn(7, 4, 64).bfloat16()
    caches = torch.randn(2, 6, 16, 2, 64).bfloat16()
    table = torch.tensor([[0, 1, 2], [5, 4, 3]], dtype=torch.int32)
    starts, used, lengths = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 7], [2, 3], [40, 17])
    )
    given = {"seqused_q": used, "seqused_k": lengths, "page_table": table, "causal": True}
    out, lse, *_ = fa3._flash_attn_forward(q, *caches, cu_seqlens_q=starts, **given)
    right = cute_kernels.flash_attn_varlen_func(q, *caches, starts, **given, return_lse=True)
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])
    assert not out[2:4].any() and out[[0, 1, 4, 5, 6]].any(-1).all()
