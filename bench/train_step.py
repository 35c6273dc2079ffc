"""Times a training step of a Llama-shaped model of 1B parameters, attention by attention.

One sequence, or documents packed one behind the other; bf16 weights and AdamW. The layers and the
loss are compiled. Every attention has a model of its own with the same weights, sees the same
random tokens in each step, so that losses fall, and takes turns with the others.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import report, session
from bench.timing import Spread, turns

ATTENTIONS = ("cute_kernels", "sdpa-cudnn", "sdpa-flash")
PACKED = ("cute_kernels", "torch_varlen")
WARM_UP = 3


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "train_step", replays=False)
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of each attention")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--checkpointing", action="store_true", help="of each layer's activations")
    parser.add_argument("--packed", action="store_true", help="documents of log-normal lengths")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument(
        "--attentions", nargs="+", metavar="NAME", help="default: all that can answer"
    )
    parser.add_argument("--shape", choices=["1b", "8b", "tiny"], default="1b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    chosen = parser.parse_args(arguments)
    chosen.attentions = chosen.attentions or list(PACKED if chosen.packed else ATTENTIONS)
    return chosen


def document_starts(tokens: int, seed: int = 0) -> list[int]:
    """Where each document begins, and `tokens`: lengths are exp(N(6.5, 1)), 1100 in the mean."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    starts = [0]
    while starts[-1] < tokens:
        length = math.ceil(math.exp(6.5 + torch.randn((), generator=generator).item()))
        starts.append(min(starts[-1] + length, tokens))
    return starts


def packing(tokens: int, device: str) -> dict[str, Any]:
    """What a model of transformers is told about packed documents."""
    import torch

    starts = torch.tensor(document_starts(tokens), dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in starts.diff().tolist()])
    longest, starts = int(starts.diff().max()), starts.to(device)
    return {
        "position_ids": positions[None].to(device),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def make_step(arguments: argparse.Namespace, attention: str) -> Callable[[Any], Any]:
    """tokens -> the loss before an optimizer's step."""
    import torch

    from bench import llama

    model = llama.build(arguments.shape, arguments.device).train()
    llama.choose(model, attention)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of = llama.loss_of(model)
    if not arguments.eager:
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(loss_of)
    fused = arguments.device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    extra = packing(arguments.tokens, arguments.device) if arguments.packed else {}

    def step(ids: Any) -> Any:
        hidden = model.model(input_ids=ids, use_cache=False, **extra).last_hidden_state
        loss = loss_of(hidden, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def time_steps(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By attention: the time of a step and the losses, or why there is none."""
    import torch

    from bench import llama

    vocabulary = llama.SHAPES[arguments.shape].get("vocab_size", llama.VOCABULARY)
    steps: dict[str, Callable[[Any], Any]] = {}
    times: dict[str, list[float]] = {}
    losses: dict[str, list[Any]] = {}
    results: dict[str, dict[str, Any]] = {}

    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary, (1, arguments.tokens)).to(arguments.device)

    def run(name: str) -> float:
        begin = _clock(arguments.device)
        losses[name].append(steps[name](ids))
        return (_clock(arguments.device) - begin) * 1e3

    for name in arguments.attentions:
        times[name], losses[name] = [], []
        try:
            steps[name] = make_step(arguments, name)
            for _ in range(WARM_UP):
                run(name)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            steps.pop(name, None)
        session.say(f"{name}: {results.get(name, {}).get('error', 'ready')}")
    for order in turns(list(steps), arguments.rounds):
        for name in order:
            times[name].append(run(name))
    for name in steps:
        spread = Spread.of(times[name])
        results[name] = {
            "median_ms": spread.median,
            "quartiles_ms": [spread.lower, spread.upper],
            "losses": torch.stack(losses[name]).tolist(),
        }
    return results


def _clock(device: str) -> float:
    """Seconds, when all work is done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    ours = results.get("cute_kernels", {}).get("median_ms")
    lines = []
    for name, result in results.items():
        if "error" in result:
            lines.append([name, result["error"], "-", "-", "-"])
            continue
        ratio = None if ours is None else result["median_ms"] / ours
        ends = (result["losses"][0], result["losses"][-1])
        numbers = [report.show(result["median_ms"], 1), report.show(ratio, 3)]
        lines.append([name, *numbers, *(report.show(x, 4) for x in ends)])
    return ["attention", "ms a step", "over ours", "first loss", "last loss"], lines


def main() -> int:
    arguments = parse()
    if arguments.device == "cuda":
        session.require_gpu()
    results = time_steps(arguments)
    if arguments.device == "cuda":
        kind = "packed" if arguments.packed else "dense"
        kind += "_checkpointing" if arguments.checkpointing else ""
        path = arguments.out / f"train_step_{arguments.shape}_{kind}.json"
        record = session.Record("train_step", path, arguments)
        record.data["results"] = results
        record.save()
    print(report.text_table(*table(results)))
    return int(any("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
