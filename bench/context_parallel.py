"""Times attention over a sequence that several GPUs share, against PyTorch's and plain collectives.

One process a GPU: started by itself on the GPUs of one machine, or by torchrun on several. The
speed of one GPU alone, on the whole sequence, times the number of GPUs is the ideal.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench import session
from bench.cells import Cell
from bench.timing import Spread, turns

PASSES = ("forward", "both")
ONE_GPU = "one GPU"


class BothPasses(Cell):
    """Forward and backward: two matrix products, and five."""

    @property
    def flops(self) -> int:
        return super().flops * 7 // 2


def parse(arguments: list[str] | None = None):
    parser = session.parser(__doc__, "context_parallel", replays=False)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument(
        "--heads", nargs="+", default=["16/16", "32/8"], help="query heads / key heads"
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--masks", nargs="+", choices=("full", "causal"), default=["causal"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--forms", nargs="+", help="instead of all, by their beginnings")
    parser.add_argument("--meshes", nargs="*", default=[], help="ringxheads, as 2x4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-ms", type=float, default=30.0, help="of one form in one round")
    parser.add_argument(
        "--one-gpu-tokens",
        type=int,
        default=262144,
        help="longest sequence that one GPU is timed on; its speed is the ideal of longer ones too",
    )
    parser.add_argument("--ranks", type=int, help="GPUs of this machine; all if not given")
    parser.add_argument("--profile", action="store_true", help="also when which kernels ran")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    session.require_gpu()
    import torch

    if "RANK" in os.environ:  # of torchrun
        return run(int(os.environ["LOCAL_RANK"]), arguments)
    ranks = arguments.ranks or torch.cuda.device_count()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    torch.multiprocessing.spawn(_spawned, (ranks, arguments), nprocs=ranks)
    return 0


def _spawned(rank: int, ranks: int, arguments) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    if run(rank, arguments):
        raise SystemExit(1)


def run(local_rank: int, arguments) -> int:
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    record = None
    if rank == 0:
        path = arguments.out / f"context_parallel_{arguments.dtype}_x{ranks}.json"
        record = session.Record("context_parallel", path, arguments)
        record.data.update(ranks=ranks, exchange=[], cells=[], profiles=[])
    wrong = 0
    exchanged = time_exchange(ranks)
    if record is not None:
        record.data["exchange"] = exchanged
    for name in arguments.heads:
        heads, key_heads = map(int, name.split("/"))
        for mask in arguments.masks:
            for tokens in arguments.tokens:
                cell = Cell(
                    arguments.dtype,
                    mask,
                    1,
                    tokens,
                    heads,
                    arguments.head_dim,
                    heads_kv=key_heads,
                )
                results, profiles = time_cell(cell, arguments)
                if record is not None:
                    wrong += report(record, cell, results, profiles, ranks)
                torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()
    return int(wrong > 0)


def report(record, cell: Cell, results: dict[str, Any], profiles, ranks: int) -> int:
    entry = record.add(cell, results)
    record.data["profiles"] += [{"tokens": cell.seqlen, **profile} for profile in profiles]
    record.save()
    for of_pass in PASSES:
        alone = entry["results"].get(f"{ONE_GPU}, {of_pass}", {}).get("median_ms")
        for name, result in entry["results"].items():
            if not name.endswith(of_pass):
                continue
            line = result.get("error") or f"{result['median_ms']:9.3f} ms"
            if alone and "median_ms" in result and not name.startswith(ONE_GPU):
                line += f"  {alone / ranks / result['median_ms']:6.1%} of ideal"
            session.say(f"{cell}: {name:42} {line}")
    return sum("WrongResult" in result.get("error", "") for result in results.values())


def time_cell(cell: Cell, arguments) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Milliseconds of every form, of the slowest rank; profiles of the first."""
    import torch
    import torch.distributed as dist

    from bench import context_peers
    from bench.measure import random_inputs_and_gradient

    ranks = dist.get_world_size()
    forms = context_peers.ours(_meshes(arguments)) + context_peers.peers()
    chosen = tuple(arguments.forms or [""])
    forms = [form for form in forms if form.name.startswith(chosen)]
    *qkv, grad_out = random_inputs_and_gradient(cell)
    calls: dict[str, Callable[[], object]] = {}
    results: dict[str, Any] = {}
    profiles = []
    exact = alone(cell, qkv, grad_out) if cell.seqlen <= arguments.one_gpu_tokens else None
    spans: dict[str, Any] = {}
    for form in forms:
        if not form.takes(cell, ranks):
            continue
        for of_pass in arguments.passes:
            name = f"{form.name}, {of_pass}"
            try:
                call = bind(form, cell, qkv, grad_out, of_pass)
                with form.context():
                    found = call()
                if exact is not None:
                    results[name] = check(found, exact, form)
                else:
                    results[name] = {}
                calls[name] = call
                spans[name] = form.context
            except Exception as failure:
                text = str(failure).strip().splitlines() or [""]
                results[name] = {"error": f"{type(failure).__name__}: {text[0]}"[:300]}
            torch.cuda.synchronize()
            _forget_failures(results, calls, name)
    if exact is not None:
        from cute_kernels import flash_attn_func

        leaves = [x.detach().requires_grad_() for x in qkv]
        with_grad = {"forward": False, "both": True}
        for of_pass in arguments.passes:
            name = f"{ONE_GPU}, {of_pass}"
            calls[name] = _pass_of(
                lambda q, k, v: flash_attn_func(q, k, v, causal=cell.causal),
                leaves,
                grad_out,
                with_grad[of_pass],
            )
            results[name] = {}
    for name, spread in time_in_turn(calls, spans, arguments).items():
        flops = (BothPasses(**vars(cell)) if name.endswith("both") else cell).flops
        results[name] |= {
            "median_ms": spread.median,
            "quartiles_ms": [spread.lower, spread.upper],
            "rounds": spread.count,
            "tflops": flops / spread.median / 1e9,
        }
    if arguments.profile:
        for name in (name for name in calls if name.startswith(("ring,", "all-gather,"))):
            profiles.append(
                {"heads": f"{cell.heads}/{cell.heads_kv}", **profile(name, calls[name])}
            )
    return results, profiles


