"""What a call of the operators may look like: the functions take what the operators take.

The CPU implementations and shape inference ask first. The CUDA implementations refuse the same on
their own, in C++ and in few words; then `explain` asks here what is wrong.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cute_kernels.reference import accumulator_dtype
from cute_kernels.tile_checks import check_blocks, check_tile_config, is_own_mask
from cute_kernels.torch_private import in_forward_mode, surely, surely_in_transform

MAX_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8

_GPU_DTYPES = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (*_GPU_DTYPES, torch.float32, torch.float64)
_SINK_DTYPES = (*_GPU_DTYPES, torch.float32)
_SIZE_LIMIT = 2**31
ROWS_LIMIT = 2**31 - 2**10  # of q and k together: kernels add them up, and some of a tile
_VECTOR_BYTES = 16
INTS = (int, torch.SymInt, numbers.Integral)  # the last are NumPy's; tensors are none
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_INT_LIMIT = 2**63  # operators take ints of 64 bits

# The dimensions of q, k and v.
DENSE = ("batch", "seqlen", "heads", "head_dim")
PACKED = ("total", "heads", "head_dim")

NO_FORWARD_MODE = (
    "cute_kernels has no forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual "
    "tensors): use torch.func.grad, vjp or jacrev"
)

_Call = TypeVar("_Call", bound=Callable[..., Any])
_unpack_dual: Callable[[Tensor], Any] = forward_ad.unpack_dual


def explain(check: Callable[..., None], *inputs: Any, **keywords: Any) -> None:
    """Raises what `check` raises for the inputs of a call that was refused, if it does. The caller
    raises the refusal itself: the compilers of torch 2.10 and 2.11 cannot trace the `raise` of an
    argument."""
    try:
        check(*inputs, **keywords)
    except (TypeError, ValueError, NotImplementedError) as exact:
        raise exact from None


def outside_compilers(function: _Call) -> _Call:
    """The function, which compilers may not trace. Only they pay for `torch.compiler.disable`: it
    loads all of the compiler."""

    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            not_traced: Callable[[_Call], _Call] = torch.compiler.disable
            return not_traced(function)(*inputs)
        return function(*inputs)

    return cast(_Call, call)


@outside_compilers
def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raises NotImplementedError if a tensor has a tangent; to be asked in forward mode only."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and _unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE)


def refuse_derivatives(function: str, *inputs: object, where: str = "") -> None:
    """Raises NotImplementedError if an input has a derivative, so that none is dropped in
    silence. `where`: in which calls the function has none."""
    if torch.is_grad_enabled():
        for x in inputs:
            if isinstance(x, Tensor) and x.requires_grad:
                raise NotImplementedError(
                    f"{function} has no gradient{where}: call it under torch.no_grad() or on "
                    "tensors that need no gradient"
                )
    if torch.compiler.is_compiling():
        return
    if surely_in_transform():
        raise NotImplementedError(f"{function} has no torch.func transforms{where}")
    if in_forward_mode():
        refuse_tangents(*(x for x in inputs if isinstance(x, Tensor)))


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    tile_config: str | None = None,
    deterministic: bool = False,
    sinks: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    diagonal: int | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
) -> None:
    """Raises ValueError or TypeError unless the forward operator can answer this call."""
    check_call(q, k, v, DENSE, softmax_scale, causal, deterministic, sinks, softcap)
    _check_batch(q, k, v)
    check_window(window_left, window_right)
    check_int("diagonal", diagonal)
    check_sm_margin(sm_margin)
    right = 0 if causal else window_right
    own_mask = tile_config is not None and is_own_mask(q, k, window_left, right, diagonal)
    any_call = own_mask or sinks is not None or softcap > 0
    check_tile_config(tile_config, "forward", q, v, any_call, softcap > 0)
    check_blocks("q", q)


def check_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    tile_config: str | None = None,
    sinks: Tensor | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    diagonal: int | None = None,
    softcap: float = 0.0,
    sm_margin: int = 0,
) -> None:
    """Raises ValueError or TypeError unless the backward operator can answer this call."""
    check_call(q, k, v, DENSE, softmax_scale, causal, deterministic, sinks, softcap)
    _check_batch(q, k, v)
    check_results(q, v, DENSE, out, grad_out, lse, grad_lse)
    check_window(window_left, window_right)
    check_int("diagonal", diagonal)
    check_sm_margin(sm_margin)
    right = 0 if causal else window_right
    own_mask = tile_config is not None and is_own_mask(q, k, window_left, right, diagonal)
    check_tile_config(tile_config, "backward", q, v, own_mask or softcap > 0, softcap > 0)
    check_blocks("k", k)


def check_results(
    q: Tensor,
    v: Tensor,
    layout: tuple[str, ...],
    out: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """The results of a forward pass and their gradients, in a backward pass."""
    *batch, seqlen, heads, head_dim = q.shape
    shape = (*batch, seqlen, heads, v.shape[-1])
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        check_like(name, tensor, q)
        if tensor.shape != shape:
            like = "q" if shape[-1] == head_dim else "q, with v's head_dim"
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, must be {tuple(shape)} like {like}"
            )
    dtype = accumulator_dtype(q.dtype)
    shape = (*batch, heads, seqlen)
    for name, given in (("lse", lse), ("grad_lse", grad_lse)):
        if given is None:
            continue
        check_device(name, given, q)
        if given.dtype != dtype:
            raise TypeError(f"{name} has dtype {given.dtype}, must be {dtype}")
        if given.shape != shape:
            *first, rows, of_heads, _ = layout
            names = ", ".join([*first, of_heads, f"{rows}_q"])
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, must be ({names}) = {tuple(shape)}"
            )


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: tuple[str, ...],
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    sinks: Tensor | None,
    softcap: float,
) -> None:
    """What calls of every layout have in common."""
    check_flag("causal", causal)
    check_flag("deterministic", deterministic)
    check_alone("q", q, layout)
    for name, tensor in (("k", k), ("v", v)):
        check_like(name, tensor, q)
        check_alone(name, tensor, layout)
    _check_shapes(q, k, v, layout)
    _check_rows(q, k, layout)
    check_softmax_scale(softmax_scale, accumulator_dtype(q.dtype))
    check_softcap(softcap, accumulator_dtype(q.dtype))
    if sinks is not None:
        check_sinks(sinks, q)


def check_window(left: int | None, right: int | None) -> None:
    """The operators' window: at least 0, or None for no limit."""
    for name, limit in (("window_left", left), ("window_right", right)):
        check_int(name, limit, least=0)


