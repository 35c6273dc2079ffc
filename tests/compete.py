"""Deterministic gradients on streams that compete for the GPU, beside work that takes
multiprocessors away. CTAs wait for one another; were one to wait for another that may never start,
this would not end, so run it with a time limit:

timeout 60 python tests/compete.py
"""

import itertools
import sys

import torch

from cute_kernels import tile_configs
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

# Key blocks of a call: nearly as many as multiprocessors, so that two calls do not fit at a time;
# and more, so that CTAs that stay draw further ones.
KEY_BLOCKS = (128, 300)
ROUNDS = 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compete(row, key_blocks, causal) -> bool:
    """Whether all gradients are those of a call that runs alone."""
    tokens = key_blocks * row["tile_n"]
    options = {"device": "cuda", "dtype": DTYPES[row["dtype"]]}
    q, k, v, grad_out = (
        torch.randn(1, tokens, 1, row[channels], **options)
        for channels in ("head_dim", "head_dim", "head_dim_v", "head_dim_v")
    )
    out, lse = flash_attn_forward(q, k, v, 0.1, causal)

    def call(keys, deterministic):
        given = grad_out, None, q, k[:, :keys], v[:, :keys], out, lse, 0.1, causal
        return flash_attn_backward(*given, deterministic, row["name"])

    alone = call(tokens, True)
    # A call of half the key blocks, if they are few, leaves half the GPU to the first stream. What
    # it frees goes to the second one, whose priority is higher, though the first still has CTAs to
    # start.
    beside = torch.cuda.Stream()
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        with torch.cuda.stream(beside):
            call(tokens // 2, False)
        for stream, count in zip(streams, wrong, strict=True):
            with torch.cuda.stream(stream):
                for grad, right in zip(call(tokens, True), alone, strict=True):
                    count += (grad != right).sum()
        torch.cuda.synchronize()
    return not any(count.item() for count in wrong)


def main() -> int:
    for row in (row for row in tile_configs("backward") if not row["softcap"]):
        for key_blocks, causal in itertools.product(KEY_BLOCKS, (False, True)):
            if row["mask"] in ("any", "causal" if causal else "full"):
                right = compete(row, key_blocks, causal)
                what = f"{row['name']} {key_blocks} key blocks, causal={causal}"
                print(f"{what}: {'right' if right else 'WRONG'}", flush=True)
                if not right:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
