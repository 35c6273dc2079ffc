"""PyTorch's flash attention operators on this package's kernels: what they are given and give back,
on the CPU. The GPU has a file of its own: test_integrations_torch_gpu.py."""

import dataclasses
import random

import pytest
import torch
from aten_calls import (
    FLASH,
    FLASH_BACKWARD,
    SDPA,
    SDPA_BACKWARD,
    assert_form_inferred,
    heads_first,
    layouts,
    packed_call,
)
from packed import assert_packed_right, random_grads, random_packed
from parity import assert_gradients_right, assert_right, random_qkv

from cute_kernels.integrations import aten


@pytest.mark.parametrize("layout", ["views", "contiguous", "parts"])
@pytest.mark.parametrize(
    ("seqlens", "heads", "head_dim", "causal"),
    [
        ((70, 70), (4, 2), 64, True),
        ((33, 129), (2, 2), 40, False),
        ((33, 129), (4, 1), 16, True),  # bottom-right, as CausalBias asks for it
        ((129, 33), (2, 1), 8, True),
        ((1, 1), (2, 2), 16, True),
        ((1, 90), (3, 3), 256, False),
    ],
)
def test_dense(seqlens, heads, head_dim, causal, layout):
    q, k, v = random_qkv("cpu", torch.float32, 2, *seqlens, *heads, head_dim)
    inputs = [layouts(x)[layout] for x in heads_first(q, k, v)]
    arguments = (*inputs, 0.0, causal, False)
    results = aten.scaled_dot_product_flash_attention(*arguments, scale=0.3)
    assert_form_inferred(SDPA, arguments, results, scale=0.3)
    out, lse, cum_q, cum_k, max_q, max_k, *placeholders = results
    assert (cum_q, cum_k, max_q, max_k) == (None, None, *seqlens)
    assert_right(out.transpose(1, 2), lse, q, k, v, 0.3, causal)

    grad_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    lengths = (None, None, max_q, max_k, 0.0, causal, *placeholders[:2])
    arguments = (layouts(grad_out.transpose(1, 2))[layout], *inputs, out, lse, *lengths)
    grads = aten.scaled_dot_product_flash_attention_backward(*arguments, scale=0.3)
    assert_form_inferred(SDPA_BACKWARD, arguments, grads, scale=0.3)
    assert_gradients_right(heads_first(*grads), grad_out, None, q, k, v, 0.3, causal)


@pytest.mark.parametrize("expanded", [(1, 1, 1, 1), (2, 4, 9, 1)], ids=str)
def test_gradients_of_sums(expanded):
    """They are expanded: the last dimension has stride 0."""
    q, k, v = random_qkv("cpu", torch.float32, 2, 9, 9, 4, head_dim=16)
    inputs = heads_first(q, k, v)
    grad_out = torch.randn(expanded).expand(2, 4, 9, 16)
    results = aten.scaled_dot_product_flash_attention(*inputs)
    grads = aten.scaled_dot_product_flash_attention_backward(
        grad_out, *inputs, *results[:6], 0.0, False, *results[6:8]
    )
    right = grad_out.transpose(1, 2)
    assert_gradients_right(heads_first(*grads), right, None, q, k, v, 0.25, False)


@pytest.mark.parametrize(("seqlens", "batch"), [((5, 0), 2), ((0, 5), 2), ((5, 5), 0)], ids=str)
def test_nothing(seqlens, batch):
    q, k, v = random_qkv("cpu", torch.float32, batch, *seqlens, 2, head_dim=16)
    inputs = heads_first(q, k, v)
    results = aten.scaled_dot_product_flash_attention(*inputs)
    assert_form_inferred(SDPA, inputs, results)
    assert not results[0].any() and (results[1] == -torch.inf).all()
    arguments = (torch.ones_like(results[0]), *inputs, *results[:6], 0.0, False, *results[6:8])
    grads = aten.scaled_dot_product_flash_attention_backward(*arguments)
    assert_form_inferred(SDPA_BACKWARD, arguments, grads)
    assert not any(grad.any() for grad in grads)


def test_the_default_scale_is_that_of_the_head_dim():
    q, k, v = random_qkv("cpu", torch.float32, 1, 20, 20, 2, head_dim=40)
    results = aten.scaled_dot_product_flash_attention(*heads_first(q, k, v))
    assert_right(results[0].transpose(1, 2), results[1], q, k, v, 40**-0.5, False)


@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (-1, 0)), (False, (7, 0)), (False, (3, 5)), (True, (9, -1))],
)
def test_packed(causal, window):
    chance = random.Random(3)
    packed = random_packed(
        chance, "cpu", torch.float32, [5, 0, 31, 1], [9, 4, 31, 0], (16, 16), (4, 2), True, 2
    )
    packed = dataclasses.replace(packed, used_q=None)
    arguments, seqused_k = packed_call(packed)
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    results = aten.flash_attention_forward(
        *arguments, causal, False, seqused_k=seqused_k, num_splits=1, **options
    )
    assert_form_inferred(FLASH, (*arguments, causal, False), results, **options)
    mask = {"causal": causal, "window_size": [-1 if n is None else n for n in window]}
    assert_packed_right(results[:2], packed, **mask)

    packed = dataclasses.replace(packed, used_k=None)
    arguments, _ = packed_call(packed)
    out, lse, *placeholders = aten.flash_attention_forward(*arguments, causal, False, **options)
    grad_out, _ = random_grads(packed)
    arguments = (grad_out, *packed.qkv, out, lse, *arguments[3:], causal, *placeholders[:2])
    grads = aten.flash_attention_backward(*arguments, **options)
    assert_form_inferred(FLASH_BACKWARD, arguments, grads, **options)
    assert_packed_right((out, lse, *grads), packed, (grad_out, None), **mask)


