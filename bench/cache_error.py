"""What a cache of 8 bits loses where some channels of K are much larger than the others.

First the error of attention to a cache of many keys, against fp64; then that of the next-token
probabilities of a small random model that reads all its keys and values from such caches, against
caches of float32. Four of 128 channels of K are 30 times larger, as a few are in language models.
Runs on the CPU, with the numbers that the kernels have.
"""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cute_kernels import append_kv, flash_attn_with_kvcache

HEAD_DIM, HEADS, KEY_HEADS = 128, 8, 2
LARGE_CHANNELS, LARGER = [3, 40, 77, 101], 30.0
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LAYERS, VOCABULARY = 4, 512


class Format(NamedTuple):
    """What a cache holds."""

    name: str
    dtype: torch.dtype
    row_factors: bool = False
    incoherent: bool = False


FORMATS = [
    Format("bfloat16", torch.bfloat16),
    Format("e4m3, one factor", torch.float8_e4m3fn),
    Format("e4m3, a factor a row", torch.float8_e4m3fn, row_factors=True),
    Format("int8, a factor a row", torch.int8, row_factors=True),
    Format("e4m3, rotated, a factor a row", torch.float8_e4m3fn, True, True),
    Format("int8, rotated, a factor a row", torch.int8, True, True),
]


def attend(q: Tensor, k: Tensor, v: Tensor, form: Format, causal: bool) -> Tensor:
    """(tokens, heads, head_dim) queries to (keys, key heads, head_dim), through a cache."""
    caches = torch.zeros(2, 1, *k.shape).to(form.dtype)
    factors: dict[str, Any] = {"incoherent": form.incoherent, "seed": 1}
    if form.row_factors:
        factors["k_scales"], factors["v_scales"] = torch.zeros(2, 1, *k.shape[:2])
    elif form.dtype in LARGEST:
        for name, x in (("k_descale", k), ("v_descale", v)):
            one = x.float().abs().max() / LARGEST[form.dtype]
            factors[name] = one.expand(1, k.shape[1])
    dtype = q.dtype if form.dtype in LARGEST else form.dtype
    empty = torch.zeros(1, dtype=torch.int32)
    used = append_kv(*caches, k[None].to(dtype), v[None].to(dtype), empty, **factors)
    out: Any = flash_attn_with_kvcache(
        q[None].to(dtype), *caches, cache_seqlens=used, causal=causal, **factors
    )
    return out[0]


def attention_errors(keys: int, peaked: float) -> dict[str, float]:
    """Relative RMSE of each format; q is N(0, peaked^2)."""
    generator = torch.Generator().manual_seed(0)
    q = peaked * torch.randn(64, HEADS, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, keys, KEY_HEADS, HEAD_DIM, generator=generator)
    k[..., LARGE_CHANNELS] *= LARGER
    q, k, v = (x.bfloat16() for x in (q, k, v))
    wide_q, wide_k, wide_v = (x.double().transpose(0, 1) for x in (q, k, v))
    group = HEADS // KEY_HEADS
    wide_k, wide_v = (x.repeat_interleave(group, 0) for x in (wide_k, wide_v))
    exact = torch.softmax(wide_q @ wide_k.mT / HEAD_DIM**0.5, -1) @ wide_v
    size = exact.square().mean().sqrt()

    def error(form: Format) -> float:
        out = attend(q, k, v, form, False).double().transpose(0, 1)
        return float((out - exact).square().mean().sqrt() / size)

    return {form.name: error(form) for form in FORMATS}


class Model:
    """Layers of attention and an MLP with random weights, without positions."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        width = HEADS * HEAD_DIM

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / rows**0.5

        def layer() -> list[Tensor]:
            k = weight(width, KEY_HEADS * HEAD_DIM).view(width, KEY_HEADS, HEAD_DIM)
            k[..., LARGE_CHANNELS] *= LARGER
            q = weight(width, width).view(width, HEADS, HEAD_DIM)
            q[..., LARGE_CHANNELS] /= LARGER**0.5  # scores of a size that models have
            v = weight(width, KEY_HEADS * HEAD_DIM)
            rest = weight(width, width), weight(width, 2 * width), weight(2 * width, width)
            return [q.flatten(1), k.flatten(1), v, *rest]

        self.layers = [layer() for _ in range(LAYERS)]
        self.embedding = torch.randn(VOCABULARY, width, generator=generator)
        self.head = 3 * weight(width, VOCABULARY)

    def next_token(self, tokens: Tensor, form: Format | None) -> Tensor:
        """Logarithms of probabilities behind each token; None: caches of float32."""
        x = self.embedding[tokens]
        for q, k, v, out, up, down in self.layers:
            normed = F.rms_norm(x, x.shape[-1:])
            q, k, v = ((normed @ w).unflatten(-1, (-1, HEAD_DIM)) for w in (q, k, v))
            if form is None:
                attended = attend(q, k, v, Format("float32", torch.float32), True)
            else:
                attended = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), form, True).float()
            x = x + attended.flatten(-2) @ out
            x = x + F.silu(F.rms_norm(x, x.shape[-1:]) @ up) @ down
        return (F.rms_norm(x, x.shape[-1:]) @ self.head).log_softmax(-1)


def model_errors(tokens: int) -> dict[str, tuple[float, float]]:
    """Mean Kullback-Leibler divergence in bits, and how often the likeliest token is another."""
    model = Model()
    text = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(2))
    right = model.next_token(text, None)
    found = {}
    for form in FORMATS:
        other = model.next_token(text, form)
        divergence = (right.exp() * (right - other)).sum(-1).mean() / math.log(2)
        changed = (right.argmax(-1) != other.argmax(-1)).float().mean()
        found[form.name] = float(divergence), float(changed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--keys", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=1024, help="of the model's text")
    options = parser.parse_args()
    errors = [attention_errors(options.keys, peaked) for peaked in (0.1, 0.3, 1.0)]
    of_model = model_errors(options.tokens)
    print(f"Attention to {options.keys} keys, relative RMSE, q of N(0, s^2); model of {LAYERS}")
    print(f"layers, {options.tokens} tokens: KL divergence in bits, other likeliest token\n")
    print("| cache | s = 0.1 | 0.3 | 1 | KL | other |\n| --- | --: | --: | --: | --: | --: |")
    for form in FORMATS:
        cells = [f"{error[form.name]:.4f}" for error in errors]
        divergence, changed = of_model[form.name]
        cells += [f"{divergence:.5f}", f"{changed:.1%}"]
        print(f"| {form.name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
