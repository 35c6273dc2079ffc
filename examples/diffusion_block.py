"""A block of a diffusion transformer with attention in 8 bits, beside the same in 16 bits.

The block is as Flux's and Wan's: queries and keys normalised, the timestep scales and shifts what
each part sees. It takes a few steps from noise to an image of its own; what 8 bits change of that
image, and of a step's time on a GPU, is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cute_kernels import flash_attn_fp8_func, flash_attn_func

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SIZES = {"cpu": (256, 4, 64), "cuda": (8192, 24, 128)}  # tokens, heads, head_dim


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int, attention: Attention):
        super().__init__()
        width = heads * head_dim
        self.attention, self.heads = attention, heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.modulate = nn.Linear(width, 6 * width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x: (batch, tokens, width); timestep: (batch, width)."""
        of_attention, of_mlp = self.modulate(timestep)[:, None].chunk(2, -1)
        shift, scale, gate = of_attention.chunk(3, -1)
        projected = self.project(self.norm(x) * (1 + scale) + shift)
        q, k, v = projected.unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = self.attention(self.norm_q(q), self.norm_k(k), v)
        x = x + gate * self.out(attended.flatten(2))
        shift, scale, gate = of_mlp.chunk(3, -1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


def embed(timestep: float, width: int, like: Tensor) -> Tensor:
    frequencies = torch.exp(torch.linspace(0, -8, width // 2, device=like.device))
    angles = 1000 * timestep * frequencies
    return torch.cat([angles.cos(), angles.sin()])[None].to(like.dtype)


def sample(block: Block, noise: Tensor, steps: int) -> Tensor:
    """Euler's steps along the direction that the block gives, from time 1 to 0."""
    x = noise
    for i in range(steps):
        x = x - block(x, embed(1 - i / steps, x.shape[-1], x)) / steps
    return x


def in_16_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v)


def in_8_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_fp8_func(q, k, v)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = (x.double().transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(*wide)
    return out.transpose(1, 2).to(q.dtype)


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cuda" if has_hopper() else "cpu")
    parser.add_argument("--steps", type=int, default=8)
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps is {chosen.steps}, must be at least 1")
    device, (tokens, heads, head_dim) = chosen.device, SIZES[chosen.device]
    print(f"{device}: {tokens} tokens, {heads} heads of {head_dim}, {chosen.steps} steps, bf16")

    torch.manual_seed(0)
    options = {"device": device, "dtype": torch.bfloat16}
    noise = torch.randn(1, tokens, heads * head_dim, **options)
    block = Block(heads, head_dim, in_16_bits).to(**options).eval()
    images = {}
    with torch.no_grad():
        for attention in (in_16_bits, in_8_bits, exact):
            if attention is exact and device == "cuda":
                continue  # would need all scores in memory
            block.attention = attention
            images[attention] = sample(block, noise, chosen.steps).double()
            if device == "cuda":
                torch.cuda.synchronize()
                begin = time.perf_counter()
                sample(block, noise, chosen.steps)
                torch.cuda.synchronize()
                milliseconds = (time.perf_counter() - begin) / chosen.steps * 1e3
                print(f"{attention.__name__:>10}: {milliseconds:7.2f} ms a step")
    right = images.get(exact, images[in_16_bits])
    peak = (right.max() - right.min()).item()
    errors = {}
    for attention, image in images.items():
        if image is right:
            continue
        errors[attention] = ((image - right).norm() / right.norm()).item()
        decibels = 20 * math.log10(peak / (image - right).square().mean().sqrt().item())
        print(
            f"{attention.__name__:>10}: {errors[attention]:.1e} of the image's norm off, "
            f"PSNR {decibels:.0f} dB"
        )
    close = errors[in_8_bits] < 0.02
    print("the images agree" if close else "THE IMAGES DIFFER")
    return 0 if close else 1


if __name__ == "__main__":
    sys.exit(main())
