"""Block masks on the CPU: which blocks are looked at, in which of them the mask is asked, and the
lists that kernels walk."""

import math
import random
from collections import Counter

import pytest
import torch
from block_masks import UNIT, blocks, listed, mask_of, random_kinds, with_blocks
from oracle import Attention, Changes
from torch.nn.attention import flex_attention as flex
from variant_cases import CASES, assert_captured_gradients, assert_gradients, assert_results

from cute_kernels import BlockMask, Variant, flash_attn_func, variants
from cute_kernels.compile.hooks import KNOWN, hooks_source
from cute_kernels.tiles import ROWS
from cute_kernels.variants import attention
from cute_kernels.variants.block_mask import block_lists
from cute_kernels.variants.kernels import Names, rows_of


def qkv(batch, seqlen_q, seqlen_k, heads=4, key_heads=2, dtype=torch.float32):
    shapes = [(seqlen_q, heads), (seqlen_k, key_heads), (seqlen_k, key_heads)]
    return [torch.randn(batch, rows, n, 16, dtype=dtype).requires_grad_() for rows, n in shapes]


@pytest.mark.parametrize("seed", range(6))
def test_a_call_is_its_definition(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    batch, heads = 2, (4, 2)
    lengths = [chance.choice([1, 130, 300, 520]) for _ in "qk"]
    block_size = chance.choice([(128, 128), (256, 128), (128, 256)])
    counts = [blocks(n, size) for n, size in zip(lengths, block_size, strict=True)]
    shape = (chance.choice([1, batch]), chance.choice([1, heads[0]]), *counts)
    kinds = random_kinds(shape, seed)
    name = chance.choice(["document", "mixed", "alibi", "warped", "prefix_lm"])
    call = {"causal": chance.random() < 0.3, "window_size": chance.choice([(-1, -1), (100, 50)])}
    q, k, v = qkv(batch, *lengths, *heads, chance.choice([torch.float32, torch.float64]))
    case = CASES[name](chance, "cpu", batch, heads[0], *lengths)
    block_mask = mask_of(kinds, block_size)
    out, lse = flash_attn_func(
        q, k, v, return_lse=True, variant=case.bound, block_mask=block_mask, **call
    )
    plain = [x.detach() for x in (q, k, v)]
    changes = with_blocks(case.changes, kinds, block_size)
    exact = Attention(*plain, 16**-0.5, call.pop("causal"), changes=changes, **call)
    assert_results(out.detach(), lse.detach(), exact)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    captured = list(case.with_gradients.values())
    grads = torch.autograd.grad((out, lse), (q, k, v, *captured), (grad_out, grad_lse))
    assert_gradients(grads[:3], exact, grad_out, grad_lse)
    assert_captured_gradients(grads[3:], case, exact, grad_out, grad_lse)


FLEX_MASKS = {
    "document": lambda ids: lambda b, h, i, j: ids[b, i] == ids[b, j],
    "prefix_lm": lambda prefix: lambda b, h, i, j: (j <= i) | (j < prefix[b]),
    "dilated": lambda: lambda b, h, i, j: (i >= j) & (i - j < 90) & ((i - j) % 3 == 0),
}


@pytest.mark.parametrize("name", FLEX_MASKS)
def test_blocks_and_results_are_flex_attentions(name):
    """Uncompiled, it computes all scores, with its mask alone: an oracle of another make."""
    torch.manual_seed(3)
    batch, heads, length = 2, 2, 400
    ids = torch.randint(0, 5, (batch, length)).sort().values.int()
    prefix = torch.tensor([0, 200], dtype=torch.int32)
    bound, mask = {
        "document": (variants.document(ids), FLEX_MASKS[name]),
        "prefix_lm": (variants.prefix_lm(prefix), FLEX_MASKS[name]),
        "dilated": (variants.dilated(30, 3), FLEX_MASKS[name]),
    }[name]
    mask = mask(*{"document": [ids], "prefix_lm": [prefix]}.get(name, []))
    theirs = flex.create_block_mask(mask, batch, heads, length, length, device="cpu")
    ours = BlockMask.from_torch(theirs)
    made = BlockMask.from_mask(bound, batch, heads, length, length)
    # They call a block that reaches beyond the last key partial
    assert torch.equal(made.kinds.expand(ours.shape) > 0, ours.kinds > 0)
    inside = slice(0, length // UNIT)
    assert torch.equal(
        made.kinds.expand(ours.shape)[:, :, inside, inside], ours.kinds[:, :, inside, inside]
    )
    assert (ours.kinds == 0).any()
    q, k, v = (x.detach() for x in qkv(batch, length, length, heads, heads))
    expected = flex.flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=theirs)
    for block_mask in (ours, made):
        out = flash_attn_func(q, k, v, variant=bound, block_mask=block_mask)
        assert torch.allclose(out.transpose(1, 2), expected, atol=1e-5)


def test_torchs_lists_without_room_for_all_blocks():
    counts, indices = torch.ones(1, 1, 3).int(), torch.tensor([0, 2, 1]).int().view(1, 1, 3, 1)
    lengths = {"seq_lengths": (384, 384), "compute_q_blocks": False}
    theirs = flex.BlockMask.from_kv_blocks(counts, indices, **lengths)
    assert BlockMask.from_torch(theirs).kinds.tolist() == [[[[1, 0, 0], [0, 0, 1], [0, 1, 0]]]]


def test_what_torchs_block_mask_slices_into():
    theirs = flex.create_block_mask(lambda b, h, i, j: i >= j + 128 * b, 2, None, 512, 512, "cpu")
    assert BlockMask.from_torch(theirs).shape == (2, 1, 4, 4)
    one = BlockMask.from_torch(theirs[1:2, :, 2:3])
    assert one.shape == (1, 1, 1, 4)
    assert one.kinds.tolist() == [[[[2, 1, 0, 0]]]]


def test_causal_blocks_are_left_out_of_masks():
    ids = torch.arange(4).repeat_interleave(128).int()[None]
    whole = variants.document(torch.zeros_like(ids))
    causal = BlockMask.from_mask(whole, 1, 1, 512, 512, causal=True)
    assert causal.kinds[0, 0].tolist() == [[2 * (j <= i) for j in range(4)] for i in range(4)]
    window = BlockMask.from_mask(whole, 1, 1, 512, 512, window_size=(128, 0))
    near = [[2 * (i - 1 <= j <= i) for j in range(4)] for i in range(4)]
    assert window.kinds[0, 0].tolist() == near
    assert window.sparsity().item() == pytest.approx(9 / 16)
    q, k, v = qkv(1, 512, 512)
    options = {"variant": variants.document(ids), "causal": True}
    made = BlockMask.from_mask(variants.document(ids), 1, 4, 512, 512, causal=True)
    assert made.kinds[0, 0].tolist() == torch.eye(4).mul(2).tolist()
    without = flash_attn_func(q, k, v, **options)
    assert torch.equal(flash_attn_func(q, k, v, **options, block_mask=made), without)


def test_full_blocks_do_not_ask_the_mask_and_partial_ones_alone_show_all():
    q, k, v = qkv(1, 256, 256)
    kinds = torch.tensor([[[[2, 0], [1, 2]]]])
    nothing = Variant("nothing_shown", mask_python=lambda key: key < 0)
    out, lse = flash_attn_func(q, k, v, variant=nothing, block_mask=mask_of(kinds), return_lse=True)
    exact = Attention(
        *(x.detach() for x in (q, k, v)),
        0.25,
        False,
        changes=Changes(mask=lambda b, h, i, j: i // 128 == j // 128),
    )
    assert_results(out.detach(), lse.detach(), exact)
    out, lse = flash_attn_func(q, k, v, block_mask=mask_of(kinds), return_lse=True)
    exact = Attention(
        *(x.detach() for x in (q, k, v)),
        0.25,
        False,
        changes=Changes(mask=lambda b, h, i, j: i // 128 >= j // 128),
    )
    assert_results(out.detach(), lse.detach(), exact)


def test_nan_in_hidden_blocks_has_no_part_in_anything():
    q, k, v = qkv(1, 256, 384)
    with torch.no_grad():
        k[:, 128:256], v[:, 128:256] = math.nan, math.inf
    kinds = torch.tensor([[[[2, 0, 1], [1, 0, 0]]]])
    out = flash_attn_func(q, k, v, block_mask=mask_of(kinds))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not any(grad[:, 128:256].any() for grad in grads[1:])


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (1, 2, 0, 3), (1, 1, 4, 0)])
def test_the_lists_that_kernels_walk(shape):
    kinds = random_kinds(shape, seed=sum(shape))
    lists = block_lists(kinds)
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in shape[:2])).tolist():
        for i in range(shape[2]):
            count = lists.key_counts[b, h, i]
            shown = [(j, int(kinds[b, h, i, j])) for j in range(shape[3]) if kinds[b, h, i, j] > 0]
            assert lists.keys[b, h, i, :count].tolist() == [2 * j + (n == 2) for j, n in shown]
        for j in range(shape[3]):
            count = lists.query_counts[b, h, j]
            shown = [i for i in range(shape[2]) if kinds[b, h, i, j] > 0]
            full = [int(kinds[b, h, i, j] == 2) for i in shown]
            expected = [2 * i + n for i, n in zip(shown, full, strict=True)]
            assert lists.queries[b, h, j, :count].tolist() == expected
            before = [int((kinds[b, h, i, :j] > 0).sum()) for i in shown]
            assert lists.turns[b, h, j, :count].tolist() == before
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists)


