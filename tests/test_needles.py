"""Every key comes back exactly once, and every query: one-hot values tell them apart.

Lengths lie around the blocks, tiles and bands of every row of the build. Where a problem has more
keys than channels, each entry of the batch tells apart as many as there are channels.
"""

import oracle
import pytest
import torch
from parity import BACKWARD_KERNELS, FORWARD_KERNELS, by_token, one_hot, random_qkv

EDGES = [n + d for n in (64, 80, 96, 128, 176, 192, 256, 352, 512) for d in (-1, 0, 1)]
LENGTHS = [1, 2, 15, 16, 17, *EDGES, 640]
# seqlen_q and seqlen_k: equal, and each with one that is far from it
SHAPES = [(n, n) for n in LENGTHS] + [
    (n, LENGTHS[(13 * i + 6) % len(LENGTHS)]) for i, n in enumerate(LENGTHS)
]
HEADS, KEY_HEADS = 4, 2


def shapes(kernel):
    """seqlen_q, seqlen_k, head_dim; every third one with a head dim that the row pads."""
    few = SHAPES[3::9] if kernel.device == "cpu" else SHAPES
    for i, (seqlen_q, seqlen_k) in enumerate(few):
        yield seqlen_q, seqlen_k, kernel.head_dim - (32 if i % 3 == 2 else 0)


def visible(kernel, seqlen_q, seqlen_k):
    """(seqlen_q, seqlen_k): whether the query sees the key."""
    return oracle.visible(seqlen_q, seqlen_k, **kernel.mask, device=kernel.device)


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_every_visible_key_has_its_weight(kernel):
    """Scores are all 0: a row that sees n keys has 1 / n of each."""
    options = {"device": kernel.device, "dtype": kernel.dtype}
    wrong = []
    for seqlen_q, seqlen_k, head_dim in shapes(kernel):
        v = one_hot(seqlen_k, 0, head_dim, head_dim).to(**options)
        v = v.expand(-1, -1, kernel.key_heads, -1).contiguous()
        q = torch.zeros(v.shape[0], seqlen_q, kernel.heads, head_dim, **options)
        out, _ = kernel.forward(q, torch.zeros_like(v), v)
        weights = by_token(out, 0, head_dim, seqlen_k)
        seen = visible(kernel, seqlen_q, seqlen_k)
        right = (seen / seen.sum(-1, keepdim=True).clamp(min=1))[:, None]
        bad = ((weights - right).abs() > torch.finfo(kernel.dtype).eps * right).sum()
        wrong.append(torch.stack([bad, bad.new_tensor(seqlen_q), bad.new_tensor(seqlen_k)]))
    wrong = torch.stack(wrong)
    assert wrong[wrong[:, 0] != 0].tolist() == []  # elements, seqlen_q, seqlen_k