@pytest.mark.parametrize("window", [(None, None), (4, 2)])
def test_dense_without_transposes(window):
    q, k, v = random_qkv("cpu", torch.float32, 2, 20, 30, 4, 2, 16)
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    arguments = (q, k, v, None, None, 20, 30, 0.0, False)
    results = aten.flash_attention_forward(*arguments, False, **options)
    assert_form_inferred(FLASH, (*arguments, False), results, **options)
    sides = [-1 if n is None else n for n in window]
    assert_right(*results[:2], q, k, v, 0.25, False, window_size=sides)
    grad_out = torch.randn_like(q)
    grads = aten.flash_attention_backward(
        grad_out, q, k, v, *results[:2], *arguments[3:], *results[2:4], **options
    )
    assert_gradients_right(grads, grad_out, None, q, k, v, 0.25, False, window_size=sides)


def test_into_an_output():
    q, k, v = random_qkv("cpu", torch.float32, 1, 8, 8, 2, head_dim=16)
    out = torch.full_like(q, torch.nan)
    arguments = (q, k, v, None, None, 8, 8, 0.0, True, False)
    lse = aten.flash_attention_forward_no_dropout_inplace(out, *arguments)
    assert_right(out, lse, q, k, v, 0.25, True)


def dense_call(**changes):
    """Keyword arguments of SDPA's operator."""
    names = ("query", "key", "value")
    tensors = heads_first(*random_qkv("cpu", torch.float32, 1, 8, 8, 2, head_dim=16))
    return {**dict(zip(names, tensors, strict=True)), **changes}


UNANSWERED = {
    "dropout": {"dropout_p": 0.1},
    "debug mask": {"return_debug_mask": True},
    "head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 12)),
    "large head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 264)),
    "no head dim": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 0)),
    "v's head dim": {"value": torch.zeros(1, 2, 8, 8)},
    "dtype": dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 8, 16, dtype=torch.int32)),
    "dtypes": {"value": torch.zeros(1, 2, 8, 16, dtype=torch.bfloat16)},
    "heads": {"query": torch.zeros(1, 3, 8, 16)},
    "batch": {"query": torch.zeros(2, 2, 8, 16)},
    "rank": dict.fromkeys(("query", "key", "value"), torch.zeros(2, 8, 16)),
    "strides": {"query": torch.zeros(1, 2, 16, 8).mT},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -1.0},
    "infinite scale": {"scale": torch.inf},
    "a later argument": {"softcap": 30.0},
}


@pytest.mark.parametrize("changes", UNANSWERED.values(), ids=UNANSWERED)
def test_what_is_not_answered(changes):
    assert aten.scaled_dot_product_flash_attention(**dense_call(**changes)) is NotImplemented


def test_what_asks_for_nothing_is_answered():
    results = aten.scaled_dot_product_flash_attention(**dense_call(softcap=None))
    assert torch.equal(results[0], aten.scaled_dot_product_flash_attention(**dense_call())[0])


@pytest.mark.parametrize(
    "change",
    [
        {"block_table": torch.zeros(1, 1, dtype=torch.int32)},
        {"alibi_slopes": torch.zeros(2)},
        {"cum_seq_q": torch.tensor([0, 5])},  # int64
        {"cum_seq_k": None},
        {"cum_seq_q": None},
        {"dropout_p": 0.5},
        {"return_debug_mask": True},
        {"k_cache": torch.zeros(1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_of_packed_calls_is_not_answered(change):
    x = torch.zeros(5, 2, 16)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    call = {"query": x, "key": x, "value": x, "cum_seq_q": cu_seqlens, "cum_seq_k": cu_seqlens}
    call.update(max_q=5, max_k=5, dropout_p=0.0, is_causal=False, return_debug_mask=False)
    assert aten.flash_attention_forward(**call) is not NotImplemented
    assert aten.flash_attention_forward(**{**call, **change}) is NotImplemented


ROW = {"dtype": "bf16", "head_dim": 192, "head_dim_v": 128, "mask": "full", "any_call": False}


@pytest.mark.parametrize(
    ("asked", "row", "there"),
    [
        (("bf16", 128, False, False), {}, True),
        (("bf16", 40, False, False), {}, True),
        (("bf16", 136, False, False), {}, False),
        (("fp16", 128, False, False), {}, False),
        ((None, 128, False, False), {}, False),
        (("bf16", 128, True, False), {}, False),
        (("bf16", 128, True, False), {"mask": "causal"}, True),
        (("bf16", 128, False, False), {"mask": "causal"}, False),
        (("bf16", 128, True, False), {"mask": "any"}, True),
        (("bf16", 128, False, True), {"mask": "any"}, False),
        (("bf16", 128, False, True), {"mask": "any", "any_call": True}, True),
    ],
)
def test_whether_there_is_a_kernel(monkeypatch, asked, row, there):
    monkeypatch.setitem(aten.ROWS, "forward", {"row": {**ROW, **row}})
    assert aten._has_row.__wrapped__("forward", *asked, 1) == there
    assert not aten._has_row.__wrapped__("backward", *asked[:1], 264, *asked[2:], 1)
