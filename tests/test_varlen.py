"""Packed sequences: every row of each is that of the sequence alone."""

import dataclasses
import inspect
import math
import random

import pytest
import torch
from oracle import visible
from packed import Packed, assert_packed_right, random_grads, random_packed
from parity import (
    DTYPES,
    WINDOWS,
    one_hot,
    random_mask,
    skip_unless_answered,
    skip_unless_built,
)

from cute_kernels import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from cute_kernels.operators import flash_attn_varlen_backward, flash_attn_varlen_forward

# Lengths around blocks of 64, 128 and 256 rows, and the shortest
LENGTHS = [0, 1, 2, 63, 64, 65, 0, 127, 128, 129, 1, 255, 256, 257]


def random_slots(chance, batch):
    return [chance.choice([0, 1, 2, chance.randint(3, 60), chance.randint(60, 300)]) for _ in batch]


@pytest.mark.parametrize("seed", range(80))
def test_random_calls(device, seed):
    """NaN in all rows that no sequence uses."""
    chance = random.Random(seed)
    batch = range(chance.randint(1, 6))
    key_heads = chance.choice([1, 1, 2, 3])
    head_dims = [8 * chance.randint(1, 16) for _ in range(2)]
    if chance.random() < 0.2:
        head_dims = chance.choice([(192, 128), (64, 256), (256, 64), (256, 256)])
    slots_q, slots_k = (random_slots(chance, batch) for _ in range(2))
    dtype = chance.choice(list(DTYPES.values()))
    skip_unless_answered(device, dtype, *head_dims)
    packed = random_packed(
        chance,
        device,
        dtype,
        slots_q,
        slots_q if chance.random() < 0.3 else slots_k,
        head_dims,
        (key_heads * chance.choice([1, 2, 4]), key_heads),
        used=chance.random() < 0.6,
        tail=chance.choice([0, 0, 1, 70]),
    )
    grad_out, grad_lse = random_grads(packed)
    grad_out[packed.unused()[0]] = math.nan
    grad_lse = grad_lse if chance.random() < 0.5 else None
    options = {**random_mask(chance), "softmax_scale": chance.choice([None, 0.05, 0.4])}
    longest = max([b.stop - b.start for pair in packed.sequences() for b in pair], default=0)
    limits = {"max_seqlen_q": longest, "max_seqlen_k": chance.choice([None, longest + 7])}
    spoilt, grads = packed.spoilt(math.nan), (grad_out, grad_lse)
    results = spoilt.gradients(*grads, **options, **limits)
    assert_packed_right(results, packed, grads, **options)


def test_sequences_of_equal_lengths_are_a_batch(device):
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    skip_unless_answered(device, dtype)
    q, k, v = torch.randn(3, 4, 150, 2, 64, device=device, dtype=dtype)
    packed = Packed(*(x.flatten(0, 1) for x in (q, k, v)), [150] * 4, [150] * 4)
    for options in ({}, {"causal": True}, {"window_size": (30, 0)}):
        out, lse = packed.run(**options)
        right, right_lse = flash_attn_func(q, k, v, return_lse=True, **options)
        # On CUDA by two kernels, whose P is rounded apart: by 2^-9 of itself, and adds up to 1.
        close = {} if device == "cpu" else {"rtol": 2**-6, "atol": 2**-8}
        torch.testing.assert_close(out, right.flatten(0, 1), **close)
        torch.testing.assert_close(lse, right_lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("causal", [False, True])
def test_every_visible_key_has_its_weight(device, causal):
    """Scores are all 0 and V is one-hot by its row in the whole: a query that sees n keys has 1 / n
    of each, and nothing of another sequence."""
    keys = LENGTHS[3:] + LENGTHS[:3]
    total_q, total_k = sum(LENGTHS), sum(keys)
    skip_unless_answered(device, torch.float16, 8, 256)
    q = torch.zeros(total_q, 2, 8, device=device, dtype=torch.float16)
    k = q.new_zeros(total_k, 1, 8)
    needles = one_hot(total_k, 0, 256, 256).to(device, torch.float16)
    for window_size in [(-1, -1), *WINDOWS[::4]]:
        parts = [
            Packed(q, k, v, LENGTHS, keys).run(causal=causal, window_size=window_size)[0]
            for v in needles
        ]
        weights = torch.cat(parts, -1)[..., :total_k].double()
        seen = torch.zeros(total_q, total_k, dtype=torch.bool, device=device)
        for of_q, of_k in Packed(q, k, k, LENGTHS, keys).sequences():
            sizes = of_q.stop - of_q.start, of_k.stop - of_k.start
            seen[of_q, of_k] = visible(*sizes, causal, window_size, device=device)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1))[:, None]
        assert ((weights - right).abs() <= 1e-3 * right).all(), window_size


