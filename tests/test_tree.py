"""Trees of new tokens (tree_mask) on both devices: every row against fp64."""

import random

import pytest
import torch
from caches import PAGE_SIZES, attend, random_cache, random_queries
from caches import skip_unless_attended as skip_unless_16_bits_built
from eight_bits import CACHES, problem_of, skip_unless_built

from cute_kernels import flash_attn_varlen_func, flash_attn_with_kvcache


def random_tree(chance, tokens):
    """(tokens, tokens): a token sees its ancestors and itself."""
    sees = torch.eye(tokens, dtype=torch.bool)
    for i in range(1, tokens):
        parent = chance.randint(-1, i - 1)
        if parent >= 0:
            sees[i] |= sees[parent]
    return sees


def bits_of(sees):
    """int64 of each row, bit j for column j."""
    bits = [sum(1 << j for j, bit in enumerate(row) if bit) for row in sees.tolist()]
    return torch.tensor([n - 2**64 if n >= 2**63 else n for n in bits], dtype=torch.int64)


def seen_keys(sees, keys):
    """(tokens, keys): all before the last ones, of which a token sees its tree's."""
    tokens = sees.shape[0]
    seen = torch.cat([torch.ones(tokens, keys, dtype=torch.bool), sees], 1)
    return seen[:, tokens:]


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_random_trees(device, seed, eight_bits):
    chance = random.Random(seed)
    dtype = chance.choice(CACHES) if eight_bits else torch.bfloat16
    head_dim = chance.choice([64, 128])
    if eight_bits:
        skip_unless_built(device, (head_dim, head_dim))
    else:
        skip_unless_16_bits_built(device, torch.bfloat16, (head_dim, head_dim))
    batch = range(chance.randint(1, 4))
    tokens = [chance.choice([0, 1, 5, 16, 64]) for _ in batch]
    # Some sequences are shorter than their trees
    lengths = [chance.choice([0, n, n + 3, 64, 65, chance.randint(n, 900)]) for n in tokens]
    key_heads, group = chance.choice([1, 2]), chance.choice([1, 4, 8])
    cache = random_cache(
        chance, device, dtype, lengths, chance.choice(PAGE_SIZES), key_heads, [head_dim, head_dim]
    )
    heads = key_heads * group
    q, starts = random_queries(chance, device, torch.bfloat16, tokens, heads, head_dim)
    problem = problem_of(chance, device, cache, q, starts, (False, None, None))
    is_tree = chance.random() < 0.8
    trees = [random_tree(chance, n) if is_tree else torch.randint(2, (n, n)).bool() for n in tokens]
    bits = torch.cat([bits_of(tree) for tree in trees]).to(device)
    mask = {
        "causal": is_tree and chance.random() < 0.5,
        "window_size": chance.choice([(-1, -1), (-1, -1), (40, 0)]),
        "softcap": chance.choice([0.0, 20.0]),
        "softmax_scale": 0.05 if dtype != torch.int8 else 0.002,
    }
    found = attend(q, starts, cache, tree_mask=bits, **problem.options, **mask)
    seen = [seen_keys(tree, n).to(device) for tree, n in zip(trees, lengths, strict=True)]
    problem.assert_right(*found, **mask, seen=seen)


def test_a_chain_is_causal(device):
    """Dense queries; the same bits as a causal mask."""
    skip_unless_16_bits_built(device, torch.bfloat16, (64, 64))
    chance = random.Random(0)
    cache = random_cache(chance, device, torch.bfloat16, [200, 33], 16, 2, [64, 64])
    q, _ = random_queries(chance, device, torch.bfloat16, [16, 16], 8, 64)
    q = q.view(2, 16, 8, 64)
    options = {"cache_seqlens": cache.seqlens(), **cache.places}
    chain = bits_of(torch.ones(16, 16).tril().bool()).to(device).expand(2, 16)
    caches = (cache.k_cache, cache.v_cache)
    right = flash_attn_with_kvcache(q, *caches, **options, causal=True)
    assert torch.equal(flash_attn_with_kvcache(q, *caches, **options, tree_mask=chain), right)
    tree = flash_attn_with_kvcache(q, *caches, **options, causal=True, tree_mask=chain)
    assert torch.equal(tree, right)
    starts = torch.tensor([0, 16, 32], dtype=torch.int32, device=device)
    packed = {"seqused_k": cache.seqlens(), **cache.places}
    chain = chain.flatten()
    found = flash_attn_varlen_func(
        q.flatten(0, 1), *caches, starts, max_seqlen_q=16, **packed, tree_mask=chain, num_splits=0
    )
    assert torch.equal(found.view_as(right), right)


