"""What TMA cannot read is copied, and that is said. In processes of their own: it is said once."""

import subprocess
import sys

import pytest
import torch
from parity import skip_unless_built

COPIES = """
import sys, warnings
import torch
from cute_kernels import flash_attn_func

warnings.simplefilter(sys.argv[2], UserWarning)
wide = torch.randn(2, 130, 3, 4, 96, device="cuda").bfloat16()
q, k, v = wide[..., :64].unbind(2)  # strides that are multiples of 16 bytes
odd = torch.randn(2, 130, 4, 69, device="cuda").bfloat16()[..., 1:65]
leaf = q.clone().requires_grad_()
out = flash_attn_func(leaf, k, v)

def readable():
    flash_attn_func(q[:1].expand(2, 130, 4, 64), k[:, ::2], v[:, ::2])
    flash_attn_func(q, k[:, :, :1].expand(-1, -1, 4, -1), v)
    flash_attn_func(leaf, k, v).sum().backward()  # the gradient of a sum has strides of 0

calls = {
    "forward": lambda: flash_attn_func(q, odd, odd),
    "backward": lambda: out.backward(odd),
}
def ours(found):
    return [warning for warning in found or () if "cute_kernels" in str(warning.message)]

with warnings.catch_warnings(record=sys.argv[2] == "always") as found:
    readable()
    assert not ours(found)
    try:
        calls[sys.argv[1]]()
    except RuntimeError as error:
        print("error", error)
    for _ in range(2):
        flash_attn_func(odd, odd, odd)
for warning in ours(found):
    print(warning.category.__name__, warning.message)
"""


@pytest.mark.parametrize(("call", "name"), [("forward", "k"), ("backward", "grad_out")])
@pytest.mark.parametrize(("filters", "kind"), [("always", "UserWarning"), ("error", "error")])
def test_a_copy_for_tma_is_warned_of_once(hopper, call, name, filters, kind):
    skip_unless_built(torch.bfloat16, 64, causal=False)
    skip_unless_built(torch.bfloat16, 64, causal=False, of_pass="backward")
    arguments = [sys.executable, "-c", COPIES, call, filters]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{kind} cute_kernels: {name} is copied in full")
    assert f"the address of {name} is 2 bytes beyond one" in line
    assert "its strides are (35880, 276, 69, 1) elements of 2 bytes" in line
