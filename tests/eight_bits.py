"""Caches of 8 bits: their factors, and what is right of attention to them."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from caches import PAGE_SIZES, Cache, random_cache, random_lengths, random_queries
from oracle import Attention, assert_rows, total

from cute_kernels import tile_configs
from cute_kernels.fp8.rotation import random_signs

E4M3 = torch.float8_e4m3fn
CACHES = [E4M3, torch.int8]
QUERIES = [torch.bfloat16, torch.bfloat16, torch.float16, E4M3]
# P is float16, and rotated queries are
UNDERFLOW = 2.0**-22
ROTATION_NOISE = 2.0**-12


def skip_unless_built(device, head_dims):
    if device == "cuda" and not any(
        row["head_dim"] >= max(head_dims) for row in tile_configs("decode_fp8")
    ):
        pytest.skip(f"this build has no kernel for caches of 8 bits and head dims {head_dims}")


def rotation(head_dim, seed):
    """M of k M, in fp64."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < head_dim:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    signs = torch.tensor(random_signs(head_dim, seed), dtype=torch.float64)
    return signs[:, None] * hadamard / head_dim**0.5


def factors(chance, cache, kind):
    """Factors of a cache's rows, NaN where no sequence has any: as the call takes them, and of each
    sequence's keys."""
    pages, rows, heads, _ = cache.k_cache.shape
    device, batch = cache.k_cache.device, len(cache.k)
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))

    def some(*shape):
        return 0.02 * torch.randn(shape, generator=generator, device=device).exp()

    if kind is None:
        return None, [1.0] * batch
    if kind == "sequence":
        given = some(batch, heads)
        if chance.random() < 0.5:  # as engines give one number for all
            given = some(1, 1).expand(batch, heads)
        return given, [given[i, :, None] for i in range(batch)]
    given = torch.full((pages, heads, rows), math.nan, device=device).transpose(1, 2)
    of_rows = some(pages, rows, heads)
    if kind == "page":
        given = torch.full((pages, 1, heads), math.nan, device=device)
        of_rows = some(pages, 1, heads).expand(pages, rows, heads)
    found = []
    for i, last in enumerate(cache.lengths):
        page, row = cache.rows(i, last - len(cache.k[i]), last)
        given[page, row if kind == "row" else 0] = of_rows[page, row]
        found.append(of_rows[page, row][..., None])
    return given, found


@dataclasses.dataclass
class Problem:
    cache: Cache
    q: torch.Tensor
    starts: torch.Tensor
    options: dict  # of the call
    keys: list  # fp64, of each sequence; rotated if the cache's are
    values: list
    wide_q: torch.Tensor  # likewise, fp64

    def assert_right(self, out, lse, softmax_scale=None, **mask):
        """Row by row; mask: as of oracle.Attention."""
        dtype = torch.bfloat16 if self.q.dtype == E4M3 else self.q.dtype
        assert out.dtype == dtype
        scale = self.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        ends = self.starts.tolist()
        for i, (first, last) in enumerate(itertools.pairwise(ends)):
            rows = slice(first, last)
            own = dict(mask)
            if "seen" in mask:
                own["seen"] = mask["seen"][i]
            exact = Exact(self.wide_q[rows], self.keys[i], self.values[i], scale, dtype, **own)
            if "seed" in self.options:
                exact.noise = ROTATION_NOISE
            exact.assert_right(out[None, rows], lse[None, :, rows])
        assert not out[ends[-1] :].any()