def test_blocks_are_walked_in_units():
    kinds = torch.tensor([[[[1, 0], [2, 1]]]])
    lists = mask_of(kinds, (256, 384)).lists
    assert lists.key_counts.tolist() == [[[3, 3, 6, 6]]]
    assert lists.keys[0, 0, 3].tolist() == [1, 3, 5, 6, 8, 10]


def arguments(**changed):
    counts, indices = listed(torch.ones(1, 1, 2, 3), 1)
    given = {"kv_num_blocks": counts, "kv_indices": indices.clamp(max=2)} | changed
    return {name: x for name, x in given.items() if x is not ...}


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"kv_num_blocks": 3}, TypeError, "kv_num_blocks is a int"),
        (
            {"kv_num_blocks": torch.ones(1, 1, 2)},
            TypeError,
            "kv_num_blocks has dtype torch.float32",
        ),
        (
            {"kv_num_blocks": torch.ones(1, 1, 3).int()},
            ValueError,
            "kv_num_blocks has shape (1, 1, 3)",
        ),
        ({"kv_indices": torch.ones(1, 2, 3).int()}, ValueError, "kv_indices has shape (1, 2, 3)"),
        ({"kv_indices": torch.full((1, 1, 2, 3), 3).int()}, ValueError, "must be from 0 to 2"),
        ({"kv_indices": torch.full((1, 1, 2, 3), -1).int()}, ValueError, "kv_indices lists blocks"),
        (
            {"kv_num_blocks": torch.full((1, 1, 2), 4).int()},
            ValueError,
            "kv_num_blocks has numbers that are not from 0 to 3",
        ),
        ({"full_kv_num_blocks": torch.ones(1, 1, 2).int()}, ValueError, "one is None"),
        (
            {
                "full_kv_num_blocks": torch.ones(1, 1, 2).int(),
                "full_kv_indices": torch.ones(1, 1, 2, 4).int(),
            },
            ValueError,
            "full_kv_indices has shape (1, 1, 2, 4)",
        ),
        ({"block_size": 64}, ValueError, "block_size is 64, must be multiples of 128"),
        ({"block_size": (128, 0)}, ValueError, "block_size is (128, 0)"),
        ({"block_size": 128.0}, TypeError, "block_size is 128.0"),
        ({"kv_num_blocks": torch.ones(1, 1, 2, device="meta").int()}, ValueError, "is on meta"),
    ],
)
def test_block_masks_that_are_refused(changed, error, words):
    with pytest.raises(error) as raised:
        BlockMask(**arguments(**changed))
    assert words in str(raised.value)


