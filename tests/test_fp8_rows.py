"""FP8 kernels by name. Needs a GPU."""

import pytest
import torch
from parity import plain_attention, random_qkv
from test_fp8_gpu import DTYPES, quantised

from cute_kernels import tile_configs
from cute_kernels.fp8 import GPU_BUILT, flash_attn_fp8_func

pytestmark = pytest.mark.skipif(not GPU_BUILT, reason="built without CUTE_KERNELS_FP8")


@pytest.mark.parametrize("name", [row["name"] for row in tile_configs("forward_fp8")])
def test_rows_by_name(hopper, name):
    """Each answers alone, of tensors that are quantised before and of such that are not."""
    (row,) = (row for row in tile_configs("forward_fp8") if row["name"] == name)
    q, k, v = random_qkv(hopper, torch.bfloat16, 2, 333, 333, 2, head_dim=row["head_dim"])
    v = v[..., : row["head_dim_v"]]
    to = row["dtype"]
    tensors = quantised(q, k, v, to)
    assert torch.equal(
        flash_attn_fp8_func(*tensors, tile_config=name), flash_attn_fp8_func(*tensors)
    )
    options = {"qk_dtype": DTYPES[to], "smooth_k": False}
    exact, _ = plain_attention(q, k, v, row["head_dim"] ** -0.5, False, torch.float64)
    out = flash_attn_fp8_func(q, k, v, tile_config=name, **options)
    assert (out.double() - exact).norm() < 0.1 * exact.norm()
    other = "int8" if to == "e4m3" else "e4m3"
    message = f"tile_config '{name}' takes {to} with head_dim up to {row['head_dim']}, but q is"
    with pytest.raises(ValueError, match=message):
        flash_attn_fp8_func(*quantised(q, k, v, other), tile_config=name)
