"""A few small calls of every kernel of the build, to run under compute-sanitizer on a Hopper GPU:

compute-sanitizer --tool TOOL --error-exitcode 9 python tests/sanitize.py [passes]

TOOL is memcheck, synccheck or racecheck; docs/testing.md says what racecheck cannot know.
"""

import itertools
import sys

import torch
import torch.nn.functional as F

from cute_kernels import (
    BlockMask,
    append_kv,
    flash_attn_fp8_func,
    flash_attn_fp8_varlen_func,
    flash_attn_func,
    flash_attn_varlen_func,
    tile_configs,
    variants,
)
from cute_kernels.operators import (
    flash_attn_backward,
    flash_attn_forward,
    flash_attn_varlen_backward,
    flash_attn_varlen_forward,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
SHAPES = [(1, 1), (113, 203), (300, 77), (77, 300), (64, 0)]  # seqlen_q, seqlen_k


def packed(q, k, v):
    """The same rows as three sequences, the last rows unused: with the starts of q's and k's."""
    lengths = []
    for x in (q, k):
        rows = x.shape[0] * x.shape[1]
        starts = [0, rows // 3, rows // 3, rows - rows // 5]
        lengths.append(torch.tensor(starts, dtype=torch.int32, device="cuda"))
    return *(x.flatten(0, 1) for x in (q, k, v)), *lengths


def forward_of_groups(q, k, v, options):
    """With groups of eight heads, the windows that all such rows take."""
    q, k, v = q.repeat_interleave(8, 2)[:, :, : 8 * k.shape[2]], k, v
    options["causal"] = False
    sinks = torch.zeros(q.shape[2], device=q.device)
    dense = flash_attn_func(q, k, v, window_size=(90, 20), **options)
    lengths = packed(q, k, v)
    return [dense, flash_attn_varlen_func(*lengths, sinks=sinks, window_size=(127, 0), **options)]


def forward(row, q, k, v, causal):
    options = {"causal": causal, "tile_config": row["name"]}
    if row["grouped"]:
        return forward_of_groups(q, k, v, options)
    if row["softcap"]:
        options["softcap"] = 2.0
    results = [flash_attn_func(q, k, v, **options)]
    if row["any_call"]:
        results.append(flash_attn_func(q, k, v, window_size=(90, 20), **options))
        sinks = torch.zeros(q.shape[2], device=q.device)
        results.append(flash_attn_varlen_func(*packed(q, k, v), sinks=sinks, **options))
    return results


def backward(row, q, k, v, causal):
    results = []
    softcap = {"softcap": 2.0} if row["softcap"] else {}
    windows = [{}, {"window_left": 90, "window_right": 20}] if row["any_call"] else [{}]
    for window, deterministic in itertools.product(windows, (False, True)):
        window = window | softcap
        out, lse = flash_attn_forward(q, k, v, 0.1, causal, **window)
        grads = torch.randn_like(out), torch.randn_like(lse)
        arguments = (*grads, q, k, v, out, lse, 0.1, causal, deterministic, row["name"])
        results += flash_attn_backward(*arguments, **window)
        floats = [torch.ones(x.shape, device="cuda") for x in (q, k, v)]
        into = torch.ops.cute_kernels.flash_attn_backward_into
        into(*floats, True, True, *arguments, **window)
        results += floats
        if row["any_call"]:
            inputs = packed(q, k, v)
            qkv, lengths = inputs[:3], (*inputs[3:], None, None, None)
            out, lse = flash_attn_varlen_forward(*qkv, *lengths, 0.1, causal, **window)
            grads = torch.randn_like(out), torch.randn_like(lse)
            arguments = (*grads, *qkv, out, lse, *lengths, 0.1, causal)
            options = {"deterministic": deterministic, "tile_config": row["name"], **window}
            results += flash_attn_varlen_backward(*arguments, **options)
    return results


def forward_fp8(row, q, k, v, causal):
    v[:1, :1, 0, 0] = 1e30  # its head is quantised again
    options = {"causal": causal, "qk_dtype": FP8_DTYPES[row["dtype"]]}
    if not row["any_call"]:
        return [flash_attn_fp8_func(q, k, v, **options)]
    options["sinks"] = torch.zeros(q.shape[2], device=q.device)
    results = [flash_attn_fp8_func(q, k, v, window_size=(90, 20), **options)]
    options |= {"tile_config": row["name"], "return_lse": True}
    return [*results, flash_attn_fp8_varlen_func(*packed(q, k, v), **options)[0]]


def decode(row, q, k, v, causal, dtypes=(None,), qv=None):
    """Two sequences in pages of 16, the second one shorter; parts of the keys. `dtypes`: of the
    caches, None as they are."""
    pages, (seqlen_q, heads, head_dim) = -(-k.shape[1] // 16), q.shape[1:]
    table = torch.arange(2 * pages, device="cuda", dtype=torch.int32).view(2, pages)
    k, v = (
        F.pad(x, (0, 0, 0, 0, 0, pages * 16 - x.shape[1])).unflatten(1, (pages, 16)).flatten(0, 1)
        for x in (k, v)
    )
    starts = torch.arange(0, 3 * seqlen_q, seqlen_q, device="cuda", dtype=torch.int32)
    lengths = torch.tensor([pages * 16, pages * 8], device="cuda", dtype=torch.int32)
    q = q.reshape(-1, heads, head_dim)
    results = []
    for dtype in dtypes:
        caches, factors = (k, v), ()
        options = {} if qv is None else {"qv": qv.flatten(0, 1)}
        if dtype is not None:
            caches, factors = in_eight_bits(k, v, dtype)
            options = {"rotation_seed": 0}
        places = (starts, lengths, table, None, None, None, 0.1, causal)
        attend = torch.ops.cute_kernels.flash_attn_kvcache_forward
        results.append(attend(q, *caches, *places, *factors, **options)[0])
    return results


def in_eight_bits(k, v, dtype):
    """Caches with rotated keys, all rows of which are written as those of one sequence, and the
    descales of q, k and v."""
    caches = [torch.empty_like(x, dtype=dtype) for x in (k, v)]
    scales = [torch.empty_like(x[..., 0], dtype=torch.float32) for x in (k, v)]
    whole = torch.arange(k.shape[0], device="cuda", dtype=torch.int32)[None]
    append_kv(
        *caches,
        *(x.flatten(0, 1)[None] for x in (k, v)),
        torch.zeros(1, device="cuda", dtype=torch.int32),
        page_table=whole,
        k_scales=scales[0],
        v_scales=scales[1],
        incoherent=True,
    )
    return caches, (None, *scales)


def decode_16(row, q, k, v, causal):
    """Of few queries, in groups of 2 heads, or of more than tiles with two key heads have rows."""
    few = 32
    q = q[:, :few] if row["heads"] > 1 else q.repeat(1, few // q.shape[1] + 1, 1, 1)
    return decode(row, q, k, v, causal)


def decode_fp8(row, q, k, v, causal):
    """Of few queries, in groups of 2 heads, or of more than the smallest tile has."""
    few = min(row["tile_m"] for row in tile_configs("decode_fp8")) // 2
    q = q[:, :few] if row["tile_m"] <= 2 * few else q.repeat(1, few // q.shape[1] + 1, 1, 1)
    return decode(row, q, k, v, causal, (torch.int8, torch.float8_e4m3fn))


def prefill(row, q, k, v, causal):
    """The same of so many queries that they are the prefill kernel's."""
    return decode(row, q.repeat(1, 4000 // q.shape[1] + 1, 1, 1), k, v, causal)


def latent(row, q, k, v, causal):
    return decode(row, q, k, v, causal, qv=torch.randn(*q.shape[:3], v.shape[3]).to(q))


def variant(row, q, k, v, causal):
    """One of the hooks, dense and packed, and with a block mask that shows parts of all blocks."""
    bound = row["bound"](q, k)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    outputs = [flash_attn_func(*inputs, causal=causal, variant=bound)]
    if bound.variant.python["mask"] is not None:
        sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        blocks = BlockMask.from_mask(bound, *sizes, causal=causal, device="cuda")
        options = {"causal": causal, "variant": bound, "block_mask": blocks}
        outputs.append(flash_attn_func(*inputs, **options))
    else:
        outputs.append(flash_attn_varlen_func(*packed(*inputs), causal=causal, variant=bound))
    results = [torch.autograd.grad(out.sum(), inputs) for out in outputs]
    return [*outputs, *itertools.chain(*results)]


def of_tokens(q, k):
    """The numbers of documents, ascending."""
    return (
        torch.arange(x.shape[1], device="cuda", dtype=torch.int32).expand(x.shape[0], -1) // 60
        for x in (q, k)
    )


VARIANTS = {
    "alibi": lambda q, k: variants.alibi(torch.rand(q.shape[2], device="cuda")),
    "document": lambda q, k: variants.document(*(x.contiguous() for x in of_tokens(q, k))),
}


def rows_of(of_pass):
    """What is called: the rows of a pass, or variants, whose kernels are compiled first where the
    cache has them not."""
    if of_pass != "variant":
        return tile_configs(of_pass)
    return [
        {"name": name, "bound": bound, "dtype": "bf16", "head_dim": 128}
        for name, bound in VARIANTS.items()
    ]


CALLS = {
    "variant": variant,
    "forward": forward,
    "backward": backward,
    "forward_fp8": forward_fp8,
    "decode": decode_16,
    "decode_fp8": decode_fp8,
    "prefill": prefill,
    "latent": latent,
}


def main() -> int:
    torch.manual_seed(0)
    checked = 0
    for of_pass in sys.argv[1:] or CALLS:
        for row, lengths, causal in itertools.product(rows_of(of_pass), SHAPES, (False, True)):
            options = {"device": "cuda", "dtype": DTYPES.get(row["dtype"], torch.bfloat16)}
            head_dims = (row["head_dim"],) * 2 + (row.get("head_dim_v", row["head_dim"]),)
            q, k, v = (
                torch.randn(2, seqlen, heads, head_dim, **options)
                for seqlen, heads, head_dim in zip(
                    (*lengths, lengths[1]), (4, 2, 2), head_dims, strict=True
                )
            )
            results = CALLS[of_pass](row, q, k, v, causal)
            if not all(torch.isfinite(result).all() for result in results):
                print(f"{row['name']} {lengths} causal={causal}: not finite")
                return 1
            checked += 1
    print(f"{checked} calls, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
