"""Gradients of parts of the keys, written into given tensors or added to what they hold."""

import math
import random

import pytest
import torch
from key_parts import lengths_of, padded, wide_of
from oracle import Attention, assert_rows
from packed import random_grads, random_packed
from parity import random_qkv, skip_unless_answered

from cute_kernels.operators import flash_attn_backward, flash_attn_varlen_backward
from cute_kernels.parts import Mask, attend_part, part_gradients_


def given(inputs, seed=3):
    """Tensors of N(0, 1) as wide as sums, in memory that has other values between."""
    generator = torch.Generator(inputs[0].device).manual_seed(seed)
    how = {"generator": generator, "device": inputs[0].device, "dtype": wide_of(inputs[0].dtype)}
    return [padded(torch.randn(x.shape, **how)) for x in inputs]


def assert_into(write, plain, inputs, dtype):
    """Of gradients that are rounded to `plain`: written, and added to what was there."""
    targets = given(inputs)
    write(*targets)
    for target, right in zip(targets, plain, strict=True):
        assert torch.equal(target.to(dtype), right)
        assert target._base[..., -1, :].isnan().all() and target._base[..., -8:].isnan().all()
    for options in ({"add_to_q": True}, {"add_to_kv": True}):
        sums, before = given(inputs, seed=4), given(inputs, seed=4)
        write(*sums, **options)
        adds = ["add_to_q" in options, *2 * ["add_to_kv" in options]]
        for total, first, target, add in zip(sums, before, targets, adds, strict=True):
            assert torch.equal(total, first + target if add else target)
            assert total._base[..., -1, :].isnan().all() and total._base[..., -8:].isnan().all()


MASKS = [Mask(), Mask(right=0), Mask(right=0, diagonal=-7), Mask(50, 20)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 40, 96, 192])
def test_gradients_into_dense(device, mask, head_dim):
    """They are those that are returned, before they are rounded."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype, head_dim)
    q, k, v = random_qkv(device, dtype, 2, 150, 210, 4, 2, head_dim)
    out, lse = attend_part(q, k, v, 0.1, mask)
    results = (torch.randn_like(out), None, q, k, v, out, lse)
    options = dict(zip(("window_left", "window_right", "diagonal"), mask, strict=True))
    *plain, _ = flash_attn_backward(*results, 0.1, False, True, **options)

    def write(*targets, **options):
        part_gradients_(
            *targets, results[0], q, k, v, out, lse, 0.1, mask, deterministic=True, **options
        )

    assert_into(write, plain, (q, k, v), dtype)


@pytest.mark.parametrize("mask", [Mask(), Mask(right=0), Mask(50, 20)], ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (128, 64), (192, 128), (256, 256)], ids=str)
def test_gradients_into_packed(device, mask, head_dims):
    """Rows that no sequence uses get 0, or stay as they are."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype, *head_dims)
    chance = random.Random(5)
    slots = [130, 1, 0, 200, 64], [100, 70, 9, 0, 64]
    call = random_packed(chance, device, dtype, *slots, head_dims, (4, 2), used=True, tail=9)
    packed = lengths_of(call)
    out, lse = attend_part(*call.qkv, 0.1, mask, packed)
    grad_out, grad_lse = random_grads(call)
    results = (grad_out, grad_lse, *call.qkv, out, lse, *packed.lengths, 0.1, False)
    window = {"window_left": mask.left, "window_right": mask.right}
    *plain, _ = flash_attn_varlen_backward(*results, deterministic=True, **window)

    def write(*targets, **options):
        part_gradients_(
            *targets, grad_out, *call.qkv, out, lse, 0.1, mask, packed,
            grad_lse=grad_lse, deterministic=True, **options,
        )  # fmt: skip

    assert_into(write, plain, call.qkv, dtype)


@pytest.mark.parametrize("deterministic", [False, True])
def test_hidden_values_are_added_once(device, deterministic):
    """What a mask hides may be NaN: a kernel that notices does its work again."""
    dtype = torch.bfloat16
    skip_unless_answered(device, dtype)
    q, k, v = random_qkv(device, dtype, 1, 200, 200, 2, 2)
    out, lse = attend_part(q, k, v, 0.1, Mask(right=0))
    grad_out = torch.randn_like(out)
    last = slice(190, None)  # seen by the last rows alone
    k[:, last], v[:, last] = math.nan, math.nan
    out, lse = attend_part(q, k, v, 0.1, Mask(right=0))
    grads = [torch.ones(x.shape, device=device) for x in (q, k, v)]
    part_gradients_(
        *grads, grad_out, q, k, v, out, lse, 0.1, Mask(right=0),
        add_to_q=True, add_to_kv=True, deterministic=deterministic,
    )  # fmt: skip
    exact = Attention(q, k, v, 0.1, True).gradients(grad_out)
    for name, grad, (right, allowed) in zip("qkv", grads, exact, strict=True):
        allowed = allowed + 1e-6 * (1 + right.norm(dim=-1))
        assert_rows(f"gradient of {name}", grad - 1, right, allowed)


def test_gradients_without_keys_or_queries(device):
    skip_unless_answered(device, torch.bfloat16)
    for seqlen_q, seqlen_k in [(0, 5), (5, 0), (0, 0)]:
        q, k, v = random_qkv(device, torch.bfloat16, 2, seqlen_q, seqlen_k, 2, 2)
        out, lse = attend_part(q, k, v, 0.1)
        for add in (False, True):
            grads = [torch.ones(x.shape, device=device) for x in (q, k, v)]
            adds = {"add_to_q": add, "add_to_kv": add}
            part_gradients_(*grads, out, q, k, v, out, lse, 0.1, **adds)
            assert all((x == add).all() for x in grads)