def selecting(kernel, seqlen_q, seqlen_k, head_dim, seed):
    """q, k, v where each query's score is far above all others at one key, and which key: the last
    that it sees, the first, and others."""
    batch = 4
    sees, key_heads = visible(kernel, seqlen_q, seqlen_k), kernel.key_heads
    first, seen = sees.int().argmax(-1), sees.sum(-1)
    query = torch.arange(seqlen_q, device=kernel.device)
    chosen = torch.stack([seen - 1, 0 * query, 7 * query + seed, (seen - 1) // 2 + query])
    chosen = first + chosen % seen.clamp(min=1)
    _, k, v = random_qkv(
        kernel.device, kernel.dtype, batch, 0, seqlen_k, key_heads, key_heads, head_dim, seed
    )
    k = torch.where(k > 0, 1.0, -1.0).to(kernel.dtype)
    place = chosen[:, :, None, None].expand(-1, -1, key_heads, head_dim)
    q = 8 * k.gather(1, place).repeat_interleave(kernel.group, dim=2)
    return q, k, v, v.gather(1, place).repeat_interleave(kernel.group, dim=2), seen > 0


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_a_selected_key_comes_back_bit_for_bit(kernel):
    """Its weight is 1, that of the others less than the last bit of anything."""
    wrong = []
    for seqlen_q, seqlen_k, _ in shapes(kernel):
        head_dim = kernel.head_dim
        q, k, v, right, sees = selecting(kernel, seqlen_q, seqlen_k, head_dim, seqlen_q)
        out, _ = kernel.forward(q, k, v, softmax_scale=1.0)
        bad = (out != right * sees[:, None, None]).sum()
        wrong.append(torch.stack([bad, bad.new_tensor(seqlen_q), bad.new_tensor(seqlen_k)]))
    wrong = torch.stack(wrong)
    assert wrong[wrong[:, 0] != 0].tolist() == []  # elements, seqlen_q, seqlen_k


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_every_query_reaches_the_values_it_sees(kernel):
    """Scores are all 0 and dO is one-hot by query: dV holds P^T, element by element. The heads of a
    group have 1 and 2, so that none can stand for another."""
    options = {"device": kernel.device, "dtype": kernel.dtype}
    for seqlen_q, seqlen_k, head_dim in shapes(kernel):
        of_head = torch.tensor([1.0, 2.0] * KEY_HEADS).view(1, 1, HEADS, 1)
        grad_out = (one_hot(seqlen_q, 0, head_dim, head_dim) * of_head).to(**options)
        q = torch.zeros_like(grad_out)
        k = torch.zeros(q.shape[0], seqlen_k, KEY_HEADS, head_dim, **options)
        seen = visible(kernel, seqlen_q, seqlen_k)
        count = seen.sum(-1)
        lse = count.double().log().float().expand(q.shape[0], HEADS, seqlen_q).contiguous()
        _, _, grad_v = kernel.backward(grad_out, None, q, k, k, q, lse, 1.0)
        weights = by_token(grad_v, 0, head_dim, seqlen_q)
        right = (3 * seen / count[:, None].clamp(min=1)).mT[:, None]
        allowed = 2 * torch.finfo(kernel.dtype).eps * right
        bad = ((weights - right).abs() > allowed).sum().item()
        assert bad == 0, (seqlen_q, seqlen_k, head_dim)


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_every_pair_reaches_the_gradients_of_query_and_key(kernel):
    """Q is one-hot by query in the lower half of the channels and K by key in the upper one: scores
    are all 0, dK holds dS^T and dQ dS, element by element."""
    options = {"device": kernel.device, "dtype": kernel.dtype}
    for seqlen_q, seqlen_k, head_dim in shapes(kernel):
        half = head_dim // 2
        q, k = one_hot(seqlen_q, 0, half, head_dim), one_hot(seqlen_k, half, half, head_dim)
        batch = max(q.shape[0], k.shape[0])
        q, k = (torch.cat([t, t.new_zeros(batch - t.shape[0], *t.shape[1:])]) for t in (q, k))
        q = q.expand(-1, -1, HEADS, -1).contiguous().to(**options)
        k = k.expand(-1, -1, KEY_HEADS, -1).contiguous().to(**options)
        # dP is 1 or -1 by key, and twice that for the second head of a group
        sign = torch.where(torch.arange(seqlen_k, device=kernel.device) % 3 == 0, 1.0, -1.0)
        seen = visible(kernel, seqlen_q, seqlen_k)
        count = seen.sum(-1, keepdim=True).clamp(min=1)
        mean = (seen * sign).sum(-1, keepdim=True) / count
        v, grad_out, out = torch.zeros_like(k), torch.zeros_like(q), torch.zeros_like(q)
        v[..., 0] = sign[:, None]
        grad_out[..., 0] = torch.tensor([1.0, 2.0] * KEY_HEADS, device=kernel.device)
        out[..., 0] = mean
        lse = seen.sum(-1).double().log().float().expand(batch, HEADS, seqlen_q).contiguous()
        grad_q, grad_k, _ = kernel.backward(grad_out, None, q, k, v, out, lse, 1.0)
        ds = torch.where(seen, (sign - out[0, :, 0, :1].double()) / count, 0.0)
        rounding = 2 * torch.finfo(kernel.dtype).eps
        allowed = seen / count * rounding
        results = (
            (by_token(grad_k, 0, half, seqlen_q), 3 * ds.mT[:, None], 3 * allowed.mT[:, None]),
            (by_token(grad_q, half, half, seqlen_k)[:, 0::2], ds[:, None], allowed[:, None]),
            (
                by_token(grad_q, half, half, seqlen_k)[:, 1::2],
                2 * ds[:, None],
                2 * allowed[:, None],
            ),
        )
        for grad, right, most in results:
            bad = ((grad - right).abs() > most).sum().item()
            assert bad == 0, (seqlen_q, seqlen_k, head_dim)
