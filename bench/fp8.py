"""Times FP8 attention against FlashAttention-3's, in one run on one GPU.

Three questions: the attention kernel on inputs that are FP8 already; the whole way from bf16,
quantisation included, against the bf16 kernels of all; the memory traffic of the quantisation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import report, session
from bench.cells import Cell, diffusion_grid, on_data, paper_grid
from bench.distributions import chosen

if TYPE_CHECKING:
    from bench.check import Reference

OURS = report.OURS
OTHER = f"{OURS}:other"  # the element of Q and K that is not the default
PEER = "fa3-fwd"
WHOLE = f"{OURS}:from-bf16"
BF16_PEERS = ("sdpa-cudnn", "sdpa-flash", "fa3-fwd", "fa3-xformers")
LABELS = {
    OURS: "cute_kernels",
    OTHER: "cute_kernels, the other element of Q and K",
    PEER: "FA3 (fa3-fwd)",
    WHOLE: "cute_kernels from bf16 tensors, quantisation included",
}
WHOLE_FROM = 4096  # below, quantisation is much of the time


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "fp8")
    session.add_grid_options(parser)
    session.add_data_option(parser)
    parser.add_argument(
        "--grid",
        choices=["paper", "diffusion"],
        default="paper",
        help="the paper's; image and video models' (what the options of the paper's say is unused)",
    )
    parser.add_argument(
        "--no-whole", action="store_true", help="only the kernels on FP8 inputs and the quantiser"
    )
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Candidate:
    """What is timed, and the reference of what it is given: FP8 attention is right if it is that
    of the quantised tensors. How far these are from the others is a figure, not a fault."""

    call: Callable[[], Any]
    reference: Reference
    context: Callable[[], AbstractContextManager] = nullcontext
    arrange: Callable[[Any], Any] = lambda out: out


def kernel_candidates(cell: Cell, q, k, v) -> dict[str, Candidate]:
    """On inputs that are FP8 already, the way each implementation wants them."""
    import torch

    from bench.check import FP8, Reference
    from bench.providers import Unavailable, _import
    from cute_kernels.fp8 import QK_DTYPE, flash_attn_fp8_func, quantize_fp8

    e4m3 = torch.float8_e4m3fn
    causal = cell.causal
    v8 = quantize_fp8(v, block=None)

    def ours(dtype):
        q8, k8 = (quantize_fp8(x, incoherent=True, dtype=dtype) for x in (q, k))
        given = (x.dequantize() for x in (q8, k8, v8))
        return Candidate(
            lambda: flash_attn_fp8_func(q8, k8, v8, causal=causal), Reference(cell, *given, **FP8)
        )

    candidates = {
        OURS: ours(QK_DTYPE),
        OTHER: ours(next(dtype for dtype in (e4m3, torch.int8) if dtype != QK_DTYPE)),
    }
    try:
        fa3 = _import("fa3_fwd_interface")
    except Unavailable as error:
        session.say(str(error))
    else:
        limit = torch.finfo(e4m3).max
        plain = [x.clamp(-limit, limit).to(e4m3) for x in (q, k, v)]
        candidates[PEER] = Candidate(
            lambda: fa3.flash_attn_func(*plain, causal=causal),
            Reference(cell, *(x.float() for x in plain), **FP8),
        )
    return candidates


def whole_candidates(cell: Cell, q, k, v, exact: Reference) -> dict[str, Candidate]:
    """On bf16 tensors; `exact` is attention to these."""
    from bench.check import FP8, Reference
    from bench.providers import load_peers, ours
    from cute_kernels.fp8 import QK_DTYPE, flash_attn_fp8_func, quantize_fp8

    rows: dict[str, Any] = {"incoherent": True, "dtype": QK_DTYPE}
    quantised = (
        quantize_fp8(q, **rows),
        quantize_fp8(k, smooth=True, **rows),
        quantize_fp8(v, block=None),
    )
    candidates = {
        WHOLE: Candidate(
            lambda: flash_attn_fp8_func(q, k, v, causal=cell.causal),
            Reference(cell, *(x.dequantize() for x in quantised), **FP8),
        )
    }
    peers, _ = load_peers(BF16_PEERS)
    for provider in (ours(), *peers):
        candidates[f"{provider.name}:bf16"] = Candidate(
            provider.bind(cell, q, k, v), exact, provider.context, provider.arrange
        )
    return candidates


def checked(candidate: Candidate, exact: Reference) -> dict[str, float]:
    """How far the result of a call is from attention to the tensors before they were quantised;
    raises if it is not that of what the candidate is given."""
    result = candidate.call()
    out = candidate.arrange(result[0] if isinstance(result, tuple) else result)
    right = candidate.reference
    error = right.error(out)
    if error > right.tolerance:
        raise ValueError(f"error {error:.3g} is above the tolerance {right.tolerance:.3g}")
    rmse = exact.rmse(out)
    return {"rmse": rmse, "relative_error": rmse / exact.size, "max_error": error}


def time_cell(cell: Cell, arguments: argparse.Namespace) -> dict[str, Any]:
    from bench.check import Reference
    from bench.measure import random_inputs
    from bench.timing import CapturedCall, interleaved_gpu_times

    inputs = random_inputs(cell)
    exact = Reference(cell, *inputs)
    candidates = kernel_candidates(cell, *inputs)
    if cell.seqlen >= WHOLE_FROM and not arguments.no_whole:
        candidates |= whole_candidates(cell, *inputs, exact)
    results: dict[str, dict[str, Any]] = {}
    captured = {}
    for name, candidate in candidates.items():
        try:
            with candidate.context():
                results[name] = checked(candidate, exact)
                captured[name] = CapturedCall(candidate.call, arguments.target_ms)
        except Exception as failure:
            results[name] = {"error": f"{type(failure).__name__}: {failure}"[:200]}
    if not captured:
        return results
    for name, spread in interleaved_gpu_times(captured, arguments.rounds).items():
        results[name] |= {
            "median_ms": spread.median,
            "quartiles_ms": [spread.lower, spread.upper],
            "tflops": cell.tflops(spread.median),
        }
    return results


def time_quantiser(arguments: argparse.Namespace) -> dict[str, Any]:
    """TB/s, bytes read and written once, of what quantises Q or K, K with its mean, V, and of a
    plain copy."""
    import torch

    from bench.timing import CapturedCall, interleaved_gpu_times
    from cute_kernels.fp8 import QK_DTYPE, quantize_fp8

    results: dict[str, Any] = {}
    for head_dim in arguments.head_dims:
        shape = (4, 16384, 2048 // head_dim, head_dim)
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        row: dict[str, Any] = {"incoherent": True, "dtype": QK_DTYPE}
        calls: dict[str, Callable[[], Any]] = {
            "copy": lambda x=x, y=y: y.copy_(x),
            "rows": lambda x=x, row=row: quantize_fp8(x, **row),
            "rows, mean subtracted": lambda x=x, row=row: quantize_fp8(x, smooth=True, **row),
            "values": lambda x=x: quantize_fp8(x, block=None),
        }
        captured = {name: CapturedCall(call, arguments.target_ms) for name, call in calls.items()}
        times = interleaved_gpu_times(captured, arguments.rounds)
        results[str(head_dim)] = {
            name: x.numel() * (4 if name == "copy" else 3) / spread.median / 1e9
            for name, spread in times.items()
        }
    return results


def time_cublas(rounds: int) -> float:
    """TFLOP/s of cuBLAS's FP8 product of two 8192 x 8192 matrices."""
    import torch

    from bench.timing import CapturedCall, interleaved_gpu_times

    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    call = CapturedCall(
        lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    )
    return 2 * size**3 / interleaved_gpu_times({"x": call}, rounds)["x"].median / 1e9


