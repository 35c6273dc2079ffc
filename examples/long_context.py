"""Trains a transformer on sequences that several processes share, and on one alone.

Each process holds a part of every sequence (context parallelism) and a part of the weights
(FSDP2); activations are computed again in the backward pass. The model, the batches and so the
losses are those of one process, which is what is compared. Started by itself it takes two
processes, on the CPU or on as many Hopper GPUs; started by torchrun, all that are there:

    python examples/long_context.py
    torchrun --nproc-per-node 8 examples/long_context.py --tokens 262144 --key-heads 8
"""

from __future__ import annotations

import argparse
import os
import socket
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cute_kernels import distributed, flash_attn_func

LETTERS = 64


class Attention(nn.Module):
    """Attention with positions as rotations, over the sequence of a mesh or of one process."""

    def __init__(self, heads: int, key_heads: int, head_dim: int, mesh: DeviceMesh | None):
        super().__init__()
        self.heads, self.head_dim, self.mesh = (heads, key_heads, key_heads), head_dim, mesh
        width = heads * head_dim
        self.project = nn.Linear(width, sum(self.heads) * head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if self.mesh is None:
            y = flash_attn_func(q, k, v, causal=True)
        else:
            y = distributed.ring_attn_func(q, k, v, self.mesh, causal=True)
        return self.out(y.flatten(2))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = rotation.unbind(-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, attention: Attention):
        super().__init__()
        width = attention.out.in_features
        self.norm_attention, self.attention = nn.RMSNorm(width), attention
        self.norm_mlp = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotation)
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    def __init__(self, layers: int, heads: int, key_heads: int, head_dim: int, mesh=None):
        super().__init__()
        self.letters = nn.Embedding(LETTERS, heads * head_dim)
        self.blocks = nn.ModuleList(
            Block(Attention(heads, key_heads, head_dim, mesh)) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(heads * head_dim)
        self.head = nn.Linear(heads * head_dim, LETTERS)
        self.head_dim = head_dim

    def forward(self, text: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of all letters."""
        pairs = torch.arange(self.head_dim // 2, device=text.device)
        angles = positions[:, None, None] * 10000 ** (-2 * pairs / self.head_dim)
        rotation = torch.stack([angles.cos(), angles.sin()], dim=-1)
        x = self.letters(text)
        for block in self.blocks:
            x = checkpoint(block, x, rotation, use_reentrant=False)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def make_batch(step: int, tokens: int) -> Tensor:
    """Letters of which each half of a sequence repeats the other: what attention alone can tell."""
    generator = torch.Generator().manual_seed(step)
    half = torch.randint(LETTERS, (1, tokens // 2), generator=generator)
    return torch.cat([half, half], dim=1)


def train(arguments, device: str, mesh: DeviceMesh | None) -> list[float]:
    """The losses, with `mesh` of the sequence that its processes share."""
    torch.manual_seed(0)
    model = Transformer(
        arguments.layers, arguments.heads, arguments.key_heads, arguments.head_dim, mesh
    ).to(device)
    if mesh is not None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if arguments.compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    losses = []
    for step in range(arguments.steps):
        text = make_batch(step, arguments.tokens).to(device)
        labels = distributed.next_tokens(text)  # of the whole sequence, before it is cut
        positions = torch.arange(arguments.tokens, device=device)
        ranks = 1
        if mesh is not None:
            text, labels = (distributed.shard(x, mesh) for x in (text, labels))
            positions = distributed.positions(arguments.tokens, mesh, device=device)
            ranks = mesh.size()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(text, positions, labels) / (arguments.tokens - 1)
        # The mean that FSDP takes of the gradients is to be their sum.
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if mesh is not None:
            dist.all_reduce(loss, group=mesh.get_group())
        losses.append(loss.item())
    return losses


def run(rank: int, ranks: int, port: int, arguments) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    device = arguments.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    shared = train(arguments, device, init_device_mesh(device, (ranks,)))
    agree = True
    if rank == 0:
        alone = train(arguments, device, None)
        for step, (one, other) in enumerate(zip(alone, shared, strict=True)):
            print(f"step {step}: loss {one:.5f} on one process, {other:.5f} on {ranks}")
        apart = max(abs(a - b) for a, b in zip(alone, shared, strict=True))
        agree = apart < (2e-2 if device == "cuda" else 1e-4)
        print(f"largest difference {apart:.1e}: the losses {'agree' if agree else 'DIFFER'}")
    dist.barrier()
    dist.destroy_process_group()
    if not agree:
        raise SystemExit(1)


def has_hoppers(count: int) -> bool:
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= count
    return enough and torch.cuda.get_device_capability() == (9, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes, if torchrun starts none")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, help="of a sequence; 64 on the CPU, else 32768")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, help="16 on the CPU, else 128")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true", help="the model, by torch.compile")
    arguments = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", arguments.ranks))
    arguments.device = arguments.device or ("cuda" if has_hoppers(1) else "cpu")
    on_cpu = arguments.device == "cpu"
    arguments.tokens = arguments.tokens or (64 if on_cpu else 32768)
    arguments.head_dim = arguments.head_dim or (16 if on_cpu else 128)
    if arguments.tokens % (2 * ranks):
        parser.error(f"--tokens is {arguments.tokens}, must be a multiple of {2 * ranks}")
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), ranks, 0, arguments)
        return 0
    if not on_cpu and not has_hoppers(ranks):
        parser.error(f"--device cuda needs {ranks} Hopper GPUs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (ranks, port, arguments), nprocs=ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
