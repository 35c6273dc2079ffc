"""Sequences that lie one behind the other, and what is right of each."""

import dataclasses
import math

import torch
from oracle import NO_WINDOW
from parity import assert_gradients_right, assert_right

from cute_kernels import flash_attn_varlen_func


@dataclasses.dataclass
class Packed:
    """A call of flash_attn_varlen_func without its options. Slots of q and k, and of them what is
    used, or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots_q: list
    slots_k: list
    used_q: list | None = None
    used_k: list | None = None

    @property
    def qkv(self):
        return self.q, self.k, self.v

    def lengths(self):
        """cu_seqlens, max_seqlen and seqused as the function's keyword arguments."""
        return {
            "cu_seqlens_q": self._int32(starts(self.slots_q)),
            "cu_seqlens_k": self._int32(starts(self.slots_k)),
            "seqused_q": None if self.used_q is None else self._int32(self.used_q),
            "seqused_k": None if self.used_k is None else self._int32(self.used_k),
        }

    def _int32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def sequences(self):
        """The rows of q and of k that each sequence uses."""
        return list(
            zip(rows(self.slots_q, self.used_q), rows(self.slots_k, self.used_k), strict=True)
        )

    def unused(self):
        """Which rows of q, and of k and v, no sequence uses."""
        masks = []
        for x, place in ((self.q, 0), (self.k, 1)):
            mask = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
            for sequence in self.sequences():
                mask[sequence[place]] = False
            masks.append(mask)
        return masks

    def spoilt(self, value):
        """The same call with `value` where nothing is used."""
        of_q, of_k = self.unused()
        q, k, v = (
            x.detach().masked_fill(mask[:, None, None], value)
            for x, mask in zip(self.qkv, (of_q, of_k, of_k), strict=True)
        )
        return dataclasses.replace(self, q=q, k=k, v=v)

    def run(self, **options):
        """Output and LSE, with what is promised of their form checked."""
        out, lse = flash_attn_varlen_func(*self.qkv, **self.lengths(), **options, return_lse=True)
        assert out.shape == (*self.q.shape[:2], self.v.shape[2])
        assert out.dtype == self.q.dtype
        assert lse.shape == (self.q.shape[1], self.q.shape[0])
        assert lse.dtype == (torch.float64 if self.q.dtype == torch.float64 else torch.float32)
        assert out.is_contiguous() and lse.is_contiguous()
        assert out.device == lse.device == self.q.device
        return out, lse

    def gradients(self, grad_out, grad_lse=None, **options):
        """Output, LSE and the gradients of q, k and v."""
        inputs = [x.detach().requires_grad_() for x in self.qkv]
        result = dataclasses.replace(self, q=inputs[0], k=inputs[1], v=inputs[2]).run(**options)
        grads = [grad_out] if grad_lse is None else [grad_out, grad_lse]
        gradients = torch.autograd.grad(result[: len(grads)], inputs, grads)
        return *(x.detach() for x in result), *gradients


def starts(slots):
    """cu_seqlens of slots of these lengths."""
    return [sum(slots[:i]) for i in range(len(slots) + 1)]


def rows(slots, used):
    used = slots if used is None else used
    return [slice(a, a + n) for a, n in zip(starts(slots)[:-1], used, strict=True)]


def random_packed(chance, device, dtype, slots_q, slots_k, head_dims, heads, used=False, tail=0):
    """N(0, 1); `used`: sequences may use less than their slots; `tail`: rows after the last."""
    generator = torch.Generator(device).manual_seed(chance.randrange(2**31))

    def normal(slots, heads, head_dim):
        shape = (sum(slots) + tail, heads, head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def part(slots):
        return [chance.choice([n, n, min(n, 1), chance.randint(0, n)]) for n in slots]

    return Packed(
        normal(slots_q, heads[0], head_dims[0]),
        normal(slots_k, heads[1], head_dims[0]),
        normal(slots_k, heads[1], head_dims[1]),
        slots_q,
        slots_k,
        part(slots_q) if used else None,
        part(slots_k) if used else None,
    )


def random_grads(packed, seed=9):
    """Gradients of the output and of the LSE."""
    generator = torch.Generator(packed.q.device).manual_seed(seed)
    options = {"generator": generator, "device": packed.q.device}
    total, heads, _ = packed.q.shape
    grad_out = torch.randn(total, heads, packed.v.shape[2], **options).to(packed.q.dtype)
    wide = torch.float64 if packed.q.dtype == torch.float64 else torch.float32
    return grad_out, torch.randn(heads, total, **options, dtype=wide)


def assert_packed_right(
    results,
    packed,
    grads=None,
    softmax_scale=None,
    causal=False,
    window_size=NO_WINDOW,
    diagonal=None,
    **variant,
):
    """Output, LSE and gradients are right in every row of every sequence, and 0, -inf and 0
    elsewhere.

    Args:
        results: output and LSE, and if there are `grads` the gradients of q, k and v.
        grads: of the output and of the LSE, the second may be None.
        variant: what `Attention` takes beside these.
    """
    scale = packed.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse, *gradients = results[:5]
    for i, (of_q, of_k) in enumerate(packed.sequences()):
        mask = {"window_size": window_size, "diagonal": None if diagonal is None else diagonal[i]}
        mask |= variant
        qkv = [x[None, part] for x, part in zip(packed.qkv, (of_q, of_k, of_k), strict=True)]
        assert_right(out[None, of_q], lse[None, :, of_q], *qkv, scale, causal, **mask)
        if gradients:
            parts = [x[None, part] for x, part in zip(gradients, (of_q, of_k, of_k), strict=True)]
            grad_lse = None if grads[1] is None else grads[1][None, :, of_q]
            grad_out = grads[0][None, of_q]
            assert_gradients_right(parts, grad_out, grad_lse, *qkv, scale, causal, **mask)
    of_q, of_k = packed.unused()
    assert not out[of_q].any()
    assert (lse[:, of_q] == -math.inf).all()
    for grad, unused in zip(gradients, (of_q, of_k, of_k), strict=False):
        assert not grad[unused].any()
