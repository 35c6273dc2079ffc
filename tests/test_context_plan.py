"""Which rows see which, what is sent where, and how long it should take: no process group."""

import dataclasses
import itertools
import random

import pytest
import torch

from cute_kernels.distributed import H100, choose, plan
from cute_kernels.distributed.layouts import LAYOUTS, chunks_of, part_of, whole_of


def tokens_of(problem, rank):
    chunks = chunks_of(problem.layout, rank, problem.ranks, problem.tokens)
    return [chunk.first + i * chunk.step for chunk in chunks for i in range(chunk.rows)]


def sees(problem, query, key):
    """The definition, of two tokens."""
    together = any(
        start <= query < stop and start <= key < stop
        for start, stop in itertools.pairwise(problem.documents)
    )
    near = problem.left is None or query - key <= problem.left
    return together and near and (problem.right is None or key - query <= problem.right)


def pairs(parts):
    """The rows of queries and keys that calls let see each other."""
    found = []
    for part in parts:
        end_q = end_k = 0
        for block, diagonal in zip(part.blocks, part.diagonals, strict=True):
            (first_q, last_q), (first_k, last_k) = block.queries, block.keys
            assert first_q >= end_q and first_k >= end_k  # as packed sequences lie
            end_q, end_k = last_q, last_k
            seen = [
                (first_q + i, first_k + j)
                for i in range(last_q - first_q)
                for j in range(last_k - first_k)
                if (part.left is None or i + diagonal - j <= part.left)
                and (part.right is None or j - i - diagonal <= part.right)
            ]
            assert len(seen) == block.seen()
            assert {i for i, _ in seen} == set(range(first_q, last_q))  # nothing in vain
            assert {j for _, j in seen} == set(range(first_k, last_k))
            found += seen
    return sorted(found)


def random_problem(chance):
    ranks = chance.choice([1, 2, 3, 4])
    tokens = 2 * ranks * chance.randint(1, 6)
    cuts = sorted(chance.randint(0, tokens) for _ in range(chance.choice([0, 0, 1, 2, 4])))
    end = chance.choice([tokens, chance.randint(max(cuts, default=0), tokens)])

    def limit():
        return chance.choice([None, None, 0, 1, chance.randint(0, 10)])

    return plan.Problem(chance.choice(LAYOUTS), ranks, tokens, (0, *cuts, end), limit(), limit())


def test_parts_are_what_sees_each_other():
    chance = random.Random(2)
    for _ in range(150):
        problem = random_problem(chance)
        for rank, source in itertools.product(range(problem.ranks), repeat=2):
            queries, keys = tokens_of(problem, rank), tokens_of(problem, source)
            right = [
                (i, j)
                for (i, query), (j, key) in itertools.product(enumerate(queries), enumerate(keys))
                if sees(problem, query, key)
            ]
            assert pairs(plan.parts(problem, rank, source)) == right
            stored = [j for rows in plan.needed(problem, rank, source) for j in range(*rows)]
            assert stored == sorted({j for _, j in right})
            received = pairs(plan.parts_of_received(problem, rank, source))
            assert [(i, stored[j]) for i, j in received] == right


def test_whole_parts_are_what_sees_each_other():
    chance = random.Random(3)
    for _ in range(80):
        problem = random_problem(chance)
        if problem.layout == "stripe":
            continue
        for rank in range(problem.ranks):
            right = [
                (i, key)
                for i, query in enumerate(tokens_of(problem, rank))
                for key in range(problem.tokens)
                if sees(problem, query, key)
            ]
            tokens = [t for part in plan.needed_tokens(problem, rank) for t in range(*part)]
            parts = plan.whole_parts(problem, rank)
            assert [(i, tokens[j]) for i, j in pairs(parts)] == right
            rows = [block.queries for part in parts for block in part.blocks]
            assert all(a[1] <= b[0] or b[1] <= a[0] for a, b in itertools.combinations(rows, 2))
            for owner in range(problem.ranks):
                held = tokens_of(problem, owner)
                for (start, stop), (place, end) in plan.routes(problem, owner, rank):
                    assert held[start:stop] == tokens[place:end]


def test_causal_zigzag_is_balanced_and_each_step_one_call():
    problem = plan.Problem("zigzag", 8, 1024, (0, 1024), None, 0)
    assert len({plan.work(problem, rank) for rank in range(8)}) == 1
    for rank, source in itertools.product(range(8), repeat=2):
        (part,) = plan.parts(problem, rank, source)
        (block,) = part.blocks
        assert block.is_full == (rank != source)
        # Nothing is sent that its receiver does not see.
        assert plan.needed(problem, rank, source) == ((0, 64 if source < rank else 128),)


def test_a_window_is_sent_alone():
    problem = plan.Problem("contiguous", 8, 1024, (0, 1024), 20, 0)
    for rank, source in itertools.product(range(8), repeat=2):
        expected = {0: ((0, 128),), 1: ((108, 128),)}.get(rank - source, ())
        assert plan.needed(problem, rank, source) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_tensor_make_the_tensor(layout):
    x = torch.randn(3, 24, 2)
    for ranks in (1, 2, 3, 4):
        parts = [part_of(x, 1, layout, rank, ranks) for rank in range(ranks)]
        problem = plan.Problem(layout, ranks, 24, (0, 24), None, None)
        for rank, part in enumerate(parts):
            assert torch.equal(part, x[:, tokens_of(problem, rank)])
        assert torch.equal(whole_of(parts, 1, layout), x)
        assert torch.equal(whole_of(parts, -2, layout), x)


def test_choice_of_a_form():
    causal = choose(131072, 2, 16, 16, causal=True)
    assert [p.seconds for p in causal] == sorted(p.seconds for p in causal)
    by_layout = {p.layout: p for p in causal if p.function == "ring_attn_func"}
    assert by_layout["zigzag"].balance == 1.0
    assert by_layout["contiguous"].balance == pytest.approx(2 / 3, abs=0.01)
    assert by_layout["zigzag"].seconds < by_layout["contiguous"].seconds
    assert all(0 < p.efficiency < 1.01 for p in causal)
    # 3 ranks cannot share 16 heads, and 2 key heads no more than 2 ranks.
    assert all(p.function != "ulysses_attn_func" for p in choose(3 * 4096, 3, 16, 16))
    assert {p.mesh for p in choose(8192, 4, 8, 2) if p.function == "ulysses_attn_func"} == {(2, 2)}


def test_slow_links_cost_time():
    slow = dataclasses.replace(H100, link=1e9, exchange=1e9)
    fast, other = (choose(32768, 4, 16, 16, causal=True, machine=m)[0] for m in (H100, slow))
    assert other.seconds > 2 * fast.seconds
    with pytest.raises(ValueError, match="pad"):
        choose(1001, 2, 4, 4)
