"""Calls of context parallelism on several ranks, and what is right of each."""

import dataclasses
import random

import torch
from oracle import NO_WINDOW

from cute_kernels import distributed


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention over a whole sequence."""

    form: str
    layout: str
    tokens: int
    batch: int = 1
    heads: tuple = (2, 2)
    head_dims: tuple = (8, 8)
    dtype: torch.dtype = torch.float64
    causal: bool = False
    window_size: tuple = NO_WINDOW
    softcap: float = 0.0
    sinks: bool = False
    documents: tuple | None = None
    deterministic: bool = False
    seed: int = 0

    def tensors(self):
        """Whole q, k, v, sinks or None, and the gradients of the output and of the LSE."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        lead = (self.tokens,) if self.documents else (self.batch, self.tokens)
        q = normal(*lead, self.heads[0], self.head_dims[0])
        k = normal(*lead, self.heads[1], self.head_dims[0])
        v, grad_out = (normal(*lead, self.heads[i], self.head_dims[1]) for i in (1, 0))
        grad_lse = normal(*lead[:-1], self.heads[0], self.tokens)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        sinks = normal(self.heads[0]).to(wide) if self.sinks else None
        grad_lse = grad_lse.to(wide)
        return *(x.to(self.dtype) for x in (q, k, v)), sinks, grad_out.to(self.dtype), grad_lse

    @property
    def function(self):
        return {
            "ring": distributed.ring_attn_func,
            "all_gather": distributed.all_gather_attn_func,
            "ulysses": distributed.ulysses_attn_func,
            "2d": distributed.ulysses_attn_func,
        }[self.form]

    def options(self):
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "deterministic": self.deterministic,
            "cu_seqlens": None if self.documents is None else list(self.documents),
        }


def run_cases(rank, cases, device="cpu"):
    """For each: output, LSE and the gradients of q, k, v and the sinks, whole on every rank."""
    results = [whole_results(case, group_of(case, device), device) for case in cases]
    return [[x.cpu() for x in whole] for whole in results]


_meshes = {}


def group_of(case, device):
    if case.form != "2d":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    ranks = torch.distributed.get_world_size()
    if ranks not in _meshes:
        shape = {2: (1, 2), 4: (2, 2), 6: (3, 2), 8: (4, 2)}[ranks]
        _meshes[ranks] = init_device_mesh(device, shape)
    return _meshes[ranks]


def whole_results(case, group, device):
    layout = case.layout
    at = 0 if case.documents else 1
    q, k, v, sinks, grad_out, grad_lse = (x if x is None else x.to(device) for x in case.tensors())
    parts = [distributed.shard(x, group, at, layout).requires_grad_() for x in (q, k, v)]
    inputs = [*parts, *([] if sinks is None else [sinks.requires_grad_()])]
    out, lse = case.function(
        *parts, group, **case.options(), layout=layout, sinks=sinks, return_lse=True
    )
    upstream = [
        distributed.shard(grad_out, group, at, layout),
        distributed.shard(grad_lse, group, grad_lse.dim() - 1, layout),
    ]
    grads = torch.autograd.grad((out, lse), inputs, upstream)
    assert out.is_contiguous() and lse.is_contiguous()
    results = [out.detach(), *grads[:3]]
    whole = [distributed.unshard(x, group, at, layout) for x in results]
    whole.insert(1, distributed.unshard(lse.detach(), group, lse.dim() - 1, layout))
    if sinks is not None:
        of_sinks = grads[3].clone()
        torch.distributed.all_reduce(of_sinks)
        whole.append(of_sinks)
    return whole


def random_case(chance, ranks, form):
    layouts = ["zigzag", "contiguous"] + ["stripe"] * (form != "all_gather")
    tokens = 2 * ranks * chance.randint(1, 9)
    if form == "2d":
        tokens *= 2
    documents = None
    if chance.random() < 0.5:
        cuts = sorted(chance.randint(0, tokens) for _ in range(chance.randint(0, 4)))
        last = tokens if chance.random() < 0.7 else chance.randint(max(cuts, default=0), tokens)
        documents = (0, *cuts, last)
    shared = {"ulysses": ranks, "2d": 2}.get(form, 1)
    key_heads = shared * chance.choice([1, 1, 2])

    def limit():
        return chance.choice([-1, -1, 0, chance.randint(1, 5), chance.randint(5, 40)])

    return Case(
        form,
        chance.choice(layouts),
        tokens,
        batch=chance.choice([1, 1, 2]),
        heads=(key_heads * chance.choice([1, 2]), key_heads),
        head_dims=(8, chance.choice([8, 16])),
        dtype=chance.choice([torch.float64, torch.float32, torch.float32]),
        causal=chance.random() < 0.6,
        window_size=chance.choice([NO_WINDOW, (limit(), limit())]),
        softcap=chance.choice([0.0, 0.0, 2.0]),
        sinks=chance.random() < 0.4,
        documents=documents,
        deterministic=chance.random() < 0.3,
        seed=chance.randrange(2**31),
    )


def random_cases(ranks, count, seed=0):
    chance = random.Random(1000 * ranks + seed)
    forms = ["ring", "ring", "all_gather", "ulysses", "2d"]
    return [
        random_case(chance, ranks, forms[i % len(forms) if ranks % 2 == 0 else i % 4])
        for i in range(count)
    ]
