"""Context parallelism in compiled and checkpointed programs, on the CPU."""

import ranks as processes
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from cute_kernels import distributed

ROWS = 8
DOCUMENTS = ([0, 3, 16], [0, 9, 11])


def call(form, q, k, v, cu_seqlens):
    """One layer: something before attention, and something behind."""
    out, lse = form(q * 2, k, v, causal=True, cu_seqlens=cu_seqlens, return_lse=True)
    return (out * 3).sum() + lse[lse > -torch.inf].sum()


def gradients(function, form, cu_seqlens, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, ROWS, 4, 8) if cu_seqlens is None else (ROWS, 4, 8)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]
    result = function(form, *inputs, cu_seqlens)
    return result.detach(), *torch.autograd.grad(result, inputs)


def compare(rank):
    """Which forms give the same bits, and how often each was compiled."""
    same, compiled_frames = {}, {}
    for name in ("ring_attn_func", "ulysses_attn_func"):
        form = getattr(distributed, name)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        pairs = [
            [gradients(function, form, starts, seed) for function in (call, compiled)]
            for seed, starts in enumerate(torch.tensor(starts) for starts in DOCUMENTS)
        ]
        compiled_frames[name] = counter.frame_count
        pairs.append([gradients(function, form, None, 9) for function in (call, checkpointed)])
        same[name] = all(
            torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True)
        )
    return same, compiled_frames


def checkpointed(*inputs):
    return checkpoint(call, *inputs, use_reentrant=False)


def test_compiled_and_checkpointed():
    for same, compiled_frames in processes.run(2, compare):
        assert all(same.values()), same
        assert set(compiled_frames.values()) == {1}, compiled_frames
