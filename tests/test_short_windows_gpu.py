"""Kernels for short windows (rows with `grouped`), called by name, against the oracle."""

import dataclasses
import math
import random

import pytest
import torch
from packed import assert_packed_right, random_packed
from parity import DTYPES, check, random_qkv, run
from test_sinks import some_sinks

from cute_kernels import flash_attn_func, tile_configs

ROWS = [pytest.param(row, id=row["name"]) for row in tile_configs("forward") if row["grouped"]]
OF_A_WARPGROUP = 64


def widest(row, group):
    """The longest window that the row takes."""
    queries = OF_A_WARPGROUP // group
    return row["tile_n"] - queries + 1 - max(0, 8 - queries)


def random_window(chance, row, group):
    """window_size, from one key to all that the row takes."""
    most = widest(row, group)
    window = chance.choice([most, most, 1, 2, chance.randint(3, most), min(most, 128)])
    right = chance.choice([0, 0, window - 1, chance.randrange(window)])
    return window - 1 - right, right


def groups(row):
    return [group for group in (4, 8, 16, 32, 64) if widest(row, group) > 0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("row", ROWS)
def test_packed_calls(hopper, row, seed):
    """Lengths around those of tiles, unused tokens of NaN, sinks."""
    chance = random.Random(seed)
    group = chance.choice(groups(row))
    heads_kv = chance.randint(1, 3)
    tokens = row["grouped"] * row["tile_m"] // group
    lengths = [0, 1, 2, tokens - 1, tokens, tokens + 1, 2 * tokens + 3, 300, chance.randint(3, 700)]
    slots_q = chance.sample(lengths, 7)
    slots_k = slots_q if chance.random() < 0.4 else [chance.choice(lengths) for _ in slots_q]
    head_dims = chance.choice([(64, 64), (64, 64), (48, 64), (64, 40)])
    heads = group * heads_kv, heads_kv
    used = chance.random() < 0.7
    packed = random_packed(
        chance, hopper, DTYPES[row["dtype"]], slots_q, slots_k, head_dims, heads, used, tail=5
    )
    window_size = random_window(chance, row, group)
    sinks = some_sinks(heads[0], hopper, seed=seed) if chance.random() < 0.5 else None
    spoilt = packed.spoilt(chance.choice([math.nan, math.inf, 0.0]))
    results = spoilt.run(window_size=window_size, sinks=sinks, tile_config=row["name"])
    assert_packed_right(results, packed, window_size=window_size, sinks=sinks)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("row", ROWS)
def test_dense_calls(hopper, row, seed):
    chance = random.Random(seed)
    group = chance.choice(groups(row))
    sizes = chance.randint(1, 3), chance.choice([1, 65, 300, 511]), chance.choice([0, 64, 300, 777])
    heads_kv = chance.randint(1, 2)
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], *sizes, group * heads_kv, heads_kv, 64)
    causal = chance.random() < 0.5
    left, right = random_window(chance, row, group)
    window_size = (left + right, 0) if causal else (left, right)
    check(q, k, v, causal, window_size=window_size, tile_config=row["name"])


@pytest.mark.parametrize("row", ROWS)
def test_scores_far_from_0(hopper, row):
    """Beyond what exponents can subtract at once, and all keys alike."""
    group = groups(row)[0]
    for factor in (0.0, 30.0, 3e3):
        q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 200, 200, group, 1, 64)
        q = (q.float() * factor).to(q.dtype)
        check(q, k, v, window_size=(100, 0), tile_config=row["name"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", ROWS)
def test_a_value_that_is_not_finite_is_in_the_rows_that_see_it(hopper, row, value):
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 400, 400, group, 1, 64)
    options = {"window_size": (90, 20), "tile_config": row["name"]}
    right = flash_attn_func(q, k, v, **options)
    query = torch.arange(400, device=hopper)
    for token in (0, 31, 127, 128, 300, 399):
        wild = v.clone()
        wild[:, token, :, 5] = value
        out = flash_attn_func(q, k, wild, **options)
        sees = (query >= token - 20) & (query <= token + 90)
        assert torch.equal(out.isfinite(), torch.ones_like(out).bool() & ~_marked(out, sees))
        others = [channel for channel in range(64) if channel != 5]
        assert torch.equal(out[..., others], right[..., others])
        torch.testing.assert_close(out[0, ~sees, :, 5], right[0, ~sees, :, 5], atol=2e-2, rtol=2e-2)


def _marked(out, sees):
    marked = torch.zeros_like(out, dtype=torch.bool)
    marked[0, sees, :, 5] = True
    return marked


@pytest.mark.parametrize("row", ROWS)
def test_the_same_bits_each_time(hopper, row):
    chance = random.Random(1)
    group = groups(row)[0]
    slots = [700, 3, 0, 1300, 64, 200]
    heads = 2 * group, 2
    packed = random_packed(
        chance, hopper, DTYPES[row["dtype"]], slots, slots, (64, 64), heads, tail=9
    )
    options = {"window_size": (widest(row, group) - 1, 0), "tile_config": row["name"]}
    results = [packed.run(**options) for _ in range(100)]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("row", ROWS)
def test_many_tiles_on_few_multiprocessors(hopper, row):
    """Several tiles a CTA, one and another number of them."""
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 2, 1500, 1500, group * 4, 4, 64)
    for margin in (0, 100, 131):
        check(q, k, v, True, window_size=(100, 0), tile_config=row["name"], sm_margin=margin)


@pytest.mark.parametrize("row", ROWS)
def test_calls_that_it_does_not_take(hopper, row):
    group = groups(row)[0]
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 1, 600, 600, group, 1, 64)
    most = widest(row, group)
    run(q, k, v, window_size=(most - 1, 0), tile_config=row["name"])
    for window_size in ((most, 0), (-1, 0), (10, -1), (-1, -1)):
        with pytest.raises((ValueError, RuntimeError), match=row["name"]):
            flash_attn_func(q, k, v, window_size=window_size, tile_config=row["name"])
    k = k.expand(-1, -1, group, -1)  # groups of one head
    with pytest.raises((ValueError, RuntimeError), match=row["name"]):
        flash_attn_func(q, k, k, window_size=(10, 0), tile_config=row["name"])


@pytest.mark.parametrize("window_size", [(127, 0), (60, 60)], ids=str)
def test_the_automatic_choice_is_right(hopper, window_size):
    chance = random.Random(3)
    packed = random_packed(
        chance, hopper, torch.bfloat16, [900, 40, 0, 1000], [900, 90, 3, 700], (64, 64), (16, 2)
    )
    packed = dataclasses.replace(packed, used_q=[800, 40, 0, 999], used_k=[900, 0, 3, 650])
    assert_packed_right(packed.run(window_size=window_size), packed, window_size=window_size)