def test_calls_that_are_refused():
    mask = mask_of(torch.ones(1, 1, 2, 3))
    per_head = mask_of(torch.ones(1, 3, 2, 3))
    q, k, v = qkv(2, 200, 300)
    theirs = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, "cpu")
    for inputs, options, error, words in (
        ((q, k, v), {"block_mask": theirs}, TypeError, "BlockMask.from_torch makes one"),
        ((q, k, v), {"block_mask": per_head}, ValueError, "has heads 3, must have 1 or 4"),
        (
            (k, k, v),
            {"block_mask": mask},
            ValueError,
            "has 2 query blocks of 128, must have 3 for 300 queries",
        ),
        ((q, q, q), {"block_mask": mask}, ValueError, "has 3 key blocks of 128, must have 2"),
        ((q, k, v), {"block_mask": mask, "softcap": 1.0}, NotImplementedError, "softcap"),
        ((q, k, v), {"block_mask": mask, "tile_config": "x"}, ValueError, "tile_config is 'x'"),
        (
            [x.to("meta") for x in (q, k, v)],
            {"block_mask": mask},
            ValueError,
            "block_mask is on cpu, must be on meta",
        ),
    ):
        with pytest.raises(error) as raised:
            flash_attn_func(*inputs, **options)
        assert words in str(raised.value)
    moved = mask.to("meta")
    assert {x.device.type for x in (moved.kinds, *moved.lists)} == {"meta"}
    assert moved.shape == mask.shape
    with pytest.raises(TypeError, match="block_mask is a int, must be a BlockMask of"):
        BlockMask.from_torch(3)
    with pytest.raises(ValueError, match="has no mask_python"):
        BlockMask.from_mask(variants.alibi(torch.ones(4)), 1, 4, 128, 128)
    with pytest.raises(ValueError, match="seqlen_q is -1"):
        BlockMask.from_mask(variants.dilated(1, 1), 1, 1, -1, 128)