def test_nan_of_an_unseen_token_stays_there(device):
    """Of K and V of a token that only its descendants see."""
    skip_unless_16_bits_built(device, torch.bfloat16, (64, 64))
    chance = random.Random(0)
    cache = random_cache(chance, device, torch.bfloat16, [70], None, 1, [64, 64])
    q, starts = random_queries(chance, device, torch.bfloat16, [4], 4, 64)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    for x in (cache.k_cache, cache.v_cache):
        x[0, 67] = torch.nan  # token 1
    out, lse = attend(q, starts, cache, tree_mask=bits_of(tree).to(device))
    assert out[[0, 2]].isfinite().all() and lse[:, [0, 2]].isfinite().all()
    assert out[[1, 3]].isnan().all() and lse[:, [1, 3]].isnan().all()


@pytest.mark.parametrize("tokens", [12, 64])
def test_trees_of_many_rows(device, tokens):
    """The first token is anywhere in a block of keys; NaN of one is in those that see it."""
    skip_unless_16_bits_built(device, torch.bfloat16, (128, 128))
    chance = random.Random(tokens)
    before = [0, 1, 37, 63, 64, 65, 100, 120, 127, 128, 200]
    lengths = [n + tokens for n in before]
    cache = random_cache(chance, device, torch.bfloat16, lengths, None, 1, [128, 128])
    q, starts = random_queries(chance, device, torch.bfloat16, [tokens] * len(before), 8, 128)
    problem = problem_of(chance, device, cache, q, starts, (False, None, None))
    trees = [random_tree(chance, tokens) for _ in before]
    bits = torch.cat([bits_of(tree) for tree in trees]).to(device)
    mask = {"softmax_scale": 0.05}
    found = attend(q, starts, cache, tree_mask=bits, **problem.options, **mask)
    seen = [seen_keys(tree, n).to(device) for tree, n in zip(trees, lengths, strict=True)]
    problem.assert_right(*found, **mask, seen=seen)
    for i, n in enumerate(before):
        cache.v_cache[i, n + 1] = torch.nan
    out, _ = attend(q, starts, cache, tree_mask=bits, **problem.options, **mask)
    spoiled = torch.cat([tree[:, 1] for tree in trees]).to(device)
    assert torch.equal(out.isnan().all(-1).all(-1), spoiled)
    assert out[~spoiled].isfinite().all()


def test_refusals():
    chance = random.Random(0)
    cache = random_cache(chance, "cpu", torch.bfloat16, [70], 16, 1, [64, 64])
    q, starts = random_queries(chance, "cpu", torch.bfloat16, [65], 4, 64)
    tree = torch.ones(65, dtype=torch.int64)
    with pytest.raises(ValueError, match="sequence 0 has 65 queries, must have at most 64"):
        attend(q, starts, cache, tree_mask=tree)
    with pytest.raises(TypeError, match=r"tree_mask has dtype torch.int32, must be torch.int64"):
        attend(q, starts, cache, tree_mask=tree.int())
    with pytest.raises(ValueError, match=r"tree_mask has shape \(3,\), must be \(65,\) like q"):
        attend(q, starts, cache, tree_mask=tree[:3])
    with pytest.raises(TypeError, match=r"tree_mask is a list, must be a torch\.Tensor"):
        attend(q, starts, cache, tree_mask=[1])
    with pytest.raises(ValueError, match="tree_mask is given, must be None without page_table"):
        flash_attn_varlen_func(q, q, q, starts, starts, tree_mask=tree)