def check_vectors(name: str, x: Tensor) -> None:
    """On CUDA kernels take a tensor by vectors, where no copy of it is made."""
    if x.device.type != "cuda" or x.numel() == 0:
        return
    strides = zip(x.shape[:-1], x.stride(), strict=False)
    offsets = [x.storage_offset(), *(stride for n, stride in strides if n > 1)]
    if any(n * x.element_size() % _VECTOR_BYTES != 0 for n in offsets):
        raise ValueError(
            f"{name} has strides {x.stride()} and offset {x.storage_offset()}, must be multiples "
            f"of {_VECTOR_BYTES} bytes on CUDA"
        )


def check_sm_margin(sm_margin: int) -> None:
    check_int("sm_margin", sm_margin, least=0, none="")


def check_flag(name: str, flag: object) -> None:
    is_numpy = type(flag).__module__ == "numpy" and type(flag).__name__ in ("bool", "bool_")
    if not isinstance(flag, (bool, int, torch.SymBool)) and not is_numpy:
        raise TypeError(f"{name} is {flag!r}, must be True or False")


def check_int(name: str, number: object, least: int | None = None, none: str = " or None") -> None:
    """Raises ValueError or TypeError unless it is an int, at least `least`, or None if `none`."""
    if number is None and none:
        return
    if not isinstance(number, INTS):
        raise TypeError(f"{name} is {number!r}, must be an int{none}")
    if not isinstance(number, (int, torch.SymInt)):
        number = int(number)
    if least is not None and surely(number < least):
        raise ValueError(f"{name} is {number}, must be at least {least}{none}")
    if isinstance(number, int) and not -_INT_LIMIT <= number < _INT_LIMIT:
        raise ValueError(f"{name} is {number}, must be an int of 64 bits{none}")


def check_seed(seed: int) -> None:
    """Raises ValueError or TypeError unless it is an int of 64 bits without a sign."""
    if not isinstance(seed, INTS):
        raise TypeError(f"seed is {seed!r}, must be an int")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, must be at least 0 and below 2**64")