@pytest.mark.parametrize("causal", [False, True])
def test_every_pair_has_its_gradient(device, causal):
    """Scores are all 0 and dO is one-hot by its row in the whole: dV holds P^T."""
    dtype, error = (torch.float32, 1e-6) if device == "cpu" else (torch.float16, 1e-3)
    skip_unless_answered(device, dtype, 8, 256)
    keys = LENGTHS[3:] + LENGTHS[:3]
    total_q, total_k = sum(LENGTHS), sum(keys)
    q = torch.zeros(total_q, 1, 8, device=device, dtype=dtype)
    k, v = q.new_zeros(total_k, 1, 8), q.new_zeros(total_k, 1, 256)
    packed = Packed(q, k, v, LENGTHS, keys)
    needles = one_hot(total_q, 0, 256, 256).to(device, dtype)
    for window_size in [(-1, -1), *WINDOWS[2::9]]:
        options = {"causal": causal, "window_size": window_size}
        parts = [packed.gradients(grad, **options)[-1] for grad in needles]
        weights = torch.cat(parts, -1)[:, 0, :total_q].double()
        right = torch.zeros(total_k, total_q, device=device)
        for of_q, of_k in packed.sequences():
            sizes = of_q.stop - of_q.start, of_k.stop - of_k.start
            seen = visible(*sizes, causal, window_size, device=device)
            right[of_k, of_q] = (seen / seen.sum(-1, keepdim=True).clamp(min=1)).mT
        assert ((weights - right).abs() <= error * right).all(), window_size


@pytest.mark.parametrize("wild", [math.nan, math.inf])
@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (20, 3)], ids=str)
def test_rows_of_none_and_of_others_change_no_bit(device, window_size, wild):
    """Beside 0 in their place: rows beyond every length, then all other sequences' too."""
    skip_unless_answered(device, torch.bfloat16, 64, 32)
    chance = random.Random(3)
    slots = [70, 0, 129, 1, 200]
    packed = random_packed(
        chance, device, torch.bfloat16, slots, slots[::-1], (64, 32), (4, 2), True, tail=9
    )
    packed = dataclasses.replace(packed, used_q=[69, 0, 100, 1, 180], used_k=[150, 1, 128, 0, 60])
    of_q, _ = packed.unused()
    grads = random_grads(packed)

    def results(packed, value, hidden):
        grad_out, grad_lse = grads
        grad_out = grad_out.masked_fill(hidden[:, None, None], value)
        grad_lse = grad_lse.masked_fill(hidden, value)
        spoilt = packed.spoilt(value)
        return spoilt.gradients(grad_out, grad_lse, window_size=window_size)

    clean = results(packed, 0.0, of_q)
    assert all(x[x != -math.inf].isfinite().all() for x in clean)
    for result, right in zip(results(packed, wild, of_q), clean, strict=True):
        assert torch.equal(result, right)

    for i, (rows_q, rows_k) in enumerate(packed.sequences()):
        others = [n if j == i else 0 for j, n in enumerate(packed.used_q)]
        keys = [n if j == i else 0 for j, n in enumerate(packed.used_k)]
        alone = dataclasses.replace(packed, used_q=others, used_k=keys)
        hidden, _ = alone.unused()
        out, lse, *of_inputs = results(alone, wild, hidden)
        assert torch.equal(out[rows_q], clean[0][rows_q])
        assert torch.equal(lse[:, rows_q], clean[1][:, rows_q])
        parts = zip(of_inputs, clean[2:], (rows_q, rows_k, rows_k), strict=True)
        assert all(torch.equal(result[part], right[part]) for result, right, part in parts)


@pytest.mark.parametrize("causal", [False, True])
def test_diagonals(device, causal):
    """Of the operators: each sequence's queries stand where its diagonal says."""
    skip_unless_answered(device, torch.bfloat16, 40, 24)
    slots_q, slots_k, diagonal = [60, 100, 1, 30], [90, 50, 70, 0], [0, -20, 33, 5]
    packed = random_packed(
        random.Random(0), device, torch.bfloat16, slots_q, slots_k, (40, 24), (4, 2)
    )
    lengths = (*packed.lengths().values(), torch.tensor(diagonal, dtype=torch.int32, device=device))
    keywords = {"window_left": 25, "max_seqlen_k": 90}
    grad_out, grad_lse = random_grads(packed)
    inputs = (*packed.qkv, *lengths, 0.2, causal)
    results = flash_attn_varlen_forward(*inputs, **keywords)
    inputs = (*packed.qkv, *results, *lengths, 0.2, causal)
    results += flash_attn_varlen_backward(grad_out, grad_lse, *inputs, **keywords)
    mask = {"causal": causal, "window_size": (25, -1), "diagonal": diagonal}
    assert_packed_right(results, packed, (grad_out, grad_lse), softmax_scale=0.2, **mask)


def test_layouts(device):
    """Views of one tensor, and heads before tokens."""
    skip_unless_answered(device, torch.bfloat16, 32)
    whole = torch.randn(100, 3, 4, 32, device=device).to(torch.bfloat16)
    for q, k, v in (whole.unbind(1), whole.permute(1, 2, 0, 3).contiguous().transpose(1, 2)):
        packed = Packed(q, k, v, [40, 60], [40, 60])
        grads = random_grads(packed)
        results = packed.gradients(*grads, causal=True)
        assert_packed_right(results, packed, grads, causal=True)


