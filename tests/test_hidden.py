"""What a mask hides has no part in a result, whatever it is: NaN, infinity or a huge number
in its place gives the same bits as 0. What is seen counts as in the definition.

Each entry of a batch has a spoilt place of its own, and there is one more without any.
"""

import math
import random

import pytest
import torch
from oracle import Attention, assert_rows, visible
from parity import (
    BACKWARD_KERNELS,
    FORWARD_KERNELS,
    assert_right,
    random_qkv,
    run,
    skip_unless_built,
)

WILD = (math.nan, math.inf, -math.inf)
HUGE = {torch.bfloat16: 3e38, torch.float16: 6e4}
SEQLENS = [(100, 100), (300, 300), (129, 400), (260, 70), (513, 641), (1, 200), (700, 33)]


def seqlens(kernel, seed):
    """Fixed ones and random ones; fewer on the CPU, and where nothing is hidden but other heads."""
    chance = random.Random(seed)
    drawn = [(chance.randint(1, 700), chance.randint(1, 700)) for _ in range(4)]
    if not kernel.hides:
        return [(77, 190)]
    return [*SEQLENS[:4], (1, 200)] if kernel.device == "cpu" else SEQLENS + drawn


class Places:
    """Where each entry of a batch is spoilt: which tensor, which token of which head (of queries or
    of keys), one channel, all of them, or all of all later tokens too."""

    def __init__(self, tensors, kernel, seqlen_q, seqlen_k, head_dim, seed):
        chance = random.Random(seed)
        values = [*WILD, HUGE[kernel.dtype]]
        self.entries, self.heads, self.key_heads = [], kernel.heads, kernel.key_heads
        for extent in ("channel", "token", "tail"):
            for name in tensors:
                of_keys = name in "kv"
                seqlen = seqlen_k if of_keys else seqlen_q
                edge = chance.choice([0, seqlen - 1, seqlen * 3 // 5])
                for token in (edge, chance.randrange(seqlen)):
                    head = chance.randrange(kernel.key_heads if of_keys else kernel.heads)
                    channel = chance.randrange(head_dim)
                    value = chance.choice(values)
                    self.entries.append((name, head, token, channel, extent, value))
        self.batch = len(self.entries) + 1

    def fill(self, tensors, zero):
        """The spoilt tensors; with 0 in the places."""
        tensors = {name: t.clone() for name, t in tensors.items()}
        for b, (name, head, token, channel, extent, value) in enumerate(self.entries):
            tokens = slice(token, None if extent == "tail" else token + 1)
            channels = slice(channel, channel + 1) if extent == "channel" else slice(None)
            tensors[name][b, tokens, head, channels] = 0.0 if zero else value
        return tensors

    def touched(self, kernel, seqlen_q, seqlen_k):
        """Queries (batch, seqlen_q, heads) whose result a spoilt place has a part in, and keys
        (batch, seqlen_k, key heads) whose gradients."""
        sees = visible(seqlen_q, seqlen_k, **kernel.mask)
        queries = torch.zeros(self.batch, seqlen_q, self.heads, dtype=torch.bool)
        keys = torch.zeros(self.batch, seqlen_k, self.key_heads, dtype=torch.bool)
        for b, (name, head, token, _, extent, _) in enumerate(self.entries):
            tokens = slice(token, None if extent == "tail" else token + 1)
            if name in "kv":
                of_head = sees[:, tokens].any(1)
                heads, key_head = slice(head * kernel.group, (head + 1) * kernel.group), head
            else:
                of_head = torch.zeros(seqlen_q, dtype=torch.bool)
                of_head[tokens] = sees[tokens].any(1)  # without keys its result is 0
                heads, key_head = slice(head, head + 1), head // kernel.group
            queries[b, :, heads] = of_head[:, None]
            keys[b, :, key_head] = sees[of_head].any(0)
        return queries.to(kernel.device), keys.to(kernel.device)

    def not_huge(self):
        """Entries whose definition has no products near the end of a float's range."""
        wild = [b for b, entry in enumerate(self.entries) if not math.isfinite(entry[-1])]
        return [*wild, self.batch - 1]

    def without_infinite_keys(self):
        """Those of them in which no key is infinite: one of weight 0 makes some elements of its
        queries' gradients NaN by the definition, and all of them in a kernel."""
        return [
            b
            for b in self.not_huge()
            if b == self.batch - 1 or self.entries[b][0] != "k" or math.isnan(self.entries[b][-1])
        ]


def assert_same_bits(name, result, clean, touched):
    """Outside of what is touched."""
    same = (result == clean) | touched
    assert same.all(), f"{name}: {(~same).nonzero()[:5].tolist()} differ"
    assert clean[~touched.expand_as(clean)].isnan().sum() == 0


@pytest.mark.parametrize("kernel", FORWARD_KERNELS, indirect=True)
def test_rows_that_do_not_see_it_have_the_same_bits(kernel):
    for seed, (seqlen_q, seqlen_k) in enumerate(seqlens(kernel, kernel.head_dim)):
        head_dim = kernel.head_dim - (24 if seed % 3 == 2 else 0)
        places = Places("vkq", kernel, seqlen_q, seqlen_k, head_dim, seed)
        sizes = (places.batch, seqlen_q, seqlen_k, kernel.heads, kernel.key_heads, head_dim, seed)
        tensors = dict(zip("qkv", random_qkv(kernel.device, kernel.dtype, *sizes), strict=True))
        spoilt, clean = (places.fill(tensors, zero) for zero in (False, True))
        out, lse = kernel.forward(*(spoilt[name] for name in "qkv"))
        right, right_lse = kernel.forward(*(clean[name] for name in "qkv"))
        queries, _ = places.touched(kernel, seqlen_q, seqlen_k)
        assert_same_bits("output", out, right, queries[..., None])
        assert_same_bits("LSE", lse, right_lse, queries.transpose(1, 2))

        chosen = places.not_huge()
        q, k, v = (spoilt[name][chosen] for name in "qkv")
        exact = Attention(q, k, v, head_dim**-0.5, **kernel.mask)
        assert_rows("output", out[chosen], exact.out, exact.out_allowed())
        # An LSE of -inf is right where all that a row sees is -inf
        exact_lse, lse = (t.masked_fill(exact.unseen, 0.0) for t in (exact.lse, lse[chosen]))
        assert_rows("LSE", lse[..., None], exact_lse[..., None], exact.lse_allowed())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_values_from_60_on(device, head_dim):
    """The rows before them are those of the first 60 keys, the others NaN."""
    for dtype in (torch.bfloat16, torch.float16):
        if device == "cuda":
            skip_unless_built(dtype, head_dim, causal=True)
        q, k, v = random_qkv(device, dtype, 2, 100, 100, 2, 1, head_dim)
        v[:, 60:] = math.nan
        out, lse = run(q, k, v, causal=True)
        assert_right(
            out[:, :60], lse[:, :, :60], q[:, :60], k[:, :60], v[:, :60], head_dim**-0.5, True
        )
        assert out[:, 60:].isnan().all()
        assert lse.isfinite().all()


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, indirect=True)
def test_gradients_of_what_does_not_see_it_have_the_same_bits(kernel):
    for seed, (seqlen_q, seqlen_k) in enumerate(seqlens(kernel, kernel.head_dim)):
        head_dim = kernel.head_dim - (24 if seed % 3 == 2 else 0)
        scale = head_dim**-0.5
        places = Places("vkqdo", kernel, seqlen_q, seqlen_k, head_dim, seed)
        queries, keys = places.touched(kernel, seqlen_q, seqlen_k)
        tensors = gradient_inputs(kernel, places.batch, seqlen_q, seqlen_k, head_dim, seed)
        spoilt, clean = (places.fill(tensors, zero) for zero in (False, True))
        for inputs in (clean, spoilt):  # as a forward pass gives them: the same where not touched
            exact = Attention(*(inputs[name] for name in "qkv"), scale, kernel.causal)
            out, lse = exact.out.to(kernel.dtype), exact.lse.float()
            lse = lse.masked_fill(lse == math.inf, math.nan)
            if inputs is spoilt:
                out = torch.where(queries[..., None], out, clean["o"])
                lse = torch.where(queries.transpose(1, 2), lse, clean["lse"])
            inputs["o"], inputs["lse"] = out, lse
        spoilt, clean = (places.fill(x, z) for x, z in ((spoilt, False), (clean, True)))

        order = ("d", "grad_lse", "q", "k", "v", "o", "lse")
        grads = kernel.backward(*(spoilt[name] for name in order), scale)
        right = kernel.backward(*(clean[name] for name in order), scale)
        for name, grad, same, touched in zip(
            "qkv", grads, right, (queries, keys, keys), strict=True
        ):
            assert_same_bits(f"gradient of {name}", grad, same, touched[..., None])

        chosen = places.without_infinite_keys()
        inputs = {name: tensor[chosen] for name, tensor in spoilt.items()}
        exact = Attention(*(inputs[name] for name in "qkv"), scale, kernel.causal)
        exact = exact.gradients(inputs["d"], inputs["grad_lse"], inputs["o"])
        for name, grad, right_rows in zip("qkv", grads, exact, strict=True):
            assert_rows(f"gradient of {name}", grad[chosen], *right_rows)


def gradient_inputs(kernel, batch, seqlen_q, seqlen_k, head_dim, seed):
    """q, k, v, dO ("d") and the gradient of the LSE, and zeros where O ("o") will be."""
    sizes = (batch, seqlen_q, seqlen_k, kernel.heads, kernel.key_heads, head_dim, seed)
    q, k, v = random_qkv(kernel.device, kernel.dtype, *sizes)
    sizes = (batch, seqlen_q, 0, kernel.heads, 1, head_dim, seed + 100)
    grad_out, _, _ = random_qkv(kernel.device, kernel.dtype, *sizes)
    grad_lse = grad_out[..., 0].float().transpose(1, 2).contiguous()
    return {"q": q, "k": k, "v": v, "d": grad_out, "o": torch.zeros_like(q), "grad_lse": grad_lse}