def check_softmax_scale(softmax_scale: float, dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError or TypeError unless scores in dtype can be multiplied by it."""
    _check_number("softmax_scale", softmax_scale)
    if not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale is {softmax_scale}, must be finite and greater than 0")
    largest = torch.finfo(dtype).max
    if softmax_scale > largest:
        raise ValueError(f"softmax_scale is {softmax_scale}, must be at most {largest}")


def check_softcap(softcap: float, dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError or TypeError unless scores in dtype can be divided by it; 0 is none."""
    _check_number("softcap", softcap)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap is {softcap}, must be finite and at least 0, which is none")
    largest = torch.finfo(dtype).max
    if softcap > largest:
        raise ValueError(f"softcap is {softcap}, must be at most {largest}")


def _check_number(name: str, number: object) -> None:
    if isinstance(number, _NUMBERS):
        return
    several = isinstance(number, (str, bytes, Tensor)) or getattr(number, "ndim", 0) != 0
    if several or not hasattr(number, "__float__"):
        raise TypeError(f"{name} is {number!r}, must be a number")


def check_device(name: str, tensor: Tensor, q: Tensor, like: str = "q") -> None:
    """`like`: the name of the tensor q."""
    check_tensor(name, tensor)
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, must be on {q.device} like {like}")


def check_like(name: str, tensor: Tensor, q: Tensor, like: str = "q") -> None:
    """`like`: the name of the tensor q."""
    check_device(name, tensor, q, like)
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, must be {q.dtype} like {like}")


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, must be a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, must be torch.strided")
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor, must be one of a single shape")


def check_alone(name: str, tensor: Tensor, layout: tuple[str, ...]) -> None:
    check_tensor(name, tensor)
    _check_dims(name, tensor, layout)
    device = tensor.device.type
    allowed = _GPU_DTYPES if device == "cuda" else _CPU_DTYPES
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, must be {_names_of(allowed)} on {device}"
        )
    check_layout(name, tensor, layout)


def _check_dims(name: str, tensor: Tensor, layout: tuple[str, ...]) -> None:
    if tensor.dim() != len(layout):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, must have {len(layout)} dimensions: "
            f"({', '.join(layout)})"
        )


def check_layout(name: str, tensor: Tensor, layout: tuple[str, ...]) -> None:
    """Sizes and strides of a tensor of any dtype."""
    _check_dims(name, tensor, layout)
    if tensor.device.type == "cuda" and any(
        isinstance(n, int) and n >= _SIZE_LIMIT for n in tensor.shape
    ):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, each size must be below 2^31")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}, its last dimension (head_dim) must be "
            "contiguous (stride 1)"
        )


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    check_device("sinks", sinks, q)
    allowed = _SINK_DTYPES if q.device.type == "cuda" else _CPU_DTYPES
    if sinks.dtype not in allowed:
        raise TypeError(
            f"sinks has dtype {sinks.dtype}, must be {_names_of(allowed)} on {q.device.type}"
        )
    heads = q.shape[-2]
    if sinks.shape != (heads,):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, must be (heads,) = ({heads},), one for each "
            "head of q"
        )


def _names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: tuple[str, ...]) -> None:
    heads, head_dim = q.shape[-2:]
    for name, size in (("q", head_dim), ("v", v.shape[-1])):
        if size % HEAD_DIM_MULTIPLE != 0 or not 0 < size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has head_dim {size}, must be a multiple of {HEAD_DIM_MULTIPLE} "
                f"from {HEAD_DIM_MULTIPLE} to {MAX_HEAD_DIM}"
            )
    if k.shape[-1] != head_dim:
        raise ValueError(f"k has head_dim {k.shape[-1]}, must be {head_dim} like q")
    if v.shape[-3] != k.shape[-3]:
        raise ValueError(f"v has {layout[-3]} {v.shape[-3]}, must be {k.shape[-3]} like k")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v has {v.shape[-2]} heads, must have {k.shape[-2]} like k")
    if heads != 0 and (k.shape[-2] == 0 or heads % k.shape[-2] != 0):
        raise ValueError(f"q has {heads} heads, must be a multiple of k's {k.shape[-2]}")


def _check_rows(q: Tensor, k: Tensor, layout: tuple[str, ...]) -> None:
    rows = q.shape[-3] + k.shape[-3]
    if q.device.type == "cuda" and isinstance(rows, int) and rows >= ROWS_LIMIT:
        raise ValueError(
            f"q has {layout[-3]} {q.shape[-3]} and k {k.shape[-3]}, together they must be below "
            "2^31 - 2^10"
        )


def _check_batch(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]}, must be {q.shape[0]} like q")
