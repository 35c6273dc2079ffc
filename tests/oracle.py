"""Attention in fp64, and how far from it each row of a result may be.

A largest error says little of one row: a key lost at 4k keys hides behind the rounding of the row
that sees a single one. Here every row has a bound of its own, from what an implementation in
the dtype has to round:

- P once and dS = P (dP - delta) at most twice, element by element, to the dtype: errors that are
  independent, so that their squares add up: of sum_j p_j v_j it is u^2 sum_j p_j^2 |v_j|^2, u the
  unit roundoff;
- the result once: u^2 |row|^2;
- delta = rowsum(dO * O) from an O that carries both of these;
- scores, P and sums of products in fp32: a bound without chance, much smaller. A sum below 2^-126
  may count as 0 whenever it is added to, and once more when it is multiplied by softmax_scale,
  which can be large.

`spread` turns the root of such a sum into a bound.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

# What products, their sums and exponentials may be off by, relative to the sum of magnitudes: they
# are in fp32 for dtypes up to fp32
NOISE = {torch.float64: 2.0**-46}
FP32_NOISE = 2.0**-21
# An absolute error: fp16's P is subnormal below 2^-14; exponentials flush fp32's subnormals to 0
UNDERFLOW = {torch.float16: 2.0**-25}
FP32_UNDERFLOW = 2.0**-126


def finite(x):
    return x.masked_fill(~x.isfinite(), 0.0)


def lengths(x):
    """Norms of the rows. What is not finite counts nothing: its weight is 0, or the result is not
    finite, and then `assert_rows` asks for no more."""
    return finite(x).norm(dim=-1)


def total(weights, x, seen):
    """weights @ x, to which x[j] adds nothing in rows that do not see j, even where it is NaN."""
    wild = (~x.isfinite()).to(weights.dtype)
    if not wild.any():
        return weights @ x
    return (weights @ finite(x)).masked_fill(seen.to(weights.dtype) @ wild > 0, math.nan)


def spread(x, least):
    """By which factor a row's error may exceed u times the root of its sum of squares, x being the
    rows (batch, heads, rows, channels) that the sum is of: (batch, heads, 1).

    An error's deviation is 0.42 u. Its length's square has the mean of a chi-squared variable with
    as many degrees of freedom as x has independent channels, and is taken 6 deviations of a normal
    variable into the tail where that is one (all channels alike). Few rows, nearly
    orthogonal but for a tenth, can all have an error close to u: hence `least`.
    """
    if x.numel() == 0:
        return x.new_full((1, 1, 1), least)
    x = finite(x)
    x = x / x.abs().amax().clamp(min=1e-300)
    gram = x.mT @ x if x.shape[-2] > x.shape[-1] else x @ x.mT  # of the same squares and trace
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    alike = gram.square().sum((-2, -1)) / trace.square().clamp(min=1e-300)
    return (0.42 * (1 + 26 * (2 * alike).sqrt()).sqrt()).clamp(min=least)[..., None]


NO_WINDOW = (-1, -1)


def softcapped(scores, softcap):
    """softcap * tanh(score / softcap), and its derivative; 0 is none."""
    if softcap == 0:
        return scores, 1.0
    tanh = (scores / softcap).tanh()
    return softcap * tanh, 1 - tanh.square()


def visible(rows, keys, causal, window_size=NO_WINDOW, diagonal=None, device="cpu", chunk=0):
    """(rows, keys): whether a query sees a key. Query i stands at key position i + diagonal."""
    diagonal = keys - rows if diagonal is None else diagonal
    position = torch.arange(rows, device=device)[:, None] + diagonal
    key = torch.arange(keys, device=device)[None].expand(rows, keys)
    left, right = window_size
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if left >= 0:
        seen &= position - key <= left
    if right >= 0:
        seen &= key - position <= right
    if chunk > 0:
        first = position.div(chunk, rounding_mode="floor") * chunk
        seen &= (key >= first) & (key < first + chunk)
    return seen


class Changes(NamedTuple):
    """A variant in fp64: functions of batch, head, query and key, all int64 and of shapes that
    broadcast to (batch, heads, rows, keys); `score` of scores of that shape before them. None is
    none."""

    score: Callable | None = None
    mask: Callable | None = None
    weight: Callable | None = None


class Attention:
    """The result for q, k and v (batch, seqlen, heads, head_dim), and what its rows may be off by.

    q may hold only some rows of a longer tensor: those from first_query on, of seqlen_q.
    """

    def __init__(
        self,
        q,
        k,
        v,
        softmax_scale,
        causal,
        first_query=0,
        seqlen_q=None,
        window_size=NO_WINDOW,
        diagonal=None,
        sinks=None,
        softcap=0.0,
        attention_chunk=0,
        changes=None,
    ):
        self.dtype, self.scale = q.dtype, softmax_scale
        self.key_heads = k.shape[2]
        self.group = q.shape[2] // k.shape[2] if k.shape[2] else 1
        self.noise = NOISE.get(q.dtype, FP32_NOISE)
        self.u = torch.finfo(q.dtype).eps / 2
        self.underflow = UNDERFLOW.get(q.dtype, FP32_UNDERFLOW)
        self.q = q.double().transpose(1, 2)
        self.k, self.v = (
            t.double().transpose(1, 2).repeat_interleave(self.group, dim=1) for t in (k, v)
        )
        scores, self.slope = softcapped((self.q @ self.k.mT) * softmax_scale, softcap)
        self.softcap = softcap
        batch, heads, rows, keys = scores.shape
        if diagonal is None:
            diagonal = keys - (rows if seqlen_q is None else seqlen_q)
        diagonal += first_query
        self.seen = visible(rows, keys, causal, window_size, diagonal, q.device, attention_chunk)
        self.weight, self.largest, self.steepest = None, 0.0, 1.0
        if changes is not None:
            places = (
                torch.arange(batch, device=q.device)[:, None, None, None],
                torch.arange(heads, device=q.device)[:, None, None],
                torch.arange(first_query, first_query + rows, device=q.device)[:, None],
                torch.arange(keys, device=q.device),
            )
            scores = self._change(changes, scores, places)
        scores.masked_fill_(~self.seen, -math.inf)
        self.lse = torch.logsumexp(scores, -1)
        # Rows that see nothing, or nothing but scores of -inf: their output is 0
        self.unseen = self.lse == -math.inf
        self.sinks = None if sinks is None else sinks.double()[:, None]
        if sinks is not None:
            self.lse = torch.logaddexp(self.lse, self.sinks)
        # A score of +inf leaves nothing of its row
        origin = self.lse.masked_fill(self.unseen, 0.0).masked_fill(self.lse == math.inf, math.nan)
        self.p = scores.sub_(origin[..., None]).exp_().masked_fill_(~self.seen, 0.0)
        self.out_rows = total(self.weighted(self.p), self.v, self.seen)

    def _change(self, changes, scores, places):
        if changes.score is not None:
            with torch.enable_grad():
                scores.requires_grad_()
                changed = changes.score(scores, *places)
                (self.slope,) = torch.autograd.grad(changed.sum(), scores)
            scores = changed.detach().clone()
            # Sums of large numbers are off by what these are rounded to.
            self.largest = 4 * finite(scores.masked_fill(~self.seen, 0.0)).abs().amax()
            self.steepest = finite(self.slope).abs().amax().clamp(min=1.0)
        if changes.mask is not None:
            self.seen = self.seen & changes.mask(*places)
        if changes.weight is not None:
            self.weight = changes.weight(*places).double()
        return scores

    def weighted(self, x):
        return x if self.weight is None else x * self.weight

    @property
    def out(self):
        return self.out_rows.transpose(1, 2)

    def score_noise(self):
        """What a score may be off by, by query."""
        # A softcap flattens what products are off by; tanh itself is off, too.
        products = self._product_noise() * self.steepest
        return products + self.noise * (self.softcap + self.largest)

    def _product_noise(self):
        """The same without a softcap."""
        longest = lengths(self.k).amax(-1, keepdim=True) if self.k.shape[2] else 0.0
        return self.noise * (1 + self.scale * lengths(self.q) * longest)

    def _slope_noise(self):
        """What a softcap's derivative 1 - tanh^2 may be off by, which near 0 is much of it."""
        of_products = self._product_noise()[..., None] / self.softcap
        return 2 * self.noise + 2 * self.slope * of_products.clamp(max=1)

    def _allowed(self, of, squares, noise, exact, terms, scale=1.0, least=1.25):
        """of: what is summed; squares: of the errors by chance; noise: the others' sum; scale: what
        the sum is multiplied by at last."""
        length = lengths(exact)
        squares = scale**2 * squares + (self.u * length).square()
        steps = (1 + terms / 16) * self.noise / 8  # the sum is rounded after each product of 16
        subnormal = torch.finfo(self.dtype).smallest_normal * self.u * 2
        # The sum's, lost where products or parts are added to it, and where it is scaled
        subnormal += scale * (1 + terms / 8) * FP32_UNDERFLOW
        subnormal *= exact.shape[-1] ** 0.5
        return spread(of, least) * squares.sqrt() + scale * noise + steps * length + subnormal

    def out_allowed(self):
        """(batch, seqlen, heads)."""
        v = lengths(self.v)[..., None]
        p = self.weighted(self.p)
        squares = ((self.u * p).square() + self.underflow**2 * (p > 0)) @ v.square()
        noise = self.score_noise() * (p @ v)[..., 0]
        allowed = self._allowed(
            self.v, squares[..., 0], noise, self.out_rows, self.v.shape[2], least=1.1
        )
        return allowed.transpose(1, 2)

    def lse_allowed(self):
        """(batch, heads, seqlen): an average key of 4096 is 2.4e-4 of it."""
        length = self.lse.abs().masked_fill(self.lse == -math.inf, 0.0)
        return (40 + 2 * length) * self.noise + self.score_noise()

    def _delta(self, do, dp, grad_lse, out):
        """rowsum(dO * O) - dLSE, and the squares of what it is off by, (batch, heads, rows, 1)."""
        delta = do * (self.out_rows if out is None else out.double().transpose(1, 2))
        delta = delta.sum(-1, keepdim=True)
        # Of delta's error, one number for a row: twice, as nothing of it averages out
        squares = (do * self.out_rows).square().sum(-1, keepdim=True)
        # dP has its weight already.
        squares = squares + (self.p * dp).square().sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse.double()[..., None]
        return delta, 4 * self.u**2 * finite(squares)

    def sinks_gradient(self, grad_out, grad_lse=None, dtype=torch.float32):
        """The right one, (heads), and what each may be off by in a result of this dtype."""
        do = grad_out.double().transpose(1, 2)
        dp = self.weighted(do @ self.v.mT).masked_fill_(~self.seen, 0.0)
        delta, squares = self._delta(do, dp, grad_lse, None)
        share = (self.sinks - self.lse).exp().masked_fill(self.lse == -math.inf, 1.0)
        terms = share * delta[..., 0]
        gradient = -terms.sum((0, 2))
        # Sums of fp32, also those of delta, and shares that are off as P is
        reach = lengths(do) * lengths(self.out_rows)
        noise = terms.abs() * (self.score_noise() + self.noise) + share * self.noise * reach
        chance = (share.square() * squares[..., 0]).sum((0, 2)).sqrt()
        rounded = torch.finfo(dtype).eps / 2 * gradient.abs()
        return gradient, 4 * chance + noise.sum((0, 2)) + rounded + FP32_UNDERFLOW

    def gradients(self, grad_out, grad_lse=None, out=None):
        """Of q, k and v: the right ones, and what each of their rows may be off by. With `out` they
        are those of an output that is not this one."""
        p, q, k, v, u = self.p, self.q, self.k, self.v, self.u
        do = grad_out.double().transpose(1, 2)
        dp = self.weighted(do @ v.mT).masked_fill_(~self.seen, 0.0)
        delta, delta_squares = self._delta(do, dp, grad_lse, out)
        apart = None if self.weight is None else dp.square() + delta.square()
        slope = dp.sub_(delta)
        steep = (p * self.slope).masked_fill_(~self.seen, 0.0)
        ds = (slope * steep).masked_fill_(~self.seen, 0.0)
        # Of P, before it is multiplied, and of dS
        ds_squares = 2 * (u * ds).square()
        if apart is not None:  # with weights dP and delta meet P one by one
            ds_squares += (u * p * self.slope).square() * apart
        ds_squares += torch.where(p > 0, self.underflow**2 * (1 + slope.square()), 0.0)
        weighted = self.weighted(p)
        p_squares = (u * weighted).square() + self.underflow**2 * (weighted > 0)
        q2, k2, do2 = (lengths(t)[..., None] for t in (q, k, do))
        score_noise = self.score_noise()[..., None]
        p_noise = weighted * score_noise
        reach = lengths(v)[..., None, :] + lengths(self.out_rows)[..., None]
        # Of dP, and of slopes, which may change by as much as scores are off
        steepest = p if isinstance(self.slope, float) else p * finite(self.slope).abs().clamp(min=1.0)
        ds_noise = ds.abs() * score_noise + self.noise * steepest * do2 * reach
        if self.softcap > 0:
            of_slope = p * slope.abs() * self._slope_noise()
            ds_noise += of_slope.masked_fill(~self.seen, 0.0)
        queries, keys = p.shape[-2:]

        dq = total(ds, k, self.seen) * self.scale
        dk = total(ds.mT, q, self.seen.mT) * self.scale
        dv = total(weighted.mT, do, self.seen.mT)
        dk, dv, *of_keys = (
            t.unflatten(1, (self.key_heads, self.group)).sum(2)
            for t in (
                dk,
                dv,
                ds_squares.mT @ q2.square() + steep.square().mT @ (delta_squares * q2.square()),
                p_squares.mT @ do2.square(),
                ds_noise.mT @ q2,
                p_noise.mT @ do2,
            )
        )
        dk_squares, dv_squares, dk_noise, dv_noise = (t[..., 0] for t in of_keys)
        dq_squares = (
            ds_squares @ k2.square() + delta_squares * lengths(steep @ finite(k))[..., None] ** 2
        )[..., 0]
        dq_noise = (ds_noise @ k2)[..., 0]
        q, do = (t.unflatten(1, (self.key_heads, self.group)).flatten(2, 3) for t in (q, do))
        terms = queries * self.group
        allowed = (
            self._allowed(k, dq_squares, dq_noise, dq, keys, self.scale),
            self._allowed(q, dk_squares, dk_noise, dk, terms, self.scale),
            self._allowed(do, dv_squares, dv_noise, dv, terms),
        )
        return tuple(
            (exact.transpose(1, 2), bound.transpose(1, 2))
            for exact, bound in zip((dq, dk, dv), allowed, strict=True)
        )


def assert_rows(name, result, exact, allowed):
    """|result - exact| is at most `allowed` in every row; where the definition gives no finite
    number the result has none either."""
    assert result.shape == exact.shape, f"{name} has shape {tuple(result.shape)}"
    undefined = ~exact.isfinite()
    assert not result[undefined].isfinite().any(), f"{name}: finite where the definition is not"
    error = (result.double() - exact).masked_fill(undefined, 0.0).norm(dim=-1)
    allowed = allowed.masked_fill(undefined.any(-1) & allowed.isnan(), math.inf)
    # Tensor cores and --use_fast_math take denormal numbers for 0.
    allowed = allowed + 2 * torch.finfo(torch.float32).tiny * result.shape[-1] ** 0.5
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        ratio = (error / allowed).nan_to_num(math.inf, math.inf)
        place = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} rows are wrong, most of all row "
            f"{place}: off by {error[place]:.3g}, allowed {allowed[place]:.3g}"
        )
