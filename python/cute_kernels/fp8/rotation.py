"""Incoherent processing (FlashAttention-3, arXiv 2407.08608, section 3.3).

Q and K are multiplied by the same random orthogonal matrix M before they are rounded, which leaves
Q K^T as it is and spreads outliers over channels.

M = H diag(signs) / sqrt(d), with H a Hadamard matrix where d is a power of two. Other d = m 2^n
(m odd) take the Kronecker product of the reflection I - (2/m) J of order m and a Hadamard matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cute_kernels.checks import MAX_HEAD_DIM

U64 = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64, and what it mixes with
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def signed(number: int) -> int:
    """A number below 2^64 as the int64 of the same bits: operators have no unsigned numbers."""
    number = int(number)  # NumPy's would overflow
    return number - 2**64 if number >= 2**63 else number


def random_signs(head_dim: int, seed: int) -> list[int]:
    """+1 or -1 for every channel: the top bit of SplitMix64's output number `channel`.

    A function of seed and channel alone, which the CUDA kernel computes in the same bits.
    """
    return [int(sign) for sign in _signs(head_dim, seed, torch.device("cpu")).tolist()]


def _signs(head_dim: int, seed: int, device: torch.device) -> Tensor:
    """The same, (head_dim,), float32. Computed where they are needed: nothing is copied to a GPU,
    so that a CUDA graph may capture it."""
    channel = torch.arange(1, head_dim + 1, dtype=torch.int64, device=device)
    z = channel * signed(_STEP) + signed(seed)  # int64 wraps
    for shift, factor in _MIX:
        z = (z ^ _logical_shift(z, shift)) * signed(factor)
    z = z ^ _logical_shift(z, 31)
    return 1.0 - 2.0 * (z < 0).float()


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (z >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def norm_of(head_dim: int) -> float:
    """What `_hadamard` lacks to be orthogonal: a number to compilers, too, which take the bits of a
    symbol for those of a float."""
    power = 1
    while power < MAX_HEAD_DIM and head_dim % (2 * power) == 0:
        power *= 2
    return float(power**-0.5)


def _hadamard(x: Tensor) -> Tensor:
    """x H over the last dimension, in fp32: butterflies of stride 1, 2, 4, ..., as the CUDA
    kernel's, then the reflection of order m over the d / m runs. Its own inverse, but for the
    norm."""
    head_dim = x.shape[-1]
    power = head_dim & -head_dim
    odd = head_dim // power
    stride = 1
    while stride < power:
        pairs = x.reshape(*x.shape[:-1], head_dim // (2 * stride), 2, stride)
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        stride *= 2
    if odd > 1:
        runs = x.reshape(*x.shape[:-1], odd, power)
        total = torch.zeros_like(runs[..., :1, :])
        for run in torch.split(runs, 1, -2):  # in this order: the same bits on all devices
            total = total + run
        x = (runs - total * (2 / odd)).view(x.shape)
    return x


def rotate_unscaled(x: Tensor, seed: int) -> Tensor:
    """M x for every row, in float32, but for the norm."""
    return _hadamard(x.float() * _signs(x.shape[-1], seed, x.device))


def rotate(x: Tensor, seed: int) -> Tensor:
    """M x for every row, in float32."""
    return rotate_unscaled(x, seed) * norm_of(x.shape[-1])


def rotate_back(x: Tensor, seed: int) -> Tensor:
    """M^T x for every row, in float32."""
    return _hadamard(x.float()) * norm_of(x.shape[-1]) * _signs(x.shape[-1], seed, x.device)
