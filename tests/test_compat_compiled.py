"""What libraries call of FlashAttention-2's compiled module, by position, as xformers does."""

import math

import pytest
import torch
from flash_attention_calls import MASKS, SCALE, inputs_of, like, packed_of
from packed import assert_packed_right, random_grads
from parity import assert_gradients_right, assert_right

from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat.flash_attn import flash_attn_interface as fa2_interface

compiled = fa2_interface.flash_attn_gpu


@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("given", [False, True])
def test_batches(device, given, causal, window):
    """`given`: where results are to be written."""
    q, k, v = inputs_of(device)
    place = like(q)[0] if given else None
    out, lse, *rest = compiled.fwd(
        q, k, v, place, None, 0.0, SCALE, causal, *window, 0.0, False, None
    )
    assert (out is place) == given and len(rest) == 2
    assert_right(out, lse, q, k, v, SCALE, causal, window_size=window)
    dout, places = torch.randn_like(out), like(q, k, v) if given else [None] * 3
    *grads, empty = compiled.bwd(
        *(dout, q, k, v, out, lse, *places, None, 0.0, SCALE, causal, *window),
        *(0.0, False, None, rest[1]),
    )
    assert empty.numel() == 0
    assert not given or all(x is y for x, y in zip(grads, places, strict=True))
    assert_gradients_right(grads, dout, None, q, k, v, SCALE, causal, window_size=window)


@pytest.mark.parametrize("given", [False, True])
def test_packed_sequences(device, given):
    packed = packed_of(device)
    lengths = packed.lengths()
    starts, longest = (lengths["cu_seqlens_q"], lengths["cu_seqlens_k"]), (31, 40)
    out, lse, *_ = compiled.varlen_fwd(
        *(*packed.qkv, None, *starts, None, None, None, None, *longest, 0.0, SCALE, False),
        *(True, -1, -1, 0.0, False, None),
    )
    grad_out, places = random_grads(packed)[0], like(*packed.qkv) if given else [None] * 3
    *grads, _ = compiled.varlen_bwd(
        *(grad_out, *packed.qkv, out, lse, *places, *starts, None, *longest, 0.0, SCALE, False),
        *(True, -1, -1, 0.0, True, None, None),
    )
    results = (out, lse, *grads)
    assert_packed_right(results, packed, (grad_out, None), softmax_scale=SCALE, causal=True)


@pytest.mark.parametrize("used", [False, True])
def test_pages(used):
    """Lengths of keys by what they use, or by where they begin."""
    q, pages = torch.randn(7, 4, 64), torch.randn(2, 6, 16, 2, 64)
    table = torch.tensor([[0, 4, 2], [5, 1, 3]], dtype=torch.int32)
    starts, ends, lengths = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 7], [0, 40, 57], [40, 17])
    )
    slots = torch.tensor([0, 48, 96], dtype=torch.int32) if used else ends
    out, lse, *_ = compiled.varlen_fwd(
        *(q, *pages, None, starts, slots, lengths if used else None, None, table, None, 4, 48),
        *(0.0, SCALE, False, True, -1, -1, 0.0, False, None),
    )
    for i, n in enumerate(lengths.tolist()):
        rows = slice(int(starts[i]), int(starts[i + 1]))
        k, v = (x[table[i].long()].flatten(0, 1)[None, :n] for x in pages)
        assert_right(out[None, rows], lse[None, :, rows], q[None, rows], k, v, SCALE, True)


@pytest.mark.parametrize("given", [False, True])
def test_caches(given):
    q, new = torch.randn(2, 3, 4, 16), torch.randn(2, 2, 3, 2, 16)
    caches = torch.randn(2, 2, 20, 2, 16)
    lengths = torch.tensor([5, 17], dtype=torch.int32)
    twice = [caches.clone(), caches.clone()]
    right = fa2.flash_attn_with_kvcache(
        q, *twice[0], *new, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )
    place = torch.full_like(q, math.nan) if given else None
    out, lse = compiled.fwd_kvcache(
        *(q, *twice[1], *new, lengths, None, None, None, None, None, None, place, 0.25),
        *(True, -1, -1, 0.0, True, 0),
    )
    assert (out is place) == given
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])
    assert torch.equal(*twice) and not torch.equal(twice[0], caches)


def test_what_it_lacks_is_named():
    x = torch.randn(1, 5, 4, 16)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0.1, must be 0"):
        compiled.fwd(x, x, x, None, None, 0.1, SCALE, True, -1, -1, 0.0, False, None)
    with pytest.raises(ValueError, match=r"^out has shape"):
        compiled.fwd(x, x, x, x[:, :1], None, 0.0, SCALE, True, -1, -1, 0.0, False, None)
    with pytest.raises(NotImplementedError, match="leftpad_k is not there"):
        compiled.varlen_fwd(
            *(*[x[0]] * 3, None, starts, starts, None, starts[:1], None, None, 5, 5, 0.0),
            *(SCALE, False, True, -1, -1, 0.0, False, None),
        )
