"""What the right result is, and how far from it a result may be."""

import dataclasses
import math

import pytest
import torch
from oracle import NO_WINDOW, Attention, assert_rows

from cute_kernels import flash_attn_func, tile_configs
from cute_kernels.operators import flash_attn_backward

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SEQLENS = [(1, 1), (1, 8192), (113, 203), (799, 3), (1023, 1024), (4224, 4224)]
HEAD_DIMS = [64, 128, 256, 40, 72, 96, 136]
HEADS = [(4, 4), (6, 2), (4, 1)]  # MHA, GQA, MQA


# Windows (left, right), around blocks of 64, 128 and 256 rows and at the ends
_EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]
WINDOWS = (
    [(n, -1) for n in _EDGES] + [(-1, n) for n in _EDGES] + [(n, 300 - n) for n in _EDGES[:-1]]
)
WINDOWS += [(0, 0), (3, 0), (0, 3), (128, 128)]


def _grid():
    """Everything on the GPU; less on the CPU, which has no kernels to choose from."""
    shapes = {
        "cpu": [(64, HEADS[0]), (128, HEADS[1]), (40, HEADS[2])],
        "cuda": [(head_dim, heads) for head_dim in HEAD_DIMS for heads in HEADS],
    }
    for device, head_dims_and_heads in shapes.items():
        for seqlen_q, seqlen_k in SEQLENS:
            for head_dim, heads in head_dims_and_heads:
                if device == "cpu" and seqlen_q * seqlen_k > 2**23:
                    continue  # seconds each; test_reference.py has one
                name = f"{device}-{seqlen_q}x{seqlen_k}-d{head_dim}-h{heads[0]}:{heads[1]}"
                yield pytest.param(device, (seqlen_q, seqlen_k), head_dim, heads, id=name)


GRID = list(_grid())  # parameters device, seqlens, head_dim, heads


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a test calls: a row of the build, or the CPU's implementation, which has no rows."""

    device: str
    dtype: torch.dtype
    head_dim: int
    causal: bool
    name: str | None = None
    window_size: tuple[int, int] = NO_WINDOW
    heads: int = 4
    key_heads: int = 2

    @property
    def mask(self):
        """What the oracle is to be told of it."""
        return {"causal": self.causal, "window_size": self.window_size}

    @property
    def hides(self):
        return self.causal or self.window_size != NO_WINDOW

    @property
    def group(self):
        return self.heads // self.key_heads

    def forward(self, q, k, v, softmax_scale=None):
        options = {"softmax_scale": softmax_scale, "tile_config": self.name}
        return run(q, k, v, self.causal, window_size=self.window_size, **options)

    def backward(self, grad_out, grad_lse, q, k, v, out, lse, softmax_scale):
        """Gradients of q, k and v, deterministic."""
        tensors = (grad_out, grad_lse, q, k, v, out, lse)
        return flash_attn_backward(*tensors, softmax_scale, self.causal, True, self.name)[:3]


def common_head_dim(row):
    """The largest that q, k and v may all have."""
    return min(row["head_dim"], row.get("head_dim_v", row["head_dim"]))


def widest_window(row, group):
    """How many keys the queries of a call may see that a row for short windows takes."""
    queries = 64 // group  # of a warpgroup
    return row["tile_n"] - queries + 1 - max(0, 8 - queries)


def short_window(row, causal):
    """A window and heads that a row for short windows takes: the widest of the smallest group."""
    group = min(group for group in (4, 8) if widest_window(row, group) > 127)
    window_size = (widest_window(row, group) - 1, 0) if causal else (60, 60)
    return {"window_size": window_size, "heads": 2 * group, "key_heads": 2}


def _kernels(of_pass):
    for causal in (False, True):
        mask = "causal" if causal else "full"
        yield pytest.param(Kernel("cpu", torch.bfloat16, 64, causal), id=f"cpu-{mask}")
        for row in tile_configs(of_pass):
            dtype, head_dim = DTYPES[row["dtype"]], common_head_dim(row)
            if row.get("grouped"):
                kernel = Kernel(
                    "cuda", dtype, head_dim, False, row["name"], **short_window(row, causal)
                )
                yield pytest.param(kernel, id=f"{row['name']}-{kernel.window_size}")
            elif row["mask"] in ("any", mask) and not row["softcap"]:
                kernel = Kernel("cuda", dtype, head_dim, causal, row["name"])
                yield pytest.param(kernel, id=f"{row['name']}-{mask}")


# Of the fixture `kernel`, which skips rows where there is no GPU: indirect=True
FORWARD_KERNELS = list(_kernels("forward"))
BACKWARD_KERNELS = list(_kernels("backward"))


