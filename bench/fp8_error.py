"""How far FP8 attention is from exact attention, and what each part of the quantisation is worth.

Inputs are those of the FlashAttention-3 paper (N(0, 1), one element of a thousand with N(0, 100)
added), N(0, 1), and keys with a few channels much larger than the others, as language models have
them. The reference is fp64. Runs on the CPU, in the arithmetic of the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cute_kernels.fp8 import FP8Tensor, flash_attn_fp8_func, quantize_fp8

METHODS = {
    "fp16": "FP16, plain",
    "bf16": "BF16, plain",
    "per_tensor_plain": "FP8, one scale a tensor, P as it is",
    "per_tensor": "FP8, one scale a tensor",
    "blocks": "+ block scales",
    "incoherent": "+ incoherent processing",
    "both": "+ both",
    "both_smooth": "+ both, K without its mean",
    "int8": "both, Q and K in int8",
    "int8_smooth": "both, int8, K without its mean",
}
COLORS = {
    "fp16": "#dfe5ea",
    "bf16": "#b7c4d1",
    "per_tensor_plain": "#c98f42",
    "per_tensor": "#e3b778",
    "blocks": "#8f9fc4",
    "incoherent": "#a98fc9",
    "both": "#2f6f4f",
    "both_smooth": "#6fae8c",
    "int8": "#7b2d43",
    "int8_smooth": "#c07a8e",
}
INPUTS = {
    "paper": "N(0, 1) + N(0, 100) for 1 of 1000",
    "normal": "N(0, 1)",
    "channels": "keys with large channels",
}
SEED = 0


def make_inputs(kind: str, seqlen: int, heads: int, head_dim: int, seed: int) -> list[Tensor]:
    """q, k and v, (1, seqlen, heads, head_dim), float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, seqlen, heads, head_dim)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "paper":
        return [
            normal() + 10 * normal() * (torch.rand(shape, generator=generator) < 1e-3)
            for _ in range(3)
        ]
    q, k, v = normal(), normal(), normal()
    if kind == "channels":
        # Mostly a constant of the channel, as measured in language models; a little of it varies.
        sizes = torch.tensor([20.0, 40.0, 60.0, 100.0])
        large = torch.randperm(head_dim, generator=generator)[: len(sizes)]
        k[..., large] = sizes * (1 + 0.02 * k[..., large])
        q[..., large] *= 0.3
    return [q, k, v]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def plain_attention(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Inputs, P and output in `dtype`, sums in fp32."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.to(dtype).float().transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        p = torch.exp(scores - scores.amax(-1, keepdim=True))
        out = (p.to(dtype).float() @ v) / p.sum(-1, keepdim=True)
        return out.to(dtype).float().transpose(1, 2)

    return attention


def unscaled_p(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The simplest FP8 attention: one scale a tensor, and P, at most 1, rounded as it is."""
    q, k, v = (per_tensor(x).dequantize().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = p.to(torch.float8_e4m3fn).float()
    return ((rounded @ v) / p.sum(-1, keepdim=True)).transpose(1, 2)


def per_tensor(x: Tensor) -> FP8Tensor:
    batch, seqlen, heads, _ = x.shape
    scale = x.abs().amax() / 448
    data = (x / scale).to(torch.float8_e4m3fn)
    return FP8Tensor(data, scale.expand(batch, heads, 1), seqlen)


def per_head(x: Tensor) -> FP8Tensor:
    return quantize_fp8(x, block=x.shape[1], incoherent=True, seed=SEED)


def attention(method: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    wide: dict[str, Any] = {"out_dtype": torch.float32, "qk_dtype": torch.float8_e4m3fn}
    fp8 = flash_attn_fp8_func
    rotated: dict[str, Any] = {**wide, "seed": SEED, "smooth_k": False}
    int8: dict[str, Any] = {**rotated, "qk_dtype": torch.int8}
    smooth: dict[str, Any] = {"smooth_k": True}
    return {
        "fp16": plain_attention(torch.float16),
        "bf16": plain_attention(torch.bfloat16),
        "per_tensor_plain": unscaled_p,
        "per_tensor": lambda q, k, v: fp8(per_tensor(q), per_tensor(k), per_tensor(v), **wide),
        "blocks": lambda q, k, v: fp8(q, k, v, incoherent=False, smooth_k=False, **wide),
        "incoherent": lambda q, k, v: fp8(per_head(q), per_head(k), per_tensor(v), **wide),
        "both": lambda q, k, v: fp8(q, k, v, **rotated),
        "both_smooth": lambda q, k, v: fp8(q, k, v, **{**rotated, **smooth}),
        "int8": lambda q, k, v: fp8(q, k, v, **int8),
        "int8_smooth": lambda q, k, v: fp8(q, k, v, **{**int8, **smooth}),
    }[method]


def measure(kind: str, seqlen: int, heads: int, head_dim: int, repeats: int) -> dict[str, float]:
    """RMSE of every method over `repeats` draws."""
    squares: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats):
        q, k, v = make_inputs(kind, seqlen, heads, head_dim, repeat)
        exact = exact_attention(q, k, v)
        for method in METHODS:
            error = attention(method)(q, k, v).double() - exact
            squares[method].append(error.square().mean().item())
    return {method: math.sqrt(sum(values) / repeats) for method, values in squares.items()}


def table(data: dict[str, Any]) -> str:
    """RMSE as Markdown, a column for each input and head dim."""
    cells = data["cells"]
    head = [f"{cell['inputs']}, D={cell['head_dim']}" for cell in cells]
    lines = ["| RMSE | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(cells)]
    for method, label in METHODS.items():
        values = " | ".join(f"{cell['rmse'][method]:.2e}" for cell in cells)
        lines.append(f"| {label} | {values} |")
    return "\n".join(lines)


def draw(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "cute_kernels"  # the same data draw the same file
    ink = "#24292f"
    kinds = list(dict.fromkeys(cell["inputs"] for cell in data["cells"]))
    figure, grid = plt.subplots(1, len(kinds), figsize=(5.6 * len(kinds), 4.2), squeeze=False)
    for axes, kind in zip(grid[0], kinds, strict=True):
        cells = [cell for cell in data["cells"] if cell["inputs"] == kind]
        width = 0.84 / len(METHODS)
        for i, (method, label) in enumerate(METHODS.items()):
            left = [x - 0.42 + (i + 0.5) * width for x in range(len(cells))]
            values = [cell["rmse"][method] for cell in cells]
            axes.bar(left, values, width=width * 0.94, color=COLORS[method], label=label, zorder=2)
        axes.set_yscale("log")
        axes.set_xticks(range(len(cells)), [f"D = {cell['head_dim']}" for cell in cells])
        axes.set_title(INPUTS[kind], fontsize=10, color=ink, loc="left")
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8, zorder=0)
        axes.tick_params(length=0, labelsize=8.5, colors=ink)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    grid[0][0].set_ylabel("RMSE against fp64", fontsize=9, color=ink)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncol=5, frameon=False, fontsize=8.5)
    figure.tight_layout(rect=(0, 0, 1, 0.87))
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=metadata)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_error", description=__doc__)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bench/results/fp8_error.json"))
    chosen = parser.parse_args(arguments)
    shape = {"seqlen": chosen.seqlen, "heads": chosen.heads, "repeats": chosen.repeats}
    data: dict[str, Any] = {
        "kind": "fp8_error",
        "settings": {**shape, "seed": SEED, "mask": "full", "torch": torch.__version__},
        "methods": METHODS,
        "cells": [],
    }
    for kind in chosen.inputs:
        for head_dim in chosen.head_dims:
            rmse = measure(kind, head_dim=head_dim, **shape)
            data["cells"].append({"inputs": kind, "head_dim": head_dim, "rmse": rmse})
            ratio = rmse["per_tensor"] / rmse["int8"]
            print(
                f"{kind} D={head_dim}: int8 {rmse['int8']:.2e}, per tensor {ratio:.2f} times it",
                file=sys.stderr,
            )
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    else:
        draw(data, chosen.out.with_suffix(".svg"))
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
