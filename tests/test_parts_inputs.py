"""What functions of parts of the keys refuse, and what they say."""

import random

import pytest
import torch
from key_parts import dense_call, lengths_of, random_results
from packed import random_packed
from parity import random_qkv
from torch._subclasses import FakeTensorMode

from cute_kernels.parts import Mask, attend_part, merge_part_, merge_parts, part_gradients_

BAD_MERGES = {
    "rank": ({0: lambda x: x[0, 0]}, ValueError, r"out has shape \(4, 16\), must be \(batch, se"),
    "head_dim": (
        {0: lambda x: x[..., :12], 2: lambda x: x[..., :12]},
        ValueError,
        "out has head_dim 12, must have a multiple of 8",
    ),
    "shape": ({2: lambda x: x[:1]}, ValueError, r"part_out has shape \(1, 7, 4, 16\), must be "),
    "dtype": ({2: lambda x: x.int()}, TypeError, "part_out has dtype torch.int32, must be float32"),
    "strided": (
        {0: lambda x: x.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "out has strides .*, its last dimension",
    ),
    "lse shape": (
        {3: lambda x: x.mT},
        ValueError,
        r"part_lse has shape \(2, 7, 4\), must be \(batch, heads, seqlen\) = \(2, 4, 7\)",
    ),
    "lse dtype": ({1: lambda x: x.half()}, TypeError, "lse has dtype torch.float16, must be torch"),
    "no tensor": ({1: lambda _: None}, TypeError, "lse is a NoneType, must be a torch.Tensor"),
}


@pytest.mark.parametrize("bad", BAD_MERGES)
def test_refused_merges(device, bad):
    changes, error, message = BAD_MERGES[bad]
    parts = random_results(device, (2, 7, 4, 16), (torch.float32, torch.bfloat16))
    parts = [changes.get(i, lambda x: x)(x) for i, x in enumerate(parts)]
    for call in (merge_parts, merge_part_):
        with pytest.raises(error, match=f"^{message}"):
            call(*parts)


def test_refused_dtype_of_a_merge(device):
    parts = random_results(device, (2, 7, 4, 16), (torch.float32, torch.bfloat16))
    with pytest.raises(TypeError, match=r"^out_dtype is torch\.int32, must be float32, float16"):
        merge_parts(*parts, torch.int32)


BAD_GRADIENTS = {
    "dtype": (0, lambda x: x.bfloat16(), TypeError, "grad_q has dtype torch.bfloat16, must be tor"),
    "shape": (1, lambda x: x[:, :-1], ValueError, r"grad_k has shape .*, must be \(1, 12, 2, 16\)"),
    "strided": (
        2,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        ValueError,
        "grad_v has strides .*, its last dimension",
    ),
    "no tensor": (1, lambda _: None, TypeError, "grad_k is a NoneType, must be a torch.Tensor"),
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS)
def test_refused_gradients(device, bad):
    at, change, error, message = BAD_GRADIENTS[bad]
    grads, (grad_out, _, q, k, v, out, lse) = dense_call(torch.bfloat16)
    grads, results = (
        [x.to(device) for x in tensors] for tensors in (grads, (grad_out, q, k, v, out, lse))
    )
    grads[at] = change(grads[at])
    with pytest.raises(error, match=f"^{message}"):
        part_gradients_(*grads, *results, 0.3)


def test_refused_vectors():
    """On CUDA alone: the CPU takes any strides."""
    with FakeTensorMode():
        q = torch.empty(1, 20, 2, 64, device="cuda", dtype=torch.half)
        lse = torch.empty(1, 2, 20, device="cuda")
        grad = torch.empty(1, 20, 2, 65, device="cuda").narrow(-1, 0, 64)
        with pytest.raises(ValueError, match=r"^grad_q has strides \(2600, 130, 65, 1\) and offs"):
            part_gradients_(grad, grad, grad, q, q, q, q, q, lse, 0.3)


def test_a_diagonal_belongs_to_each_sequence():
    call = random_packed(random.Random(1), "cpu", torch.float32, [5], [4], (16, 16), (2, 2))
    with pytest.raises(ValueError, match=r"^mask has the diagonal 0, must have None with packed"):
        attend_part(*call.qkv, 0.3, Mask(0, 0, 0), lengths_of(call))


def test_masks_and_lengths_have_types_of_their_own():
    q = torch.zeros(1, 10, 2, 64)
    with pytest.raises(TypeError, match=r"^mask is \(3, 0\), must be a cute_kernels\.parts\.Mask$"):
        attend_part(q, q, q, 0.1, (3, 0))
    with pytest.raises(TypeError, match=r"^packed is 'all', must be a cute_kernels\.parts\.Packed"):
        attend_part(q, q, q, 0.1, packed="all")


@pytest.mark.parametrize("margin", [(-1, ValueError, "at least 0"), (1.5, TypeError, "an int")])
def test_refused_margins(device, margin):
    value, error, message = margin
    q, k, v = random_qkv(device, torch.bfloat16, 1, 9, 12, 2, 2)
    with pytest.raises(error, match=f"^sm_margin is {value}, must be {message}"):
        attend_part(q, k, v, 0.3, sm_margin=value)