def _meshes(arguments) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    shapes = {name: tuple(map(int, name.split("x"))) for name in arguments.meshes}
    return {name: init_device_mesh("cuda", shape) for name, shape in shapes.items()}


def _forget_failures(results: dict[str, Any], calls: dict[str, Any], name: str) -> None:
    """A form that failed on one rank is called on none."""
    import torch
    import torch.distributed as dist

    failed = torch.tensor(float("error" in results[name]), device="cuda")
    dist.all_reduce(failed)
    if failed.item() > 0:
        calls.pop(name, None)
        results[name].setdefault("error", "failed on another rank")


def alone(cell: Cell, qkv, grad_out) -> list[Any]:
    """Output and gradients of one GPU on the whole sequence."""
    import torch

    from cute_kernels import flash_attn_func

    leaves = [x.detach().requires_grad_() for x in qkv]
    out = flash_attn_func(*leaves, causal=cell.causal)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def bind(form, cell: Cell, qkv, grad_out, of_pass: str) -> Callable[[], Any]:
    from cute_kernels import distributed

    *parts, grad = (distributed.shard(x, form.group, 1, form.layout) for x in (*qkv, grad_out))
    leaves = [x.requires_grad_() for x in parts]
    return _pass_of(form.attention(cell.causal), leaves, grad, of_pass == "both")


def _pass_of(attention, leaves, grad_out, both: bool) -> Callable[[], Any]:
    import torch

    def forward():
        with torch.no_grad():
            return [attention(*leaves)]

    def forward_and_backward():
        out = attention(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    return forward_and_backward if both else forward


def check(found, exact, form) -> dict[str, float]:
    """Raises WrongResult unless it is what one GPU gives, as near as rounding may carry them."""
    import torch
    import torch.distributed as dist

    from bench.measure import WrongResult
    from cute_kernels import distributed

    worst = 0.0
    for ours, whole in zip(found, exact, strict=False):
        right = distributed.shard(whole, form.group, 1, form.layout).float()
        error = (ours.float() - right).square().mean().sqrt() / right.square().mean().sqrt()
        worst = max(worst, error.item())
    # Both are rounded to 8 bits twice.
    largest = torch.tensor(worst, device="cuda")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if not largest.item() < 2e-2:
        raise WrongResult(f"relative error {largest.item():.3g} to one GPU's result")
    return {"relative_error": largest.item()}


def time_in_turn(calls, contexts, arguments) -> dict[str, Spread]:
    """Milliseconds of one call of each; ranks begin each measurement together."""
    from contextlib import nullcontext

    import torch
    import torch.distributed as dist

    together = torch.zeros(1, device="cuda")
    counts = {}

    def time(name: str, count: int) -> float:
        with contexts.get(name, nullcontext)():
            dist.all_reduce(together)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                calls[name]()
            end.record()
            end.synchronize()
        taken = torch.tensor(begin.elapsed_time(end) / count, device="cuda")
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()

    for name in calls:
        time(name, 1)
        counts[name] = max(1, min(20, round(arguments.round_ms / time(name, 1))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for order in turns(list(calls), arguments.rounds):
        for name in order:
            samples[name].append(time(name, counts[name]))
    return {name: Spread.of(values) for name, values in samples.items()}


def time_exchange(ranks: int) -> list[dict[str, float]]:
    """What the messages of a step alone take: bytes that each rank sends and receives, and
    milliseconds."""
    import torch
    import torch.distributed as dist

    from cute_kernels.distributed.exchange import Delivery, Post, Ranks, exchange

    here = Ranks.of(dist.group.WORLD)
    after, before = (here.rank + 1) % ranks, (here.rank - 1) % ranks
    results = []
    most = 256 << 20
    for megabytes in (1, 4, 16, 64, 256, 512):
        rows = megabytes << 9  # of 1 KiB, of keys and of values
        k, v = torch.zeros(2, 1, rows, 4, 128, dtype=torch.bfloat16, device="cuda")
        sent = [Delivery(after, (k[0], v[0]), 0)]
        post = Post("keys", sent, [(before, (0, rows))], (k, v), rows, most, k.dtype)
        times = []
        for _ in range(6):
            dist.all_reduce(torch.zeros(1, device="cuda"))
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            arrival = exchange(here, post)
            arrival.wait()
            end.record()
            arrival.release()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        results.append({"bytes": megabytes << 20, "median_ms": statistics.median(times[1:])})
    return results


def profile(name: str, call) -> dict[str, Any]:
    """Which kernels ran when, of this rank, in microseconds from the first on."""
    import torch

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as taken:
        call()
        torch.cuda.synchronize()
    spans = []
    for event in taken.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end, event.name))
    first = min((start for start, _, _ in spans), default=0)
    return {
        "form": name,
        "spans": [
            {"kind": _kind(kernel), "from_us": start - first, "to_us": end - first}
            for start, end, kernel in sorted(spans)
            if end - start >= 5
        ],
    }


def _kind(kernel: str) -> str:
    if "nccl" in kernel.lower():
        return "exchange"
    if "merge" in kernel or "combine" in kernel:
        return "merge"
    if "cute_kernels" in kernel:
        return "attention"
    return "other"


if __name__ == "__main__":
    sys.exit(main())
