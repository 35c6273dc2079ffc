"""Gradients on a Hopper GPU: every row of the build, orders of sums, graphs, streams, sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import MASKS, need_kernels, operator_arguments, poison, random_grads
from oracle import Attention, assert_rows
from parity import DTYPES, assert_gradients_right, random_qkv

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

ROWS = [pytest.param(row, id=row["name"]) for row in tile_configs("backward") if not row["softcap"]]
REPEATS = 200


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_build(hopper, row):
    masks = MASKS.values() if row["mask"] == "any" else [MASKS[row["mask"]]]
    for causal in masks:
        for unused in (0, 24):
            head_dim, head_dim_v = row["head_dim"] - unused, row["head_dim_v"] - unused
            for seqlen_q, seqlen_k in [(113, 203), (300, 64), (64, 1111), (1023, 1024)]:
                sizes = (2, seqlen_q, seqlen_k, 4, 2, head_dim)
                q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], *sizes, head_dim_v=head_dim_v)
                grads, scale = random_grads(q, head_dim_v=head_dim_v), head_dim**-0.5
                out, lse = flash_attn_forward(q, k, v, scale, causal)
                for deterministic in (False, True):
                    result = flash_attn_backward(
                        *grads, q, k, v, out, lse, scale, causal, deterministic, row["name"]
                    )
                    assert_gradients_right(result, *grads, q, k, v, scale, causal)


@pytest.mark.parametrize("row", ROWS)
def test_many_groups_of_heads(hopper, row):
    """dQ of all groups of heads but the first is cleared beside the work on the group before: of
    groups that are whole or not, of queries no key sees, in memory full of NaN."""
    causal = row["mask"] != "full"
    head_dims = {name: row[name] for name in ("head_dim", "head_dim_v")}
    scale = row["head_dim"] ** -0.5
    for batch, seqlen_q, seqlen_k, heads, heads_kv in [(3, 300, 500, 6, 3), (5, 700, 60, 7, 7)]:
        sizes = (batch, seqlen_q, seqlen_k, heads, heads_kv)
        q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], *sizes, **head_dims)
        out, lse = flash_attn_forward(q, k, v, scale, causal)
        grads = random_grads(q, head_dim_v=row["head_dim_v"])
        arguments = (*grads, q, k, v, out, lse, scale, causal, False, row["name"])
        for repeat in range(20):
            poison(q, q, q)
            result = flash_attn_backward(*arguments)
            if repeat == 0:
                assert_gradients_right(result, *grads, q, k, v, scale, causal)
            assert all(gradient.isfinite().all() for gradient in result)


def repeated_call(hopper, row, causal):
    """A call of a row without arguments but `deterministic`, with many tiles and uneven lengths."""
    head_dims = {name: row[name] for name in ("head_dim", "head_dim_v")}
    q, k, v = random_qkv(hopper, DTYPES[row["dtype"]], 2, 1500, 1700, 8, 2, **head_dims)
    scale = row["head_dim"] ** -0.5
    out, lse = flash_attn_forward(q, k, v, scale, causal)
    grads = random_grads(q, head_dim_v=row["head_dim_v"])
    arguments = (*grads, q, k, v, out, lse, scale, causal)
    return lambda deterministic: flash_attn_backward(*arguments, deterministic, row["name"])


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside other work"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_deterministic_gradients_are_the_same_bits(hopper, row, causal, beside):
    """A race between warps or CTAs shows as a result that changes. Other work on another stream
    takes multiprocessors away and shifts timings."""
    if row["mask"] not in ("any", "causal" if causal else "full"):
        pytest.skip(f"the row is for {row['mask']} calls")
    call = repeated_call(hopper, row, causal)
    first = call(True)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        noise = torch.randn(2048, 2048, device=hopper)
    torch.cuda.synchronize()
    changed = torch.zeros((), dtype=torch.int64, device=hopper)
    for i in range(REPEATS):
        if beside and i % 4 == 0:
            with torch.cuda.stream(other):
                noise = (noise @ noise).tanh()
        for again, before in zip(call(True), first, strict=True):
            changed += (again.view(torch.int16) != before.view(torch.int16)).sum()
    torch.cuda.synchronize()
    assert changed.item() == 0
    assert noise.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_other_gradients_differ_by_the_order_of_their_sums_alone(hopper, row, causal):
    """dK and dV are the same bits in any mode; dQ is summed in fp32 and rounded once."""
    if row["mask"] not in ("any", "causal" if causal else "full"):
        pytest.skip(f"the row is for {row['mask']} calls")
    call = repeated_call(hopper, row, causal)
    first = call(True)
    rounding = torch.finfo(first[0].dtype).eps
    changed = torch.zeros((), dtype=torch.int64, device=hopper)
    for _ in range(REPEATS):
        grad_q, grad_k, grad_v, _ = call(False)
        changed += (grad_k != first[1]).sum() + (grad_v != first[2]).sum()
        far = (grad_q.float() - first[0].float()).abs() > 2 * rounding * first[
            0
        ].float().abs() + 1e-5
        changed += far.sum()
    assert changed.item() == 0


def test_graph_replay_with_changed_inputs(hopper):
    """Forward and backward through autograd, captured together."""
    need_kernels(hopper, torch.bfloat16, 64, causal=True)
    sizes = {"batch": 2, "seqlen_q": 333, "seqlen_k": 500, "heads": 6, "key_heads": 2}
    static = [t.requires_grad_() for t in random_qkv(hopper, torch.bfloat16, **sizes)]
    grad_out = torch.zeros_like(static[0])

    def step(q, k, v, grad_out):
        out = flash_attn_func(q, k, v, causal=True, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*static, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*static, grad_out)
    for seed in (1, 2, 3):
        fresh = [t.requires_grad_() for t in random_qkv(hopper, torch.bfloat16, **sizes, seed=seed)]
        fresh_grad, _ = random_grads(fresh[0], seed=seed)
        expected = step(*fresh, fresh_grad)
        with torch.no_grad():
            for tensor, value in zip((*static, grad_out), (*fresh, fresh_grad), strict=True):
                tensor.copy_(value)
        for grad in captured:
            grad.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.skipif(not ROWS, reason="no backward kernels in this build")
def test_deterministic_calls_that_compete_come_to_an_end(hopper):
    script = Path(__file__).with_name("compete.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_streams_at_once(hopper):
    need_kernels(hopper, torch.bfloat16, 64, causal=True)
    problems = [
        operator_arguments(
            hopper, torch.bfloat16, True, seqlen_q=500 + i, seqlen_k=777 - i, heads=8, key_heads=2
        )
        for i in range(2)
    ]
    expected = [flash_attn_backward(*problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    results = [[], []]
    for _ in range(50):
        for stream, problem, grads in zip(streams, problems, results, strict=True):
            with torch.cuda.stream(stream):
                grads.append(flash_attn_backward(*problem))
    torch.cuda.synchronize()
    for all_grads, right in zip(results, expected, strict=True):
        for grads in all_grads:
            assert all(torch.equal(a, b) for a, b in zip(grads, right, strict=True))


def test_runs_on_the_current_stream_without_waiting(hopper):
    need_kernels(hopper, torch.bfloat16, 64, causal=True)
    arguments = operator_arguments(hopper, torch.bfloat16, True)
    grad_out, *rest = arguments
    new_grad = torch.randn_like(grad_out)
    expected = flash_attn_backward(new_grad, *rest)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # clocks
        grad_out.copy_(new_grad)
        grads = flash_attn_backward(*arguments)  # on another stream it would read the old gradient
        done.record()
    assert not done.query()  # the call came back before the GPU was done with it
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("long", ["queries", "keys"])
def test_more_than_2_31_elements(hopper, much_memory, long):
    """The first and the last of more than 2^31 elements have the gradients of a short problem."""
    need_kernels(hopper, torch.bfloat16, 128, causal=False)
    much_memory(45)
    length, short, heads = 2**20 + 200, 70, 16
    generator = torch.Generator(hopper).manual_seed(0)

    def normal(seqlen):
        x = torch.empty(1, seqlen, heads, 128, device=hopper, dtype=torch.bfloat16)
        return x.normal_(generator=generator)

    q = normal(length if long == "queries" else short)
    k, v = (normal(length if long == "keys" else short) for _ in range(2))
    grad_out = normal(q.shape[1])
    out, lse = flash_attn_forward(q, k, v, 128**-0.5, False)
    grads = flash_attn_backward(grad_out, None, q, k, v, out, lse, 128**-0.5, False, False)
    for heads in (slice(0, 1), slice(15, 16)):
        q1, k1, v1, d1 = (t[:, :, heads] for t in (q, k, v, grad_out))
        if long == "queries":
            # Rows of dQ depend on their own query alone.
            for first in (0, length - 300):
                rows = slice(first, first + 300)
                part = (d1[:, rows], None, q1[:, rows], k1, v1, 128**-0.5, False)
                right, _, _ = Attention(*part[2:]).gradients(d1[:, rows])
                assert_rows("gradient of q", grads[0][:, rows, heads], *right)
        else:
            part = (d1, None, q1, k1, v1, 128**-0.5, False)
            assert_gradients_right([g[:, :, heads] for g in grads[:3]], *part)