def test_no_sequence_and_no_rows(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    skip_unless_answered(device, dtype, 16)
    problems = [([], [], 5), ([0, 0], [0, 0], 0), ([0, 0], [3, 4], 0), ([5], [0], 0)]
    for slots_q, slots_k, tail in problems:
        packed = random_packed(
            random.Random(0), device, dtype, slots_q, slots_k, (16, 16), (2, 1), tail=tail
        )
        grads = random_grads(packed)
        assert_packed_right(packed.gradients(*grads), packed, grads)


def test_what_is_returned(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    skip_unless_answered(device, dtype, 8)
    packed = random_packed(random.Random(0), device, dtype, [9], [9], (8, 8), (1, 1))
    out = flash_attn_varlen_func(*packed.qkv, **packed.lengths())
    assert isinstance(out, torch.Tensor)
    for name in ("return_attn_probs", "return_lse"):
        pair = flash_attn_varlen_func(*packed.qkv, **packed.lengths(), **{name: True})
        assert torch.equal(pair[0], out)
        assert pair[1].shape == (1, 9)


def test_signature():
    """FlashAttention-3's order, with what it requires optional, and own arguments by name."""
    parameters = inspect.signature(flash_attn_varlen_func).parameters.values()
    shown = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )
    assert shown == (
        "q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, "
        "seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, "
        "q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, "
        "return_attn_probs=False"
    )
    by_name = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert by_name == {
        "sinks": None,
        "return_lse": False,
        "page_table": None,
        "tree_mask": None,
        "tile_config": None,
        "variant": None,
    }


# q, k and v in one tensor


@pytest.mark.parametrize("num_heads_q", [None, 4])
def test_qkvpacked(device, num_heads_q):
    if device == "cuda":
        skip_unless_built(torch.bfloat16, 64, causal=True)
        skip_unless_built(torch.bfloat16, 64, causal=True, of_pass="backward")
    shape = (2, 50, 8, 64) if num_heads_q else (2, 50, 3, 4, 64)
    qkv = torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()
    options = {"causal": True, "return_lse": True, "deterministic": True}
    out, lse = flash_attn_qkvpacked_func(qkv, num_heads_q=num_heads_q, **options)
    q, k, v = qkv.split([4, 2, 2], 2) if num_heads_q else qkv.unbind(2)
    right, right_lse = flash_attn_func(q, k, v, **options)
    assert torch.equal(out, right)
    assert torch.equal(lse, right_lse)
    grads = [torch.autograd.grad(x.float().square().sum(), qkv)[0] for x in (out, right)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("num_heads_q", [None, 4])
def test_varlen_qkvpacked(device, num_heads_q):
    skip_unless_answered(device, torch.bfloat16)
    shape = (50, 8, 64) if num_heads_q else (50, 3, 4, 64)
    qkv = torch.randn(shape, device=device).to(torch.bfloat16)
    qkv.requires_grad_()
    cu_seqlens = torch.tensor([0, 13, 13, 47], dtype=torch.int32, device=device)
    options = {"window_size": (9, 2), "return_attn_probs": True}
    packed = flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, 34, num_heads_q=num_heads_q, **options
    )
    q, k, v = qkv.split([4, 2, 2], 1) if num_heads_q else qkv.unbind(1)
    right = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, **options)
    assert all(torch.equal(a, b) for a, b in zip(packed, right, strict=True))
    grads = [torch.autograd.grad(x[0].float().square().sum(), qkv)[0] for x in (packed, right)]
    assert torch.equal(*grads)


BAD_QKV = {
    "rank": (
        (50, 4, 64),
        None,
        r"qkv has shape \(50, 4, 64\), must be \(total, 3, heads, head_dim",
    ),
    "not three": ((50, 2, 4, 64), None, r"qkv has shape \(50, 2, 4, 64\), must be \(total, 3, "),
    "rank with heads": ((50, 3, 4, 64), 2, r"must be \(total, heads of q, k and v, head_dim\)"),
    "odd rest": ((50, 7, 64), 4, "num_heads_q is 4, must leave an even number of qkv's 7 heads"),
    "no rest": (
        (50, 4, 64),
        4,
        "num_heads_q is 4, must leave an even number of qkv's 4 heads, 2 or more",
    ),
    "none of q": ((50, 4, 64), 0, "num_heads_q is 0, must be at least 1"),
}


@pytest.mark.parametrize("bad", BAD_QKV)
def test_refused_qkv(bad):
    shape, num_heads_q, message = BAD_QKV[bad]
    cu_seqlens = torch.tensor([0, 50], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_qkvpacked_func(torch.zeros(shape), cu_seqlens, num_heads_q=num_heads_q)
    message = message.replace("(50, ", "(1, 50, ").replace(r"\(total", r"\(batch, seqlen")
    with pytest.raises(ValueError, match=message):
        flash_attn_qkvpacked_func(torch.zeros(1, *shape), num_heads_q=num_heads_q)