def cells(arguments: argparse.Namespace) -> list[Cell]:
    if arguments.grid == "diffusion":
        return diffusion_grid("bf16")
    return paper_grid("bf16", arguments.head_dims, arguments.masks, arguments.seqlens)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cute_kernels.fp8 import QK_DTYPE

    name = "fp8_forward" if arguments.grid == "paper" else f"fp8_{arguments.grid}"
    record = session.Record("fp8", arguments.out / f"{name}.json", arguments)
    data = record.data
    data["machine"]["cublas_fp8_tflops"] = time_cublas(arguments.rounds)
    data["qk_dtype"] = str(QK_DTYPE).removeprefix("torch.")
    data["providers"] = {name: {"label": label} for name, label in LABELS.items()}
    data["cells"] = []
    with torch.no_grad():
        data["quantiser_tb_s"] = time_quantiser(arguments)
        record.save()
        grid = on_data(cells(arguments), chosen(arguments.data))
        for number, cell in enumerate(grid, start=1):
            entry = record.add(cell, time_cell(cell, arguments))
            mine, ratio = report.tflops(entry, OURS), report.ratio(entry, [PEER])
            session.say(
                f"[{number}/{len(grid)}] {cell}: {report.show(mine)} TFLOP/s, "
                f"ratio {report.show(ratio, 2)}"
            )
    session.say(f"wrote {record.path}")
    return data


