"""Gradients on a part of the GPU, where CTAs wait for others and most of a grid has not started."""

import subprocess
import sys

import pytest

from cute_kernels import tile_configs

SECONDS = 60
ROWS = [pytest.param(row, id=row["name"]) for row in tile_configs("backward") if not row["softcap"]]
SCRIPT = """
import sys
import torch
from cute_kernels.operators import flash_attn_backward, flash_attn_forward

try:
    from torch.cuda.green_contexts import GreenContext
    part = GreenContext.create(num_sms=16, device_id=0)
except (ImportError, AttributeError, RuntimeError) as error:
    print("no part of the GPU:", error)
    sys.exit(0)

name, dtype, *head_dims = sys.argv[1:]
head_dim, head_dim_v = map(int, head_dims)
torch.manual_seed(0)
options = {"device": "cuda", "dtype": torch.bfloat16 if dtype == "bf16" else torch.float16}
q, k, v, grad_out = (
    torch.randn(2, 2000, 4, channels, **options)
    for channels in (head_dim, head_dim, head_dim_v, head_dim_v)
)
for causal in (False, True):
    out, lse = flash_attn_forward(q, k, v, 0.1, causal)

    def gradients():
        grads = flash_attn_backward(grad_out, None, q, k, v, out, lse, 0.1, causal, True, name)
        torch.cuda.synchronize()
        return grads

    whole = gradients()
    part.set_context()
    few = gradients()
    part.pop_context()
    assert all(torch.equal(a, b) for a, b in zip(whole, few))
print("the same bits")
"""


@pytest.mark.parametrize("row", ROWS)
def test_no_cta_waits_for_one_that_cannot_start(hopper, row):
    """In a fixed order, on 16 multiprocessors: it ends, and with the bits of the whole GPU."""
    head_dims = (str(row[name]) for name in ("head_dim", "head_dim_v"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, row["name"], row["dtype"], *head_dims],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("no part of the GPU"):
        pytest.skip(done.stdout.strip())
    assert done.stdout.strip() == "the same bits"
