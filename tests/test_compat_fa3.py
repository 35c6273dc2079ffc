"""FlashAttention-3's functions below the public ones, as other libraries call them: Transformer
Engine's context parallelism, Megatron's inference."""

import pickle

import pytest
import torch
from flash_attention_calls import MASKS, SCALE, inputs_of, like, packed_of
from oracle import Attention, assert_rows
from packed import assert_packed_right, random_grads
from parity import assert_gradients_right, assert_right

import cute_kernels
from cute_kernels.compat import flash_attn as fa2
from cute_kernels.compat import flash_attn_interface as fa3

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


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (torch.empty(2, 5, 4, 16), ValueError),  # what one batch entry would be repeated in
        (torch.empty(1, 5, 4, 8), ValueError),
        (torch.empty(1, 5, 4, 16, dtype=torch.half), TypeError),
        ([1.0], TypeError),
    ],
)
def test_an_output_of_another_kind_is_refused(out, error):
    x = torch.randn(1, 5, 4, 16)
    with pytest.raises(error, match=r"^out (has|is) "):
        fa3._flash_attn_forward(x, x, x, out_=out)


def test_used_lengths_are_of_batches():
    x, used = torch.randn(10, 4, 16), torch.tensor([3, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^q has shape \(10, 4, 16\), must have 4 dimensions"):
        fa3._flash_attn_forward(x, x, x, seqused_k=used)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_cache_gives_as_many_results_as_there(needs_gradient):
    """Its callers may unpack four."""
    q = torch.randn(2, 3, 4, 16, requires_grad=needs_gradient)
    caches = torch.randn(2, 2, 8, 2, 16)
    options = {"cache_seqlens": torch.tensor([5, 8], dtype=torch.int32), "causal": True}
    with torch.no_grad():
        right = cute_kernels.flash_attn_with_kvcache(q, *caches, **options, return_softmax_lse=True)
    out, lse, *parts = fa3.flash_attn_with_kvcache(q, *caches, **options, return_softmax_lse=True)
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])
    assert [(x.shape, x.dtype) for x in parts] == [((0,), torch.float32)] * 2
    assert torch.equal(fa3.flash_attn_with_kvcache(q, *caches, **options), out)


def test_sinks_have_one_name_at_a_time():
    x, sinks = torch.randn(1, 5, 4, 16), torch.zeros(4)
    with pytest.raises(ValueError, match=r"^s_aux is given, must be None with sinks"):
        fa3.flash_attn_func(x, x, x, s_aux=sinks, sinks=sinks)


def test_metadata_changes_nothing():
    metadata = torch.empty(0, dtype=torch.int32)
    q, starts = torch.randn(6, 4, 16), torch.tensor([0, 2, 6], dtype=torch.int32)
    packed = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 4, "max_seqlen_k": 4}
    dense = torch.randn(2, 3, 4, 16)
    used = {"seqused_q": torch.tensor([1, 2], dtype=torch.int32)}
    for x, options in ((q, packed), (dense, used), (dense, {})):
        x = x.clone().requires_grad_()
        results = [
            fa3._flash_attn_forward(x, x, x, **options, **more)[0]
            for more in ({}, {"scheduler_metadata": metadata})
        ]
        assert torch.equal(*results)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in results))


def test_lengths_of_keys_do_not_go_with_pages():
    q, pages = torch.randn(3, 2, 16), torch.randn(4, 2, 2, 16)
    starts, keys = (torch.tensor([0, n], dtype=torch.int32) for n in (3, 1))
    of_pages = {"page_table": torch.tensor([[0, 1]], dtype=torch.int32), "cu_seqlens_q": starts}
    for used in ({}, {"seqused_q": starts[1:], "seqused_k": starts[1:]}):
        with pytest.raises(ValueError, match=r"^cu_seqlens_k is given, must be None with page_tab"):
            fa3._flash_attn_forward(q, pages, pages, **of_pages, cu_seqlens_k=keys, **used)


def test_functions_can_be_pickled():
    for name in fa3.__all__:
        assert pickle.loads(pickle.dumps(getattr(fa3, name))) is getattr(fa3, name)
