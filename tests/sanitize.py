"""A few small calls of every kernel of the build, to run under compute-sanitizer on a Hopper GPU:

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize.py
"""

import sys

import torch

from cute_kernels import flash_attn_func, tile_configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 1), (113, 203), (300, 77), (77, 300), (64, 0)]  # seqlen_q, seqlen_k


def main() -> int:
    torch.manual_seed(0)
    checked = 0
    for row in tile_configs("forward"):
        for seqlen_q, seqlen_k in SHAPES:
            options = {"device": "cuda", "dtype": DTYPES[row["dtype"]]}
            q = torch.randn(2, seqlen_q, 4, row["head_dim"], **options)
            k = torch.randn(2, seqlen_k, 2, row["head_dim"], **options)
            v = torch.randn(2, seqlen_k, 2, row["head_dim"], **options)
            for causal in (False, True):
                out = flash_attn_func(q, k, v, causal=causal, tile_config=row["name"])
                if not torch.isfinite(out).all():
                    print(f"{row['name']} {seqlen_q}x{seqlen_k} causal={causal}: not finite")
                    return 1
                checked += 1
    print(f"{checked} calls, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
