"""FlashAttention-2's module on our kernels: packed tensors, rings, padding, ALiBi, dropout."""

import math

import pytest
import torch
from flash_attention_calls import MASKS, SCALE, inputs_of, like, packed_of, skip_without_rows
from packed import assert_packed_right, random_grads
from parity import assert_gradients_right, assert_right

from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat.flash_attn import bert_padding
from cute_kernels.compat.flash_attn import flash_attn_interface as fa2_interface


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
    out, lse, *_ = fa2_interface._flash_attn_varlen_forward(
        *packed.qkv, *lengths, 0.0, SCALE, True, zero_tensors=True
    )
    grads, grad_out = like(*packed.qkv), random_grads(packed)[0]
    fa2_interface._flash_attn_varlen_backward(
        grad_out, *packed.qkv, out, lse, *grads, *lengths, 0.0, SCALE, True, -1, -1, 0.0, None, True
    )
    results = (out, lse, *grads)
    assert_packed_right(results, packed, (grad_out, None), softmax_scale=SCALE, causal=True)


@pytest.mark.parametrize("head_dim", [20, 59])
def test_caches_whose_head_dim_is_padded(device, head_dim):
    skip_without_rows(device)
    q, k, v = inputs_of(device, batch=2, seqlen_q=3, seqlen_k=3, head_dim=head_dim)
    caches = torch.randn(2, 2, 40, 2, head_dim, device=device).to(q.dtype)
    lengths = torch.tensor([30, 7], dtype=torch.int32, device=device)
    right = caches.clone()
    for i, n in enumerate(lengths.tolist()):
        right[0, i, n : n + 3], right[1, i, n : n + 3] = k[i], v[i]
    out, lse = fa2.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    assert torch.equal(caches, right)
    for i, n in enumerate(lengths.tolist()):
        of_one = (x[i : i + 1] for x in (out, lse, q))
        own = (x[i : i + 1, : n + 3] for x in right)
        assert_right(*of_one, *own, head_dim**-0.5, True)
    again = fa2.flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths + 3, causal=True)
    assert torch.equal(again, out)


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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padding_by_indices_of_either_dtype(device, dtype):
    x = torch.randn(4, 2, 8, device=device, requires_grad=True)
    indices = torch.tensor([3, 0], dtype=dtype, device=device)
    rows = bert_padding.index_first_axis(x, indices)
    assert torch.equal(rows, x[[3, 0]])
    padded = bert_padding.pad_input(rows, indices, 2, 2)
    right = torch.zeros_like(x)
    right[[3, 0]] = rows.detach()
    assert torch.equal(padded, right.view(2, 2, 2, 8))
    (grad,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(grad, (right != 0).to(grad))


def test_padding_of_rows_that_hold_several_sequences(device):
    """Two of 3 and 2 rows; none; one of 6, which are all."""
    lengths = torch.tensor([[3, 2, 0, 0, 0, 0], [0] * 6, [6, 0, 0, 0, 0, 0]], device=device)
    x = torch.randn(3, 6, 2, 8, device=device, requires_grad=True)
    unpad = bert_padding.unpad_input_for_concatenated_sequences
    rows, indices, cu_seqlens, longest = unpad(x, lengths)
    assert torch.equal(rows, torch.cat([x[0, :5], x[2]]))
    assert cu_seqlens.tolist() == [0, 3, 5, 11] and cu_seqlens.dtype == torch.int32
    assert longest == 6
    padded = bert_padding.pad_input(rows, indices, 3, 6)
    assert torch.equal(padded[0, :5], x[0, :5]) and not padded[1].any() and not padded[0, 5].any()
    assert unpad(x, torch.zeros_like(lengths))[2].tolist() == [0]


def test_rows_with_a_residual():
    x = torch.randn(6, 3, requires_grad=True)
    rows, residual = bert_padding.index_first_axis_residual(x, torch.tensor([4, 1]))
    assert torch.equal(rows, x[[4, 1]]) and rows.requires_grad
    assert torch.equal(residual, x) and not residual.requires_grad


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


REFUSED = {
    "slopes of 16 bits": (
        TypeError,
        "^alibi_slopes has dtype",
        {"alibi_slopes": torch.ones(4).half()},
    ),
    "slopes of other heads": (
        ValueError,
        "^alibi_slopes has shape",
        {"alibi_slopes": torch.ones(3)},
    ),
    "a list of slopes": (TypeError, "^alibi_slopes is a list", {"alibi_slopes": [1.0] * 4}),
    "all dropped": (ValueError, "^dropout_p is 1.0, must be", {"dropout_p": 1.0}),
    "no rate": (TypeError, "^dropout_p is None, must be a number", {"dropout_p": None}),
    "k is none": (TypeError, "^k is a list, must be", {"k": [1.0]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_have_its_names(case):
    error, message, options = REFUSED[case]
    x = torch.randn(2, 5, 4, 16)
    with pytest.raises(error, match=message):
        fa2.flash_attn_func(**{"q": x, "k": x, "v": x, **options})
    with pytest.raises(TypeError, match=r"^kv is a list, must be"):
        fa2.flash_attn_kvpacked_func(x, [x, x])


def test_errors_of_pages_and_gradients_have_its_names():
    q, k = torch.randn(2, 4, 4, 16), torch.randn(2, 4, 2, 16)
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    paged = (q.flatten(0, 1), k, k, starts)
    with pytest.raises(NotImplementedError, match="with block_table: alibi_slopes is given"):
        fa2.flash_attn_varlen_func(
            *paged, starts, 4, 4, block_table=table, alibi_slopes=torch.rand(4)
        )
    with pytest.raises(TypeError, match=r"^cu_seqlens_k is a NoneType"):
        fa2.flash_attn_varlen_func(*paged, None, 4, 4, block_table=table)
    with pytest.raises(TypeError, match=r"^k is a list"):
        fa2.flash_attn_with_kvcache(q, k, k, [1], k, cache_seqlens=0)
    with pytest.raises(ValueError, match=r"^q has shape \(\)"):
        fa2.flash_attn_func(torch.tensor(1.0), k, k)
    grads = [torch.empty_like(x) for x in (q, k, k)]
    with pytest.raises(TypeError, match=r"^softmax_lse is a str"):
        fa2_interface._flash_attn_backward(q, q, k, k, q, "x", *grads, 0.0, 0.3, False)
    with pytest.raises(TypeError, match=r"^dq is a list"):
        fa2_interface._flash_attn_backward(
            q, q, k, k, q, torch.ones(2, 4, 4), [1], *grads[1:], 0.0, 0.3, False
        )


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("by_alibi", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_alibi_and_softcap_together(dropout_p, by_alibi, softcap, packed):
    """V shows P."""
    q, k = 2 * torch.randn(2, 2, 48, 4, 48, dtype=torch.float64)
    shown = torch.eye(48, dtype=torch.float64)[None, :, None].expand(2, 48, 4, 48)
    slopes = torch.rand(2, 4) if by_alibi else None
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.2
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(48)
    if by_alibi:
        scores = scores - slopes[..., None, None] * (place[:, None] - place).abs()
    right = scores.masked_fill(place > place[:, None], -math.inf).softmax(-1).transpose(1, 2)
    options = {"softcap": softcap, "alibi_slopes": slopes, "causal": True, "softmax_scale": 0.2}
    if packed:
        starts = torch.tensor([0, 48, 96], dtype=torch.int32)
        rows = [x.flatten(0, 1) for x in (q, k, shown)]
        p = fa2.flash_attn_varlen_func(*rows, starts, starts, 48, 48, dropout_p, **options)
        p = p.view_as(right)
    else:
        p = fa2.flash_attn_func(q, k, shown, dropout_p, **options)
    kept = p != 0
    seen = right > 0
    torch.testing.assert_close(p[kept], right[kept] / (1 - dropout_p), rtol=1e-6, atol=1e-9)
    assert abs(kept[seen].double().mean() - (1 - dropout_p)) < 0.03 * (dropout_p > 0) + 1e-9


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
