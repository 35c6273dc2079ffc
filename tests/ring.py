"""torch's ring attention in two processes on the CPU, on this package's kernels."""

import subprocess
import sys

import torch
import torch.distributed as dist

RANKS, ROWS = 2, 24  # rows of all ranks, in 2 * RANKS chunks
SHAPE = (1, 2, ROWS, 16)
SEED = 5


def random_inputs():
    """q, k, v and the output's gradient, (batch, heads, seqlen, head_dim)."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(SHAPE, generator=generator) for _ in range(4)]


def rows_of(rank):
    """With the load balanced, a rank has the first and the last chunk of what is left."""
    chunks = torch.arange(ROWS).chunk(2 * RANKS)
    return torch.cat([chunks[rank], chunks[2 * RANKS - 1 - rank]])


def run_ring(folder):
    """The inputs, and the output, LSE and gradients of all ranks together, with a causal mask."""
    command = [sys.executable, __file__, str(folder)]
    processes = [subprocess.Popen([*command, str(rank)]) for rank in range(RANKS)]
    assert [process.wait(timeout=120) for process in processes] == [0] * RANKS
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]
    order = torch.cat([rows_of(rank) for rank in range(RANKS)]).argsort()
    whole = [torch.cat(part, dim=2)[:, :, order] for part in zip(*parts, strict=True)]
    return *random_inputs(), *whole


def main(folder, rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    from cute_kernels.integrations import torch as integration

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    overrides = integration.Overrides("CPU")
    q, k, v, grad_out = (x[:, :, rows_of(rank)] for x in random_inputs())
    forward, backward = (
        getattr(ring, f"_scaled_dot_product_ring_flash_attention{suffix}")
        for suffix in ("", "_backward")
    )
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward(mesh, q, k, v, 0.0, True)
    lengths = (cum_q, cum_k, max_q, max_k)
    grads = backward(mesh, grad_out, q, k, v, out, lse, *lengths, 0.0, True, seed, offset)
    torch.save([out, lse, *grads], f"{folder}/{rank}.pt")
    overrides.remove()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