def random_qkv(
    device,
    dtype,
    batch=2,
    seqlen_q=128,
    seqlen_k=128,
    heads=4,
    key_heads=None,
    head_dim=64,
    seed=0,
    head_dim_v=None,
):
    """q, k and v of N(0, 1) in (batch, seqlen, heads, head_dim), v's its own if it is given."""
    generator = torch.Generator(device).manual_seed(seed)
    key_heads = heads if key_heads is None else key_heads

    def normal(seqlen, heads, head_dim=head_dim):
        shape = (batch, seqlen, heads, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    v_head_dim = head_dim if head_dim_v is None else head_dim_v
    q, k = normal(seqlen_q, heads), normal(seqlen_k, key_heads)
    return q, k, normal(seqlen_k, key_heads, v_head_dim)


def plain_attention(q, k, v, softmax_scale, causal, dtype, first_query=0, seqlen_q=None):
    """Attention as its definition, all of it in `dtype`: output and LSE.

    q may hold only some rows of a longer tensor: those from first_query on, of seqlen_q.
    """
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scores = (q @ k.mT) * softmax_scale
    unseen = torch.full((q.shape[2], 1), k.shape[2] == 0, device=q.device)  # rows
    if causal:
        seqlen_q = q.shape[2] if seqlen_q is None else seqlen_q
        query = torch.arange(first_query, first_query + q.shape[2], device=q.device)
        key = torch.arange(k.shape[2], device=q.device)
        hidden = key > query[:, None] + k.shape[2] - seqlen_q
        unseen = hidden.all(-1, keepdim=True)
        # A row of nothing but -inf would make its gradients NaN.
        scores = scores.masked_fill(hidden & ~unseen, -math.inf)
    lse = torch.logsumexp(scores, -1).masked_fill(unseen[:, 0], -math.inf)
    probabilities = torch.softmax(scores, -1).masked_fill(unseen, 0.0)
    return (probabilities @ v).transpose(1, 2), lse


def assert_right(out, lse, q, k, v, softmax_scale, causal, **rows_and_mask):
    """Every row of the output and every LSE is as near as rounding explains: see oracle.py."""
    exact = Attention(q, k, v, softmax_scale, causal, **rows_and_mask)
    assert_rows("output", out, exact.out, exact.out_allowed())
    empty = exact.lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    lse, right, allowed = (
        t.masked_fill(empty, 0.0)[..., None] for t in (lse, exact.lse, exact.lse_allowed())
    )
    assert_rows("LSE", lse, right, allowed[..., 0])
    assert not out.transpose(1, 2)[exact.unseen].any()  # exactly 0 where nothing is seen


def assert_gradients_right(grads, grad_out, grad_lse, q, k, v, softmax_scale, causal, **mask):
    """`assert_right`'s rule for each of the gradients of q, k and v, the first of `grads`."""
    exact = Attention(q, k, v, softmax_scale, causal, **mask).gradients(grad_out, grad_lse)
    for name, grad, right in zip("qkv", grads[:3], exact, strict=True):
        assert grad.dtype == q.dtype
        assert_rows(f"gradient of {name}", grad, *right)


def poison(q, v):
    """Leaves NaN in the freed memory that a call's outputs will be allocated from."""
    batch, seqlen, heads, _ = q.shape
    out_shape = (batch, seqlen, heads, v.shape[3])
    out = torch.full(out_shape, math.nan, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, seqlen), math.nan, device=q.device)
    del out, lse


def run(q, k, v, causal=False, **arguments):
    """flash_attn_func on poisoned memory, with what is promised of the outputs' form checked."""
    poison(q, v)
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True, **arguments)
    batch, seqlen, heads, _ = q.shape
    assert out.shape == (*q.shape[:3], v.shape[3])
    assert out.dtype == q.dtype
    assert out.device == q.device == lse.device
    assert lse.shape == (batch, heads, seqlen)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    return out, lse


def check(q, k, v, causal=False, softmax_scale=None, window_size=NO_WINDOW, **arguments):
    """Runs a call and compares its output and LSE with the definition."""
    arguments.update(softmax_scale=softmax_scale, window_size=window_size)
    out, lse = run(q, k, v, causal, **arguments)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    assert_right(out, lse, q, k, v, scale, causal, window_size=window_size)
    return out, lse


def random_mask(chance):
    """`causal` and `window_size`, of a random.Random."""

    def limit():
        return chance.choice([-1, -1, 0, 1, chance.randint(2, 40), chance.randint(40, 400)])

    return {"causal": chance.random() < 0.4, "window_size": (limit(), limit())}


def one_hot(seqlen, first_channel, channels, head_dim):
    """(batch, seqlen, 1, head_dim): token b * channels + c has a 1 in channel first_channel + c of
    entry b of the batch."""
    batch = -(-seqlen // channels)
    x = torch.zeros(batch, seqlen, 1, head_dim)
    token = torch.arange(seqlen)
    x[token // channels, token, 0, first_channel + token % channels] = 1.0
    return x


def by_token(x, first_channel, channels, seqlen):
    """The inverse, of a result (batch, rows, heads, head_dim): (rows, heads, seqlen)."""
    chosen = x[..., first_channel : first_channel + channels].double()
    return chosen.permute(1, 2, 0, 3).flatten(2)[..., :seqlen]


def changed(call, changes):
    """A call's arguments, some by functions of what they were."""
    return {**call, **{name: change(call.get(name)) for name, change in changes.items()}}


def skip_unless_answered(
    device, dtype, head_dim=64, head_dim_v=None, softcap=False, passes=("forward", "backward")
):
    """Builds may hold only some rows that take any call, or any call with a softcap."""
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    for of_pass in passes if device == "cuda" else ():
        if not any(
            row["any_call"]
            and "variant" not in row
            and row["softcap"] == softcap
            and DTYPES[row["dtype"]] == dtype
            and row["head_dim"] >= head_dim
            and row.get("head_dim_v", row["head_dim"]) >= head_dim_v
            for row in tile_configs(of_pass)
        ):
            pytest.skip(
                f"this build has no {of_pass} kernel for all calls with {dtype}, head dims "
                f"{head_dim} and {head_dim_v}"
            )


def skip_unless_built(dtype, head_dim, causal, of_pass="forward"):
    """Builds may hold only some dtypes and head dims."""
    mask = "causal" if causal else "full"
    for row in tile_configs(of_pass):
        if (
            DTYPES[row["dtype"]] == dtype
            and common_head_dim(row) >= head_dim
            and row["mask"] in ("any", mask)
            and not (row["softcap"] or row.get("grouped") or "variant" in row)
        ):
            return
    pytest.skip(f"this build has no {of_pass} kernel for {dtype}, head dim {head_dim}, {mask}")