@pytest.mark.parametrize("lengths", [(0, 200), (200, 0), (0, 0), (1, 1)])
def test_lengths_of_0_and_1(lengths):
    q, k, v = qkv(1, *lengths)
    block_mask = BlockMask.from_mask(variants.dilated(3, 1), 1, 4, *lengths)
    assert block_mask.shape == (1, 1, *(blocks(n, UNIT) for n in lengths))
    out, lse = flash_attn_func(q, k, v, block_mask=block_mask, return_lse=True)
    assert out.shape == q.shape
    assert (lse == -math.inf).all() == (lengths != (1, 1))
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.shape == x.shape for grad, x in zip(grads, (q, k, v), strict=True))


def test_compilers_and_fake_tensors():
    q, k, v = qkv(1, 200, 300)
    ids = torch.arange(300).div(150, rounding_mode="floor").int()[None]
    bound = variants.document(ids[:, :200].contiguous(), ids)

    def call(q, k, v, kinds):
        block_mask = mask_of(kinds) if kinds is not None else given
        return flash_attn_func(q, k, v, variant=bound, block_mask=block_mask)

    given = BlockMask.from_mask(bound, 1, 4, 200, 300)
    expected = call(q, k, v, None)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, None), expected)
    grads = torch.autograd.grad(compiled(q, k, v, None).sum(), (q, k, v))
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    moved = torch.compile(
        lambda q: flash_attn_func(q, k, v, variant=bound, block_mask=given.to(q.device)),
        backend="eager",
        fullgraph=True,
    )
    assert torch.equal(moved(q), expected)
    with torch._subclasses.FakeTensorMode():
        fake = [torch.empty(x.shape) for x in (q, k, v)]
        counts = torch.ones(1, 1, 2, dtype=torch.int32)
        block_mask = BlockMask(counts, torch.zeros(1, 1, 2, 3, dtype=torch.int32))
        assert flash_attn_func(*fake, block_mask=block_mask).shape == q.shape


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_nobody_waits_for_a_turn_forever(workers):
    """dQ in order, as attention/backward/steps.hpp has it: key blocks are drawn in the order of
    their numbers, and each adds to its units of queries from the last to the first, when all that
    come before it there have."""
    lists = block_lists(random_kinds((1, 1, 30, 40), seed=9))
    counts, queries, turns = (
        x[0, 0].tolist() for x in (lists.query_counts, lists.queries, lists.turns)
    )
    steps = [
        [(queries[j][p] // 2, turns[j][p]) for p in reversed(range(counts[j]))]
        for j in range(len(counts))
    ]
    added, drawn, running = [0] * 30, 0, []
    while drawn < len(steps) or running:
        while drawn < len(steps) and len(running) < workers:
            running.append(steps[drawn])
            drawn += 1
        ready = [left for left in running if not left or added[left[0][0]] == left[0][1]]
        assert ready, "all wait"
        for left in ready:
            if left and added[left[0][0]] == left[0][1]:
                added[left.pop(0)[0]] += 1
        running = [left for left in running if left]
    assert added == lists.key_counts[0, 0].tolist()


def test_what_the_operators_have_of_a_block_mask(monkeypatch):
    """Shapes and gradients of the operators on CUDA, whose kernels are not asked."""
    monkeypatch.setattr(attention, "_kernels_of", lambda *_: Names("forward", "backward"))
    monkeypatch.setitem(ROWS["backward"], "backward", {"tile_n": 128})
    unpacked = Counter()
    with torch._subclasses.FakeTensorMode():
        q, k, v = qkv(2, 300, 400, dtype=torch.bfloat16)
        slopes = torch.empty(4, requires_grad=True)
        counts, indices = torch.ones(1, 1, 3).int(), torch.zeros(1, 1, 3, 4).int()
        call = (q, k, v, None, 0.25, False, None, None, None, False, None, 0)
        for blocks in (None, BlockMask(counts, indices)):
            unpacked.clear()
            # Checkpointing allows no second time.
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: x, lambda x: unpacked.update([id(x)]) or x
            ):
                out, lse = attention._on_cuda(variants.alibi(slopes), ["slopes"], *call, blocks)
            assert (out.shape, lse.shape) == (q.shape, (2, 4, 300))
            grads = torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v, slopes))
            assert max(unpacked.values()) == 1
            assert [x.shape for x in grads] == [x.shape for x in (q, k, v, slopes)]


def test_kernels_of_block_masks_are_others():
    bound = variants.document(torch.zeros(1, 1).int())
    rows = {}
    for block_mask in (False, True):
        hooks = bound.variant.hooks_of(block_mask)
        assert KNOWN[hooks.key] == hooks
        assert f"kHasBlockMask = {str(block_mask).lower()};" in hooks_source(hooks, ())
        for head_dim in (64, 128, 192, 256):
            forward, backward = rows_of(hooks.key, torch.bfloat16, head_dim, True)
            rows[block_mask, head_dim] = (forward["name"], backward["name"])
            if block_mask:
                assert forward["tile_m"] == UNIT
                assert UNIT % forward["tile_n"] == UNIT % backward["tile_m"] == 0
                cluster = 2 if backward["split_products"] else 1
                assert backward["tile_n"] * cluster == UNIT
    assert not {n for (of, _), names in rows.items() for n in names if of} & {
        n for (of, _), names in rows.items() for n in names if not of
    }
