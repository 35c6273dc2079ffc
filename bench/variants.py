"""Times variants, block masks, softcap and sinks, forward and backward, in one run on one GPU.

Variants beside FlexAttention, which torch compiles, and beside the library's own kernels where
these say the same; softcap and sinks beside FlashAttention-3 as vLLM builds it, and beside calls
without them. Kernels of variants are compiled first, in parallel, where the cache has them not.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

from bench import comparison, report, session, vllm_library
from bench.cells import cell_name, on_data
from bench.variant_cells import BACKWARD, CASES, FORWARD, SEQLEN

PEER_NAMES = ("flex-attention", "fa3-vllm", "fa4")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "variants")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES))
    parser.add_argument("--seqlen", type=int, default=SEQLEN)
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--backward", action="store_true", help="the backward pass alone")
    session.add_data_option(parser)
    vllm_library.add_option(parser)
    parser.add_argument(
        "--only-compile", action="store_true", help="fill the cache of kernels: no GPU is needed"
    )
    return parser.parse_args(arguments)


def passes(arguments: argparse.Namespace) -> list[str]:
    both = arguments.forward == arguments.backward
    return [
        *([FORWARD] if both or arguments.forward else []),
        *([BACKWARD] if both or arguments.backward else []),
    ]


def compile_all(arguments: argparse.Namespace, rules: dict[str, Any]) -> dict[str, Any]:
    """How many kernels, and the seconds it took."""
    from bench import variant_problems
    from bench.distributions import torch_dtype

    cases = [CASES[name] for name in arguments.cases]
    gradient = BACKWARD in passes(arguments)
    rows = variant_problems.kernels(cases, rules, torch_dtype(arguments.dtype), gradient)
    session.say(f"compiling {len(rows)} kernels of variants, where the cache has them not")
    begin = time.perf_counter()
    variant_problems.compile_kernels(rows)
    seconds = time.perf_counter() - begin
    session.say(f"kernels of variants: {seconds:.0f} s")
    return {"kernels": len(rows), "seconds": round(seconds, 1)}


def run(arguments: argparse.Namespace, device: str = "cuda") -> dict[str, Any]:
    from bench import measure, providers, variant_problems
    from bench.distributions import chosen

    suffix = "" if len(passes(arguments)) == 2 else f"_{passes(arguments)[0]}"
    path = arguments.out / f"variants_{arguments.dtype}{suffix}.json"
    record = session.Record("variants", path, arguments)
    data = record.data
    data["cells"] = []
    loaders = {
        variant_problems.FA3: partial(variant_problems.load_fa3, arguments.vllm_library),
        variant_problems.FA4: providers.fa4_module,
    }
    loaded: dict[str, Any] = dict.fromkeys(loaders)
    missing = {}
    for name in loaders.keys() & set(arguments.peers):
        try:
            loaded[name] = loaders[name]()
        except providers.Unavailable as error:
            missing[name] = str(error)
    data["providers"] = comparison.describe([], missing)
    cases = [CASES[name] for name in arguments.cases]
    rules = variant_problems.rules_of(cases, arguments.seqlen, device)
    data["compiled"] = compile_all(arguments, rules)
    data["machine"]["cublas_bf16"] = measure.time_cublas(session.query_gpu)
    todo = [(case, of_pass) for case in cases for of_pass in passes(arguments)]
    for number, (case, of_pass) in enumerate(todo, start=1):
        if case.rule:
            rule = rules[case.name]
            given = (arguments.seqlen, device, arguments.peers, loaded[variant_problems.FA4])
            problem = variant_problems.of_rule(case, rule, *given)
        else:
            problem = variant_problems.of_arguments(
                case, arguments.seqlen, device, *loaded.values()
            )
        cell = case.cell(arguments.dtype, arguments.seqlen, problem.pairs, of_pass)
        for on in on_data([cell], chosen(arguments.data)):
            begin = time.perf_counter()
            entry = record.add(on, time_problem(problem, on, arguments, data))
            comparison.progress(number, len(todo), entry, on, report.peers_of(data))
            session.say(f"    {time.perf_counter() - begin:.0f} s with checks and compiling")
    session.say(f"wrote {record.path}")
    return data


def time_problem(
    problem: Any, cell: Any, arguments: argparse.Namespace, data: dict[str, Any]
) -> dict[str, Any]:
    """All candidates in turn, each against a reference of what it should give."""
    from bench import measure, providers
    from bench.timing import captured_or_eager

    timed = [provider for provider, _ in problem.candidates]
    inputs, reference = measure.random_inputs, measure.Reference
    if cell.of_pass == BACKWARD:
        timed = [providers.backward_of(provider) for provider in timed]
        inputs, reference = measure.random_inputs_and_gradient, measure.GradientReference
    data["providers"] |= comparison.describe(timed, {})
    of_options: dict[Any, measure.Task] = {}
    tasks = {}
    for provider, options in problem.candidates:
        asked = partial(reference, options=options)
        task = of_options.setdefault(options, measure.Task(inputs, asked, captured_or_eager))
        tasks[provider.name] = task
    settings = (arguments.rounds, arguments.target_ms, tasks[report.OURS], tasks)
    return measure.time_cell(cell, timed, *settings)


def table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One line a case and pass: ours, the peer, and ours over each of our other candidates."""
    peers = report.peers_of(data)
    others = [name for name in data["providers"] if name.startswith(f"{report.OURS}:")]
    header = ["case", "pass", "ms", "TFLOP/s", "peer", "of the peer", "ours / peer"]
    rows = []
    for entry in data["cells"]:
        best = report.best_peer(entry, peers)
        rows.append(
            [
                cell_name(entry),
                entry["of_pass"],
                report.show(entry["results"].get(report.OURS, {}).get("median_ms"), 3),
                report.show(report.tflops(entry, report.OURS)),
                "-" if best is None else best[0],
                report.show(best and best[1]),
                report.show(report.ratio(entry, peers), 2),
                *(report.show(report.ratio(entry, [name]), 2) for name in others),
            ]
        )
    return [*header, *(f"/ {name.partition(':')[2]}" for name in others)], rows


def by_events(data: dict[str, Any]) -> list[str]:
    """What could not be captured in a graph."""
    return [
        f"{name} [{cell_name(entry)} {entry['of_pass']}]: timed from the host, not by a graph"
        for entry in data["cells"]
        for name, result in entry["results"].items()
        if result.get("timed_by") == "eager"
    ]


def print_summary(data: dict[str, Any]) -> None:
    machine = data["machine"]
    print(
        f"{machine['gpu']}, torch {machine['torch']}, "
        f"cuBLAS bf16 8192^3 {machine['cublas_bf16']['tflops']:.0f} TFLOP/s"
    )
    for line in (*report.failures(data), *by_events(data)):
        print(line)
    print("\nspeed of ours / that of peers and of our other candidates; TFLOP/s of what is seen")
    print(report.text_table(*table(data)))


def main() -> int:
    arguments = parse()
    if arguments.only_compile:
        from bench import variant_problems

        cases = [CASES[name] for name in arguments.cases]
        compile_all(arguments, variant_problems.rules_of(cases, arguments.seqlen, "cpu"))
        return 0
    session.require_gpu()
    data = run(arguments)
    print_summary(data)
    return int(comparison.failed(data))


if __name__ == "__main__":
    sys.exit(main())
