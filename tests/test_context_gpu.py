"""Context parallelism on several Hopper GPUs, by NCCL."""

import functools
import os
import random

import pytest
import ranks as processes
import torch
from context import Case, run_cases
from parity import DTYPES
from test_context import assert_case_right

from cute_kernels import distributed, tile_configs

COUNT = 28
FORMS = ("ring", "ring", "all_gather", "ulysses", "2d")


def random_case(chance, ranks, form):
    """Of what this build has kernels for."""
    rows = [row for row in tile_configs("backward") if row["any_call"] and not row["softcap"]]
    row = chance.choice([row for row in rows if row["head_dim"] <= 128])
    tokens = 2 * ranks * chance.randint(1, 130)
    documents = None
    if form == "2d":
        tokens *= 2
    if chance.random() < 0.4:
        cuts = sorted(chance.randint(0, tokens) for _ in range(chance.randint(0, 4)))
        documents = (0, *cuts, tokens)
    shared = {"ulysses": ranks, "2d": 2}.get(form, 1)
    key_heads = shared * chance.choice([1, 2])
    limits = [(-1, -1), (-1, -1), (chance.randint(0, 300), 0), (chance.randint(0, 90), 17)]
    softcapped = any(
        other["softcap"] and other["head_dim"] == row["head_dim"] and other["dtype"] == row["dtype"]
        for other in tile_configs("backward")
    )
    return Case(
        form,
        chance.choice(["zigzag", "zigzag", "contiguous"] + ["stripe"] * (form != "all_gather")),
        tokens,
        batch=chance.choice([1, 1, 2]),
        heads=(key_heads * chance.choice([1, 4]), key_heads),
        head_dims=(row["head_dim"], row["head_dim"]),
        dtype=DTYPES[row["dtype"]],
        causal=chance.random() < 0.7,
        window_size=chance.choice(limits),
        softcap=chance.choice([0.0, 0.0, 20.0 if softcapped else 0.0]),
        sinks=chance.random() < 0.3,
        documents=documents,
        deterministic=chance.random() < 0.3,
        seed=chance.randrange(2**31),
    )


# The value of CUTE_KERNELS_COPY_ENGINE.
WAYS = {"nccl": "0", "copies": "1"}


@functools.cache
def results(ranks, way):
    chance = random.Random(ranks)
    cases = [random_case(chance, ranks, FORMS[i % len(FORMS)]) for i in range(COUNT)]
    environment = {"CUTE_KERNELS_COPY_ENGINE": WAYS[way]}
    by_rank = processes.run(
        ranks, run_cases, cases, "cuda", backend="nccl", environment=environment
    )
    return cases, by_rank


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", range(COUNT))
def test_forms(gpus, number, way):
    cases, by_rank = results(gpus, way)
    case = cases[number]
    first, *others = [results[number] for results in by_rank]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert_case_right(case, first)


def lose_a_rank(rank):
    q, k, v = torch.randn(3, 1, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        distributed.ring_attn_func(q, k, v, causal=True)
        torch.cuda.synchronize()
        if rank == 1:
            os._exit(0)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_is_gone_is_an_error(gpus, way):
    """Of the process group, in its time."""
    environment = {"CUTE_KERNELS_COPY_ENGINE": WAYS[way]}
    options = {"backend": "nccl", "results": False, "environment": environment, "seconds": 8}
    with pytest.raises(AssertionError, match=r"(?i)watchdog|timeout|timed out|closed|NCCL error"):
        processes.run(2, lose_a_rank, **options)


def twice(rank, cases):
    return run_cases(rank, cases + cases, "cuda")


def test_deterministic_gradients_are_the_same_bits(gpus):
    form = {"heads": (8, 4), "causal": True, "deterministic": True, "dtype": torch.bfloat16}
    cases = [
        Case(form_name, "zigzag", 2048, head_dims=(64, 64), **form)
        for form_name in ("ring", "all_gather")
    ]
    runs = processes.run(gpus, twice, cases, backend="nccl")[0]
    for first, second in zip(runs[: len(cases)], runs[len(cases) :], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