def whole_ratio(entry: dict[str, Any]) -> float | None:
    """From bf16 tensors: ours over the best bf16 kernel of any peer."""
    peers = [f"{name}:bf16" for name in BF16_PEERS]
    return report.ratio(entry, peers, WHOLE)


def whole_table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """From bf16 tensors: milliseconds of ours in 16 and 8 bits and of each peer, and the speed of
    ours over the best peer's."""
    ours = f"{OURS}:bf16"
    peers = [
        name
        for name in (f"{peer}:bf16" for peer in BF16_PEERS)
        if any("median_ms" in entry["results"].get(name, {}) for entry in data["cells"])
    ]
    header = ["cell", "ours, 16 bits, ms", "ours, 8 bits, ms"]
    header += [f"{name.removesuffix(':bf16')}, ms" for name in peers]
    header += ["16 bits/best", "8 bits/best", "error of 8 bits"]

    def milliseconds(entry: dict[str, Any], name: str) -> str:
        return report.show(entry["results"].get(name, {}).get("median_ms"), 2)

    rows = [
        [
            report.cell_name(entry),
            *(milliseconds(entry, name) for name in (ours, WHOLE, *peers)),
            report.show(report.ratio(entry, peers, ours), 2),
            report.show(whole_ratio(entry), 2),
            shown_error(entry, WHOLE),
        ]
        for entry in data["cells"]
    ]
    return header, rows


def shown_error(entry: dict[str, Any], provider: str) -> str:
    """||out - exact|| / ||exact||, exact being attention to the tensors before quantisation."""
    error = entry["results"].get(provider, {}).get("relative_error")
    return "-" if error is None else f"{100 * error:.1f}%"


def summary(data: dict[str, Any]) -> str:
    """The tables as Markdown."""
    names = [OURS, OTHER, PEER]
    header = ["cell", *names, f"{OURS}/{PEER}", f"{OTHER}/{PEER}", "from bf16", "from bf16/best"]
    header += [f"error, {name}" for name in (OURS, PEER)]
    rows = [
        [
            report.cell_name(entry),
            *(report.show(report.tflops(entry, name)) for name in names),
            report.show(report.ratio(entry, [PEER]), 2),
            report.show(report.ratio(entry, [PEER], OTHER), 2),
            report.show(report.tflops(entry, WHOLE)),
            report.show(whole_ratio(entry), 2),
            *(shown_error(entry, name) for name in (OURS, PEER)),
        ]
        for entry in data["cells"]
    ]
    mean = report.geometric_mean(report.ratio(entry, [PEER]) for entry in report.normal_cells(data))
    lines = [
        f"{data['machine']['gpu']}, torch {data['machine']['torch']}, cuBLAS FP8 8192^3 "
        f"{data['machine']['cublas_fp8_tflops']:.0f} TFLOP/s; {OURS}: Q and K in "
        f"{data['qk_dtype']}",
        report.markdown_table(header, rows),
        report.markdown_table(*whole_table(data)),
        f"geometric mean of {OURS}/{PEER} on N(0, 1): {report.show(mean, 3)}",
        f"{OURS}/{PEER} by data:",
        report.markdown_table(*report.lowest_rows(data, [PEER])),
    ]
    for head_dim, speeds in data["quantiser_tb_s"].items():
        shown = ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
        lines.append(f"quantiser, D={head_dim}, TB/s: {shown}")
    return "\n".join([*lines, *report.failures(data)])


def main() -> int:
    arguments = parse()
    session.require_gpu()
    data = run(arguments)
    print(summary(data))
    return int(any("error" in entry["results"][OURS] for entry in data["cells"]))


if __name__ == "__main__":
    sys.exit(main())
