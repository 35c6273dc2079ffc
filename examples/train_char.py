"""Trains a character-level transformer with cute_kernels' attention and with PyTorch's own.

Both start from the same weights and see the same batches, so that their losses differ by rounding
alone. How far that may carry them apart is measured by two more runs with PyTorch's attention: one
in a wider dtype, one on other batches. On a Hopper GPU the model is larger and runs in bf16, on the
CPU in fp32 for about a minute.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cute_kernels import flash_attn_func

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Of the model, of a batch, and how long it is trained."""

    layers: int
    heads: int
    key_heads: int
    head_dim: int
    context: int
    batch: int
    steps: int
    learning_rate: float

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


SIZES = {
    "cpu": Size(2, 4, 2, 16, 64, 8, 150, 3e-3),
    "cuda": Size(4, 4, 2, 128, 1024, 16, 200, 1e-3),
}
WINDOW = 10  # steps that a point of a compared curve is the mean of

UNDER_TWENTY = """zero one two three four five six seven eight nine ten eleven twelve thirteen
fourteen fifteen sixteen seventeen eighteen nineteen"""
ONES = UNDER_TWENTY.split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")


def make_text(sentences: int = 4000, seed: int = 0) -> str:
    """Sums and differences in words: something to learn at every length."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        a, b = sorted((draw.randrange(50), draw.randrange(50)), reverse=True)
        word, result = draw.choice((("plus", a + b), ("minus", a - b)))
        lines.append(f"{in_words(a)} {word} {in_words(b)} is {in_words(result)}.\n")
    return "".join(lines)


def our_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_func(q, k, v, causal=True)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's in another precision."""
    wide = torch.float64 if q.dtype == torch.float32 else torch.float32
    return torch_attention(*(x.to(wide) for x in (q, k, v))).to(q.dtype)


class Block(nn.Module):
    def __init__(self, size: Size, attention: Attention):
        super().__init__()
        self.attention = attention
        self.heads = (size.heads, size.key_heads, size.key_heads)
        self.head_dim = size.head_dim
        self.norm_attention = nn.LayerNorm(size.width)
        self.project = nn.Linear(size.width, sum(self.heads) * size.head_dim, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width), nn.GELU(), nn.Linear(4 * size.width, size.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        projected = self.project(self.norm_attention(x))
        q, k, v = projected.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    def __init__(self, size: Size, characters: int, attention: Attention):
        super().__init__()
        self.characters = nn.Embedding(characters, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size, attention) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def train(
    attention: Attention, text: Tensor, characters: int, size: Size, device: str, data_seed: int
) -> list[float]:
    """The loss of every step, from weights that are the same in every run."""
    torch.manual_seed(0)
    model = Transformer(size, characters, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate)
    draw = torch.Generator().manual_seed(data_seed)
    losses = []
    for step in range(size.steps):
        for group in optimizer.param_groups:  # warm-up, then a cosine down to a tenth
            progress = step / size.steps
            decay = 0.55 + 0.45 * math.cos(math.pi * progress)
            group["lr"] = size.learning_rate * min(1.0, (step + 1) / 20) * decay
        starts = torch.randint(len(text) - size.context - 1, (size.batch, 1), generator=draw)
        windows = text[starts + torch.arange(size.context + 1)].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(windows[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smooth(losses: list[float]) -> Tensor:
    """Means of WINDOW steps."""
    whole = len(losses) // WINDOW * WINDOW
    return torch.tensor(losses[:whole]).view(-1, WINDOW).mean(1)


def distance(a: list[float], b: list[float]) -> float:
    return (smooth(a) - smooth(b)).abs().max().item()


def plot(curves: dict[str, list[float]], path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--", "-.", ":"), strict=True):
        axes.plot(range(WINDOW // 2, WINDOW * len(smooth(losses)), WINDOW), smooth(losses), style)
        axes.lines[-1].set_label(name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, nats a character, means of {WINDOW} steps")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=SIZES, default="cuda" if has_hopper() else "cpu")
    parser.add_argument("--steps", type=int, help="instead of the device's own number")
    parser.add_argument("--plot", type=Path, help="file to draw the curves to")
    chosen = parser.parse_args(arguments)
    size = SIZES[chosen.device]
    if chosen.steps is not None:
        if chosen.steps < WINDOW:
            parser.error(f"--steps is {chosen.steps}, must be at least {WINDOW}")
        size = Size(**{**vars(size), "steps": chosen.steps})

    written = make_text()
    alphabet = sorted(set(written))
    text = torch.tensor([alphabet.index(character) for character in written])
    runs: dict[str, tuple[Attention, int]] = {
        "cute_kernels": (our_attention, 0),
        "PyTorch": (torch_attention, 0),
        "PyTorch, wider": (wide_attention, 0),
        "PyTorch, other batches": (torch_attention, 1),
    }
    print(f"{chosen.device}: {size}, {len(text)} characters of {len(alphabet)} kinds")
    curves = {}
    if chosen.device == "cuda":  # what happens once in a process is not timed
        for attention, _ in runs.values():
            once = Size(**{**vars(size), "steps": 1})
            train(attention, text, len(alphabet), once, chosen.device, 0)
    for name, (attention, data_seed) in runs.items():
        begin = time.perf_counter()
        curves[name] = train(attention, text, len(alphabet), size, chosen.device, data_seed)
        first, last = smooth(curves[name])[[0, -1]].tolist()
        seconds = time.perf_counter() - begin
        print(f"{name:>22}: loss {first:.4f} to {last:.4f} in {seconds:.1f} s")
    ours, other, *others = curves.values()
    apart, noise = distance(ours, other), [distance(other, curve) for curve in others]
    print(
        f"largest distance to PyTorch {apart:.1e}; between its own runs, with a wider dtype "
        f"{noise[0]:.1e}, on other batches {noise[1]:.1e}"
    )
    if chosen.plot is not None and not plot(curves, chosen.plot):
        print("no plot: matplotlib is not installed")
    agree = apart <= 2 * max(noise)
    print("the curves agree" if agree else "THE CURVES DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
