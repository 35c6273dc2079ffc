"""Block masks on the GPU: kernels that walk lists, row by row against fp64."""

import math
import random

import pytest
import torch
from block_masks import UNIT, blocks, mask_of, random_kinds, with_blocks
from oracle import Attention, Changes
from parity import poison, random_qkv
from variant_cases import CASES, assert_captured_gradients, assert_gradients, assert_results

from cute_kernels import BlockMask, flash_attn_func, variants
from cute_kernels.variants.checks import with_gradient
from cute_kernels.variants.kernels import load, rows_of

NAMES = ["document", "prefix_lm", "mixed", "warped", "dropout"]
LENGTHS = [1, 63, 64, 65, 128, 129, 200, 333, 700]
HEAD_DIMS = [64, 128, 192, 256]


@pytest.fixture(scope="session")
def kernels():
    """All kernels of the cases, compiled at once. Weights have no gradient above head dim 128, nor
    have captured tensors."""
    if not torch.cuda.is_available():
        pytest.skip("needs a Hopper GPU: PyTorch sees no GPU here")
    rows = {}
    for name in NAMES:
        bound = CASES[name](random.Random(0), "cuda", 1, 1, 1, 1).bound
        key, names = bound.variant.hooks_of(True).key, with_gradient(bound)
        for head_dim in HEAD_DIMS:
            has_gradient = head_dim <= 128 or name in ("document", "prefix_lm")
            for row in rows_of(key, torch.bfloat16, head_dim, has_gradient, names):
                rows[row["name"]] = row
    load(list(rows.values()))


def check(device, name, seed, head_dim, **options):
    chance = random.Random(f"{name} {seed} {head_dim}")
    torch.manual_seed(seed)
    batch, lengths = chance.choice([1, 2]), [chance.choice(LENGTHS) for _ in "qk"]
    heads = chance.choice([(2, 2), (4, 2), (4, 1)])
    block_size = chance.choice([(128, 128), (128, 128), (256, 128), (128, 384)])
    counts = [blocks(n, size) for n, size in zip(lengths, block_size, strict=True)]
    shape = (chance.choice([1, batch]), chance.choice([1, heads[0]]), *counts)
    kinds = random_kinds(shape, seed).to(device)
    q, k, v = random_qkv(device, torch.bfloat16, batch, *lengths, *heads, head_dim, seed)
    q = q * chance.choice([1, 1, 4])
    case = CASES[name](chance, device, batch, heads[0], *lengths)
    call = {"window_size": chance.choice([(-1, -1), (-1, -1), (70, -1), (5, 90), (-1, 0)])}
    call["sinks"] = torch.randn(heads[0], device=device) if chance.random() < 0.3 else None
    causal = chance.random() < 0.3
    has_gradient = head_dim <= 128 or name in ("document", "prefix_lm")
    inputs = [x.detach().requires_grad_(has_gradient) for x in (q, k, v)]
    poison(q, v)
    out, lse = flash_attn_func(
        *inputs,
        causal=causal,
        deterministic=seed % 2 == 1,
        return_lse=True,
        variant=case.bound,
        block_mask=mask_of(kinds, block_size),
        **call,
    )
    changes = with_blocks(case.changes, kinds, block_size)
    exact = Attention(q, k, v, head_dim**-0.5, causal, changes=changes, **call)
    assert_results(out.detach(), lse.detach(), exact)
    if not has_gradient:
        return
    grads = torch.randn_like(out), torch.randn_like(lse)
    captured = list(case.with_gradients.values())
    results = torch.autograd.grad((out, lse), (*inputs, *captured), grads)
    assert_gradients(results[:3], exact, *grads)
    assert_captured_gradients(results[3:], case, exact, *grads)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_random_calls(hopper, kernels, name, head_dim, seed):
    if head_dim > 128 and name in ("warped", "dropout"):
        seed += 100  # forward alone, captured tensors without gradients
        with torch.no_grad():
            return check(hopper, name, seed, head_dim)
    check(hopper, name, seed, head_dim)