class Exact(Attention):
    """Of one sequence's fp64 numbers, of which an implementation in `dtype` rounds P; `seen`:
    which keys masks leave out besides."""

    def __init__(self, q, k, v, scale, dtype, causal=False, seen=None, **mask):
        super().__init__(q[None], k[None], v[None], scale, causal, **mask)
        self.dtype, self.u = dtype, torch.finfo(dtype).eps / 2
        self.noise, self.underflow = 2.0**-21, UNDERFLOW
        if seen is not None:
            self._hide(~seen)

    def _hide(self, hidden):
        self.seen = self.seen & ~hidden
        scores = (self.q @ self.k.mT) * self.scale
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores = scores.masked_fill(~self.seen, -math.inf)
        self.lse = torch.logsumexp(scores, -1)
        self.unseen = self.lse == -math.inf
        self.p = (scores - self.lse.masked_fill(self.unseen, 0.0)[..., None]).exp()
        self.out_rows = total(self.p, self.v, self.seen)

    def assert_right(self, out, lse):
        assert_rows("output", out, self.out, self.out_allowed())
        empty = self.lse == -math.inf
        assert torch.equal(lse == -math.inf, empty)
        lse, right, allowed = (
            x.masked_fill(empty, 0.0)[..., None] for x in (lse, self.lse, self.lse_allowed())
        )
        assert_rows("LSE", lse, right, allowed[..., 0])
        assert not out.transpose(1, 2)[self.unseen].any()


def problem_of(chance, device, cache, q, starts, kinds, rotated=False):
    """Of a cache with such factors of q, k and v."""
    key_heads, head_dim = cache.k_cache.shape[2:]
    k_descale, of_keys = factors(chance, cache, kinds[1])
    v_descale, of_values = factors(chance, cache, kinds[2])
    keys, values = (
        [
            x.double() * (f.double() if isinstance(f, torch.Tensor) else f)
            for x, f in zip(numbers, of, strict=True)
        ]
        for numbers, of in ((cache.k, of_keys), (cache.v, of_values))
    )
    options = {"k_descale": k_descale, "v_descale": v_descale}
    wide_q = q.double()
    if rotated:
        seed = chance.choice([0, 5, 2**64 - 1])
        options |= {"incoherent": True, "seed": seed}
        wide_q = wide_q @ rotation(head_dim, seed).to(device)
    if kinds[0]:
        options["q_descale"] = 1 + torch.rand(len(cache.k), key_heads, device=device)
        group = q.shape[1] // key_heads
        for i, (first, last) in enumerate(itertools.pairwise(starts.tolist())):
            own = options["q_descale"][i].repeat_interleave(group)
            wide_q[first:last] *= own[:, None]
    return Problem(cache, q, starts, options, keys, values, wide_q)


def random_problem(seed, device, most=400, page_size=..., tokens=16, head_dims=None):
    """A problem, and options of a mask."""
    chance = random.Random(seed)
    batch = range(chance.randint(1, 5))
    page_size = chance.choice(PAGE_SIZES) if page_size is ... else page_size
    key_heads, group = chance.choice([1, 1, 2, 3]), chance.choice([1, 2, 4, 8, 16])
    if head_dims is None:
        head_dims = chance.choice([(64, 64), (128, 128), (96, 96), (192, 128), (16, 48)])
    cache = random_cache(
        chance,
        device,
        chance.choice(CACHES),
        random_lengths(chance, batch, most),
        page_size,
        key_heads,
        list(head_dims),
        leftpad=chance.random() < 0.5,
        batch_idx=chance.random() < 0.5,
    )
    queries = [chance.choice([1, 1, chance.randint(0, tokens)]) for _ in batch]
    dtype = chance.choice(QUERIES)
    q, starts = random_queries(chance, device, dtype, queries, key_heads * group, head_dims[0])
    kinds = [
        chance.random() < 0.5,
        *(chance.choice([None, "sequence", "row", "page"]) for _ in "kv"),
    ]
    rotated = head_dims[0] & (head_dims[0] - 1) == 0 and chance.random() < 0.4
    problem = problem_of(chance, device, cache, q, starts, kinds, rotated)
    mask = {
        "causal": chance.random() < 0.5,
        "window_size": chance.choice([(-1, -1), (-1, -1), (chance.randint(0, 60), 0), (5, 2)]),
        "softcap": chance.choice([0.0, 0.0, 30.0]),
        "attention_chunk": chance.choice([0, 0, 0, 37, 64]),
    }
    # int8 numbers without factors are large
    mask["softmax_scale"] = chance.choice([None, 0.05]) if kinds[1] else 0.002
    if chance.random() < 0.4:
        mask["sinks"] = torch.randn(q.shape[1], device=device)
    return problem, mask
