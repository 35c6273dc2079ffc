"""Serves requests with a small random Llama-like model, from a paged KV cache.

Requests of different lengths come and go: a new one gets pages and its prompt is run in one packed
call (prefill); then each step adds one token to every running request (decode), on a GPU by
replaying one CUDA graph a batch size. Afterwards each text is run through the model at once,
without a cache, and must give the same tokens: in fp32 on the CPU exactly, in bf16 on a Hopper GPU
up to rounding.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from cute_kernels import flash_attn_func, flash_attn_with_kvcache

LAYERS, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 3, 8, 2, 64, 1000
WIDTH = HEADS * HEAD_DIM
POSITIONS = 512
PAGE_SIZE = 16
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rotary_tables(device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (positions, head_dim / 2)."""
    frequency = 10000.0 ** -(torch.arange(0, HEAD_DIM, 2, device=device) / HEAD_DIM)
    angles = torch.outer(torch.arange(POSITIONS, device=device), frequency)
    return angles.cos(), angles.sin()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)


class Model(nn.Module):
    """Tokens (total,) to logits (total, vocabulary); what a token attends to is up to `attend`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, attend: Attention) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.norms[0](x)).unflatten(-1, (-1, HEAD_DIM))
            q, k, v = qkv.split([HEADS, KEY_HEADS, KEY_HEADS], -2)
            x = x + layer.out(attend(index, q, k, v).flatten(-2))
            h = layer.norms[1](x)
            x = x + layer.down(functional.silu(layer.gate(h)) * layer.up(h))
        return functional.linear(self.norm(x), self.embedding.weight)


@dataclass
class Request:
    prompt: list[int]
    count: int  # of tokens to add
    text: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.text) == len(self.prompt) + self.count


class Server:
    """The cache, its free pages, and the requests that run."""

    def __init__(self, model: Model, slots: int, pages: int) -> None:
        weight = model.embedding.weight
        self.model, self.device = model, weight.device
        self.cos, self.sin = rotary_tables(str(self.device))
        # Of each layer K and V side by side; what no request uses is NaN here, to show that it may.
        shape = (LAYERS, pages, PAGE_SIZE, KEY_HEADS, 2 * HEAD_DIM)
        self.cache = weight.new_full(shape, float("nan"))
        self.free = list(range(pages))
        self.running: list[Request] = []
        self.slots = slots
        # What a decode step reads: filled in place, so that a graph sees new contents.
        self.tokens = torch.zeros(slots, dtype=torch.long, device=self.device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=self.device)
        most_pages = -(-POSITIONS // PAGE_SIZE)
        self.table = torch.full((slots, most_pages), -1, dtype=torch.int32, device=self.device)
        self.steps: dict[int, Callable[[], Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **places: Tensor) -> Tensor:
        """Appends k, rotated, and v to the layer's cache, and attends to all that it holds."""
        k_cache, v_cache = self.cache[layer].split(HEAD_DIM, -1)
        return flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos=self.cos,
            rotary_sin=self.sin,
            rotary_interleaved=False,
            causal=True,
            **places,
        )

    def admit(self, waiting: list[Request]) -> None:
        """Prefill: takes requests as long as there are slots and pages, and runs their prompts."""
        new: list[Request] = []
        while waiting and len(self.running) + len(new) < self.slots:
            request = waiting[0]
            needed = -(-(len(request.prompt) + request.count) // PAGE_SIZE)
            if needed > len(self.free):
                break
            request.pages = [self.free.pop() for _ in range(needed)]
            request.text = list(request.prompt)
            new.append(waiting.pop(0))
        if not new:
            return
        ends = torch.tensor([0] + [len(request.prompt) for request in new]).cumsum(0).int()
        tokens = torch.tensor([token for request in new for token in request.prompt])
        starts, table = ends.to(self.device), self.page_table(new)
        before = torch.zeros(len(new), dtype=torch.int32, device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            places = {"cache_seqlens": before, "page_table": table}
            return self.attend(
                layer, q, k, v, cu_seqlens_q=starts, cu_seqlens_k_new=starts, **places
            )

        logits = self.model(tokens.to(self.device), attend)
        for request, token in zip(new, logits[starts[1:] - 1].argmax(-1).tolist(), strict=True):
            request.text.append(token)
        self.running += new

    def page_table(self, requests: list[Request]) -> Tensor:
        table = torch.full((len(requests), self.table.shape[1]), -1, dtype=torch.int32)
        for row, request in enumerate(requests):
            table[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
        return table.to(self.device)

    def decode(self) -> None:
        """One token more for every running request."""
        batch = len(self.running)
        newest = [request.text[-1] for request in self.running]
        cached = [len(request.text) - 1 for request in self.running]
        self.tokens[:batch] = torch.tensor(newest)
        self.lengths[:batch] = torch.tensor(cached, dtype=torch.int32)
        self.table[:batch] = self.page_table(self.running)
        if batch not in self.steps:
            self.steps[batch] = self.step_of(batch)
        for request, token in zip(self.running, self.steps[batch]().tolist(), strict=True):
            request.text.append(token)

    def step_of(self, batch: int) -> Callable[[], Tensor]:
        """What runs a step of so many requests: on a GPU, a graph of it."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            places = {"cache_seqlens": self.lengths[:batch], "page_table": self.table[:batch]}
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))  # one token of each
            return self.attend(layer, q, k, v, **places).squeeze(1)

        def step() -> Tensor:
            return self.model(self.tokens[:batch], attend).argmax(-1)

        if self.device.type != "cuda":
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # cuBLAS wants a call before; it writes what the graph will write again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def serve(self, requests: list[Request]) -> int:
        """Runs all of them; returns how many steps it took."""
        waiting, steps = list(requests), 0
        while waiting or self.running:
            self.admit(waiting)
            if not self.running:
                raise ValueError("a request needs more pages than there are")
            self.retire()
            if self.running:
                self.decode()
                self.retire()
                steps += 1
        return steps

    def retire(self) -> None:
        for request in [request for request in self.running if request.is_done]:
            self.free += request.pages
            self.running.remove(request)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (seqlen, heads, head_dim) rotated by PyTorch, in fp32."""
    a, b = x.float().chunk(2, -1)
    c, s = (table[: x.shape[0], None] for table in (cos, sin))
    return torch.cat([a * c - b * s, a * s + b * c], -1).to(x.dtype)


def shortfalls(model: Model, request: Request) -> Tensor:
    """Run without a cache: by how much each new token's logit is below the largest one."""
    device = model.embedding.weight.device
    cos, sin = rotary_tables(str(device))
    text = torch.tensor(request.text, device=device)

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return flash_attn_func(q[None], k[None], v[None], causal=True)[0]

    logits = model(text[:-1], attend)[len(request.prompt) - 1 :].float()
    chosen = logits.gather(1, text[len(request.prompt) :, None])[:, 0]
    return logits.amax(-1) - chosen


def make_requests(count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    lengths = [(draw.randint(1, 120), draw.randint(1, 40)) for _ in range(count)]
    return [Request([draw.randrange(VOCABULARY) for _ in range(a)], b) for a, b in lengths]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--slots", type=int, default=4, help="requests that run at a time")
    parser.add_argument("--pages", type=int, default=32, help=f"of {PAGE_SIZE} tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    dtype, allowed = (torch.float32, 0.0) if device == "cpu" else (torch.bfloat16, 0.5)
    model = Model().to(device, dtype)
    requests = make_requests(arguments.requests, arguments.seed)
    with torch.inference_mode():
        server = Server(model, arguments.slots, arguments.pages)
        begin = time.perf_counter()
        steps = server.serve(requests)
        seconds = time.perf_counter() - begin
        below = torch.cat([shortfalls(model, request) for request in requests])
    tokens = sum(request.count for request in requests)
    same = int((below == 0).sum())
    print(f"{len(requests)} requests, {tokens} tokens, {steps} steps, {seconds:.2f} s on {device}")
    print(f"{same} of {tokens} tokens are those of the model without a cache")
    if below.max() > allowed:
        print(f"wrong: a token's logit is {below.max():.3g} below the largest one")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