@pytest.mark.parametrize("lengths", [(100, 0), (0, 100), (0, 0)])
def test_without_keys_or_queries(hopper, kernels, lengths):
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, *lengths, 4, 2, 128)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    of_query, of_key = (torch.zeros(2, n, device=hopper, dtype=torch.int32) for n in lengths)
    bound = variants.document(of_query, of_key)
    out, lse = flash_attn_func(
        *inputs,
        variant=bound,
        block_mask=BlockMask.from_mask(bound, 2, 4, *lengths),
        return_lse=True,
    )
    assert (out == 0).all() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(x.shape == y.shape and (x == 0).all() for x, y in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_many_blocks(hopper, kernels, deterministic, shared):
    """More tiles and key blocks than CTAs: those that wait for one another's dQ must all run. With
    `shared` lists heads share what the mask says, too, of lists that are longer than that."""
    torch.manual_seed(0)
    batch, heads, length = 2, 8, 4096
    kinds = random_kinds((batch, 1 if shared else heads, blocks(length), blocks(length)), 7).to(
        hopper
    )
    q, k, v = random_qkv(hopper, torch.bfloat16, batch, length, length, heads, heads // 2, 128)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ids = torch.randint(0, 2, (batch, length), device=hopper).int()
    block_mask = mask_of(kinds)
    out, lse = flash_attn_func(
        *inputs,
        variant=variants.document(ids),
        block_mask=block_mask,
        deterministic=deterministic,
        return_lse=True,
    )
    grads = torch.randn_like(out), torch.randn_like(lse)
    results = torch.autograd.grad((out, lse), inputs, grads, retain_graph=True)
    again = torch.autograd.grad((out, lse), inputs, grads)
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    changes = with_blocks(Changes(mask=lambda b, h, i, j: ids[b, i] == ids[b, j]), kinds)
    for entry in range(batch):
        for head in range(0, heads, 2):
            of_q, of_k = slice(head, head + 2), slice(head // 2, head // 2 + 1)
            part = [
                x.detach()[entry : entry + 1, :, of]
                for x, of in zip((q, k, v), (of_q, of_k, of_k), strict=True)
            ]

            def mask(b, h, i, j, entry=entry, head=head):
                return changes.mask(b + entry, h + head, i, j)

            exact = Attention(*part, 128**-0.5, False, changes=Changes(mask=mask))
            rows = (slice(entry, entry + 1), of_q)
            assert_results(out.detach()[entry : entry + 1, :, of_q], lse.detach()[rows], exact)
            of_part = [
                x[entry : entry + 1, :, of]
                for x, of in zip(results, (of_q, of_k, of_k), strict=True)
            ]
            grad_out = grads[0][entry : entry + 1, :, of_q]
            assert_gradients(of_part, exact, grad_out, grads[1][rows])


@pytest.mark.parametrize("heads", [2, 4])  # of four, that the mask is asked once for
def test_nan_in_hidden_blocks(hopper, kernels, heads):
    """In no row that does not see it, and in all that do, of hidden blocks and of partial ones."""
    torch.manual_seed(0)
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 384, 384, heads, heads, 64)
    ids = (torch.arange(384, device=hopper)[None] // 100).int()
    k[:, 120], v[:, 110], v[:, 350] = math.nan, math.inf, math.nan
    inputs = [x.requires_grad_() for x in (q, k, v)]
    kinds = torch.tensor([[[[1, 0, 0], [1, 1, 0], [0, 1, 2]]]], device=hopper)
    out, lse = flash_attn_func(
        *inputs, variant=variants.document(ids), block_mask=mask_of(kinds), return_lse=True
    )
    changes = with_blocks(Changes(mask=lambda b, h, i, j: ids[b, i] == ids[b, j]), kinds)
    exact = Attention(*(x.detach() for x in inputs), 1 / 8, False, changes=changes)
    assert out[:, :100].isfinite().all()
    assert not out[:, 100:200].isfinite().any()
    assert out[:, 200:256].isfinite().all()
    assert not out[:, 256:].isfinite().any()
    grads = torch.randn_like(out), torch.randn_like(lse)
    results = torch.autograd.grad((out, lse), inputs, grads)
    assert_gradients(results, exact, *grads)
    assert all(grad[:, :100].isfinite().all() for grad in results)


def test_without_a_variant_and_in_a_graph(hopper, kernels):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 512, 512, 2, 2, 64)
    kinds = random_kinds((1, 1, 4, 4), 5).to(hopper)
    block_mask = mask_of(kinds)
    out, lse = flash_attn_func(q, k, v, block_mask=block_mask, return_lse=True)
    exact = Attention(q, k, v, 1 / 8, False, changes=with_blocks(Changes(), kinds))
    assert_results(out, lse, exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attn_func(q, k, v, block_mask=block_mask)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (1700, 40)}])
