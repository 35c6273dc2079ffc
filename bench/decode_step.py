"""Times one step of generation of a Llama-shaped model of 8B parameters: tokens a second.

With transformers' static cache and SDPA, the same cache and our kernels, and our kernels on a paged
cache. Each step is a CUDA graph of the whole model; norms and MLPs are compiled. The graphs take
turns. The logits of all are compared first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import report, session
from bench.timing import Spread, turns

VARIANTS = ("paged", "static", "sdpa-static")
PAGE_SIZE = 64


class Step(NamedTuple):
    """A variant's step: `run` changes nothing that `reset` does not set back."""

    run: Callable[[], Any]  # -> logits (batch, vocabulary)
    reset: Callable[[], None]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = session.parser(__doc__, "decode_step", replays=False)
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each variant")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=4096, help="tokens that are in the cache")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--shape", choices=["1b", "8b", "tiny"], default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    return parser.parse_args(arguments)


class PagedCache(NamedTuple):
    """Of all layers; an attention function of transformers, which a model calls with new keys and
    values only where it is given no cache of its own."""

    layers: list[Any]  # (2, pages, page_size, key heads, head_dim)
    table: Any  # (batch, pages of a sequence)
    lengths: Any  # (batch,)

    @classmethod
    def empty(cls, model: Any, batch: int, context: int) -> PagedCache:
        import torch

        config, device = model.config, model.device
        pages = -(-(context + 1) // PAGE_SIZE)
        shape = (2, batch * pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        torch.manual_seed(0)
        order = torch.randperm(batch * pages, dtype=torch.int32)
        return cls(
            [torch.zeros(shape, dtype=model.dtype, device=device) for _ in layers],
            order.view(batch, pages).to(device),
            torch.zeros(batch, dtype=torch.int32, device=device),
        )

    def of_sequence(self, i: int) -> PagedCache:
        return PagedCache(self.layers, self.table[i : i + 1], self.lengths[i : i + 1])

    def attend(self, module: Any, q: Any, k: Any, v: Any, *_: Any, **options: Any) -> Any:
        from cute_kernels import flash_attn_with_kvcache

        k_cache, v_cache = self.layers[module.layer_idx]
        out = flash_attn_with_kvcache(
            *(q.transpose(1, 2), k_cache, v_cache, k.transpose(1, 2), v.transpose(1, 2)),
            cache_seqlens=self.lengths,
            page_table=self.table,
            softmax_scale=options["scaling"],
            causal=True,
        )
        return out, None

    def use(self, model: Any) -> None:
        import transformers

        transformers.AttentionInterface.register("bench_paged", self.attend)
        model.set_attn_implementation("bench_paged")


def paged_step(model: Any, prompt: Any, token: Any) -> Step:
    import torch

    batch, context = prompt.shape
    cache = PagedCache.empty(model, batch, context)
    for i in range(batch):
        cache.of_sequence(i).use(model)
        model.model(input_ids=prompt[i : i + 1], use_cache=False)
    cache.lengths.fill_(context)
    positions = torch.full_like(token, context)

    def run() -> Any:
        cache.use(model)
        return model(input_ids=token, position_ids=positions, use_cache=False).logits[:, -1]

    return Step(run, lambda: None)


def static_step(model: Any, prompt: Any, token: Any, attention: str) -> Step:
    import transformers

    from bench import llama

    context = prompt.shape[1]
    # 8 more: a mask whose rows are no multiple of 16 bytes has no fast kernel in SDPA.
    cache = transformers.StaticCache(config=model.config, max_cache_len=context + 8)
    llama.choose(model, attention)
    model.model(input_ids=prompt, past_key_values=cache, use_cache=True)

    def run() -> Any:
        llama.choose(model, attention)
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    return Step(run, reset)


def make_step(variant: str, *inputs: Any) -> Step:
    if variant == "paged":
        return paged_step(*inputs)
    return static_step(*inputs, "sdpa" if variant == "sdpa-static" else "cute_kernels")


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run()  # loads and compiles
        step.reset()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step.run()

    def replay() -> Any:
        graph.replay()
        return logits

    return Step(replay, step.reset)


def time_steps(arguments: argparse.Namespace, model: Any, batch: int) -> dict[str, dict[str, Any]]:
    """By variant: the time of a step, tokens a second, and how far the logits are from those of the
    last variant, of their norm."""
    import torch

    torch.manual_seed(1)
    shape = (batch, arguments.context + 1)
    ids = torch.randint(0, model.config.vocab_size, shape).to(arguments.device)
    on_gpu = arguments.device == "cuda"
    steps, times, logits = {}, {}, {}
    for variant in arguments.variants:
        step = make_step(variant, model, ids[:, :-1], ids[:, -1:])
        steps[variant] = captured(step) if on_gpu else step
        steps[variant].reset()
        logits[variant] = steps[variant].run().float().clone()
        times[variant] = []
    for order in turns(arguments.variants, arguments.rounds if on_gpu else 0):
        for variant in order:
            steps[variant].reset()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            steps[variant].run()
            end.record()
            torch.cuda.synchronize()
            times[variant].append(begin.elapsed_time(end))
    right = logits[arguments.variants[-1]]
    results: dict[str, dict[str, Any]] = {}
    for variant in arguments.variants:
        off = ((logits[variant] - right).norm() / right.norm()).item()
        results[variant] = {"logits_off": off}
        if times[variant]:
            spread = Spread.of(times[variant])
            results[variant] |= {
                "median_ms": spread.median,
                "quartiles_ms": [spread.lower, spread.upper],
                "tokens_per_second": batch / spread.median * 1e3,
            }
    return results


def table(cells: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for cell in cells:
        for variant, result in cell["results"].items():
            lines.append(
                [
                    f"{cell['batch']} of {cell['context']} tokens",
                    variant,
                    report.show(result.get("median_ms"), 2),
                    report.show(result.get("tokens_per_second"), 1),
                    f"{result['logits_off']:.1e}",
                ]
            )
    return ["sequences", "cache", "ms a step", "tokens/s", "logits off"], lines


def main() -> int:
    arguments = parse()
    if arguments.device == "cuda":
        session.require_gpu()
    import torch

    from bench import llama

    cells = []
    with torch.no_grad():
        model = llama.build(arguments.shape, arguments.device).eval()
        if arguments.device == "cuda":
            for layer in model.model.layers:
                for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
                    part.compile()
        for batch in arguments.batch:
            results = time_steps(arguments, model, batch)
            cells.append({"batch": batch, "context": arguments.context, "results": results})
            session.say(f"{batch} sequences: done")
    if arguments.device == "cuda":
        path = arguments.out / f"decode_step_{arguments.shape}.json"
        record = session.Record("decode_step", path, arguments)
        record.data["cells"] = cells
        record.save()
    print(report.text_table(*table(cells)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
