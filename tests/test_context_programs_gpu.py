"""Context parallelism on GPUs inside of programs: CUDA graphs, compiled and checkpointed models,
FSDP2; and what the cost model measures."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import ranks as processes
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cute_kernels import distributed

FORMS = ("ring_attn_func", "all_gather_attn_func", "ulysses_attn_func")
WAYS = {"nccl": "0", "copies": "1"}  # the value of CUTE_KERNELS_COPY_ENGINE
ROWS, HEADS, KEY_HEADS, HEAD_DIM = 512, 8, 4, 64  # of a rank
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(ranks, function, way="copies", backend="nccl"):
    environment = {"CUTE_KERNELS_COPY_ENGINE": WAYS[way]}
    return processes.run(ranks, function, backend=backend, environment=environment)


def relative_error(found, right):
    """The largest of some tensors."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def random(*shape, seed):
    """Not the same on all ranks."""
    generator = torch.Generator().manual_seed(seed + 100 * torch.distributed.get_rank())
    return torch.randn(shape, generator=generator).to("cuda", torch.bfloat16)


class Attention(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = getattr(distributed, form)
        self.heads = (HEADS, KEY_HEADS, KEY_HEADS)
        width = HEADS * HEAD_DIM
        self.project = nn.Linear(width, sum(self.heads) * HEAD_DIM)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (-1, HEAD_DIM)).split(self.heads, dim=2)
        return self.out(self.form(q, k, v, causal=True, deterministic=True).flatten(2))


def build(form):
    """A model, its input, and the gradient of its output."""
    torch.manual_seed(0)
    model = Attention(form).to("cuda", torch.bfloat16)
    x, upstream = (random(1, ROWS, HEADS * HEAD_DIM, seed=seed) for seed in (0, 1))
    return model, x.requires_grad_(), upstream


def both_passes(call, model, x, upstream):
    """Output, and the gradients of x and of the weights."""
    out = call(x)
    return out.detach(), *torch.autograd.grad(out, (x, *model.parameters()), upstream)


def graph_errors(rank):
    """Of each form what a CUDA graph of both passes gives, with two inputs, beside eager calls."""
    errors = {}
    for form in FORMS:
        built = model, x, _ = build(form)
        step = functools.partial(both_passes, model, *built)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for seed in (2, 3):
            with torch.no_grad():
                x.copy_(random(*x.shape, seed=seed))
            graph.replay()
            errors[form, seed] = relative_error(results, step())
        del graph
    return errors


@pytest.mark.parametrize("way", WAYS)
def test_in_a_cuda_graph(gpus, way):
    for errors in run(gpus, graph_errors, way):
        assert all(error < 1e-2 for error in errors.values()), errors


def compiled_errors(rank):
    errors = {}
    for form in FORMS:
        built = build(form)
        right = both_passes(built[0], *built)
        torch._dynamo.reset()
        compiled = torch.compile(built[0], fullgraph=True)
        errors[form] = max(relative_error(both_passes(compiled, *built), right) for _ in "12")
    return errors


def test_in_a_compiled_model(gpus):
    for errors in run(gpus, compiled_errors):
        assert all(error < 2e-2 for error in errors.values()), errors


def checkpointed_is_same(rank):
    same = {}
    for form in FORMS:
        built = build(form)
        right = both_passes(built[0], *built)
        call = functools.partial(checkpoint, built[0], use_reentrant=False)
        found = both_passes(call, *built)
        same[form] = all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    return same


@pytest.mark.parametrize("way", WAYS)
def test_checkpointed_gives_the_same_bits(gpus, way):
    for same in run(gpus, checkpointed_is_same, way):
        assert all(same.values()), same


@pytest.mark.parametrize("options", [[], ["--compile"]], ids=["eager", "compiled"])
def test_under_fsdp_the_losses_are_those_of_one_gpu(gpus, options):
    """With checkpointed activations."""
    command = [sys.executable, EXAMPLES / "long_context.py", "--device", "cuda"]
    command += ["--ranks", str(gpus), "--tokens", "4096", "--steps", "3", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the losses agree" in done.stdout


def measured(rank):
    machine = distributed.measure()
    return dataclasses.asdict(machine)


@pytest.mark.parametrize(("way", "backend"), [("nccl", "nccl"), ("copies", "nccl"), ("copies", "")])
def test_what_the_cost_model_measures(gpus, way, backend):
    """What no GPU of these is far from; also in a group whose maker named no backend."""
    first, *others = run(gpus, measured, way, backend)
    assert all(other == first for other in others)
    assert first["node"] == gpus
    assert 2e14 < first["forward"] < 1.2e15
    assert 2e14 < first["backward"] < 1.2e15
    assert 2e10 < first["link"] < 5e11
    assert (first["messages"] == 0) == (way == "copies")
    machine = distributed.Machine(**first)
    best = distributed.choose(131072, gpus, 16, 16, causal=True, machine=machine)[0]
    assert 0.5 < best.efficiency <= 1.01
    print(first, best)