@pytest.mark.parametrize("name", ["document", "mixed"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_asked_once_or_for_each_head(hopper, kernels, head_dim, name, options):
    """The same bits, of long lists and of units that end behind the last query or key."""
    torch.manual_seed(0)
    for batch, lengths in [(1, (200, 300)), (2, (1000, 4133))]:
        q, k, v = random_qkv(hopper, torch.bfloat16, batch, *lengths, 6, 2, head_dim)
        case = CASES[name](random.Random(0), hopper, batch, 6, *lengths)
        kinds = random_kinds((batch, 1, *map(blocks, lengths)), 3).to(hopper)
        results = [
            flash_attn_func(
                q, k, v, variant=case.bound, block_mask=mask_of(x), return_lse=True, **options
            )
            for x in (kinds, kinds.expand(-1, 6, -1, -1))
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (70, 90)}], ids=str)
@pytest.mark.parametrize("name", ["document", "prefix_lm"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_asked_once_or_for_each_head(hopper, kernels, head_dim, name, options):
    """The same bits, in an order, of lists longer than what is asked once."""
    torch.manual_seed(0)
    for batch, lengths in [(1, (200, 300)), (2, (4133, 1000))]:
        case = CASES[name](random.Random(0), hopper, batch, 6, *lengths)
        kinds = random_kinds((batch, 1, *map(blocks, lengths)), 3).to(hopper)
        inputs = random_qkv(hopper, torch.bfloat16, batch, *lengths, 6, 2, head_dim)
        inputs = [x.requires_grad_() for x in inputs]
        grad_out = torch.randn_like(inputs[0])
        results = []
        for own in (kinds, kinds.expand(-1, 6, -1, -1)):
            mask = {"variant": case.bound, "block_mask": mask_of(own)}
            out = flash_attn_func(*inputs, **mask, deterministic=True, **options)
            results.append(torch.autograd.grad(out, inputs, grad_out))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_graph_reads_may_change(hopper, kernels):
    """Which keys are listed, what the mask says to all heads; and dQ is cleared each time, of more
    heads than are worked on together."""
    torch.manual_seed(0)
    heads, length = 6, 1500
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, length, length, heads, heads, 128)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    place = torch.arange(length, device=hopper)[None]
    ids = (place // 300).int()
    bound = variants.document(ids)
    block_mask = BlockMask.from_mask(bound, 1, heads, length, length)

    def run():
        out = flash_attn_func(*inputs, variant=bound, block_mask=block_mask)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for width in (300, 70, 1500, 300):
        ids.copy_(place // width)
        lists = BlockMask.from_mask(bound, 1, heads, length, length).lists
        for old, new in zip(block_mask.lists, lists, strict=True):
            old.copy_(new)
        graph.replay()
        out, grad_q, *others = run()
        assert torch.equal(captured[0], out)
        assert all(torch.equal(a, b) for a, b in zip(captured[2:], others, strict=True))
        torch.testing.assert_close(captured[1], grad_q, rtol=2e-2, atol=2e-3)


def test_as_without_a_block_mask(hopper, kernels):
    """A block mask of the variant's own mask changes nothing but the order of sums."""
    torch.manual_seed(2)
    ids = torch.randint(0, 6, (2, 1000), device=hopper).sort().values.int()
    bound = variants.document(ids)
    block_mask = BlockMask.from_mask(bound, 2, 4, 1000, 1000, causal=True)
    assert block_mask.kinds.device == ids.device
    assert block_mask.shape == (2, 1, blocks(1000, UNIT), blocks(1000, UNIT))
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 1000, 1000, 4, 2, 128)
    options = {"causal": True, "variant": bound, "return_lse": True}
    out, lse = flash_attn_func(q, k, v, **options)
    out_2, lse_2 = flash_attn_func(q, k, v, **options, block_mask=block_mask)
    assert (lse - lse_2).abs().max() < 2e-5
    assert (out.float() - out_2.float()).abs().max() <= 2.0**-7 * out.float().abs().max()


def test_compiled(hopper, kernels):
    q, k, v = random_qkv(hopper, torch.bfloat16, 1, 400, 400, 4, 2, 64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ids = (torch.arange(400, device=hopper)[None] // 150).int()
    bound = variants.document(ids)
    block_mask = BlockMask.from_mask(bound, 1, 4, 400, 400)

    def loss(q, k, v):
        return flash_attn_func(q, k, v, variant=bound, block_mask=block_mask).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    for result, right in zip(
        torch.autograd.grad(torch.compile(loss)(*inputs), inputs), expected, strict=True
    ):
        assert torch.allclose(result.float(), right.float(), rtol=2e-2, atol=2e-2)
