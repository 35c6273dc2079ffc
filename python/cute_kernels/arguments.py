"""Arguments of functions that operators do not have, or not so: FlashAttention-3's windows and
hints, flags, combinations that are not there yet, names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from cute_kernels.checks import INTS, check_flag, check_int, check_sm_margin

Window = Sequence[int | None] | Tensor | None

_NO_LIMIT = 2**31  # sizes are below it


def refuse_for_fp8(**asked: bool) -> None:
    """Raises NotImplementedError if one of what calls of float8_e4m3fn do not have is asked."""
    for name, is_asked in asked.items():
        if is_asked:
            raise NotImplementedError(
                f"{name} is not there for float8_e4m3fn: pass q, k and v of 16 bits"
            )


def refuse_with_variant(**asked: bool) -> None:
    """Raises NotImplementedError if one of what calls with a variant do not take is asked."""
    for name, is_asked in asked.items():
        if is_asked:
            raise NotImplementedError(f"{name} is not there with a variant, whose hooks can do it")


def check_hints(num_splits: int, pack_gqa: bool | None, sm_margin: int) -> None:
    """What may change how a result is computed, but not the result."""
    check_int("num_splits", num_splits, least=0, none="")
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        raise TypeError(f"pack_gqa is {pack_gqa!r}, must be True, False or None")
    check_sm_margin(sm_margin)


def check_flags(**flags: object) -> None:
    """Those of a function: operators take whatever is true or false, and wait for a tensor's
    value."""
    for name, flag in flags.items():
        check_flag(name, flag)


def window_of(window_size: Window, causal: bool) -> tuple[bool, int | None, int | None]:
    """causal, window_left and window_right as the operators take them.

    None is no limit. A window that ends at the query itself is causal, so that what is a call with
    a causal mask alone looks like one.
    """
    check_flag("causal", causal)
    if window_size is None:
        return causal, None, None
    limits: Any = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if isinstance(limits, (str, bytes)) or not isinstance(limits, Sequence):
        _refuse_window(TypeError, window_size)
    if len(limits) != 2:
        _refuse_window(ValueError, window_size)
    for limit in limits:
        if limit is not None and not isinstance(limit, INTS):
            _refuse_window(TypeError, window_size)
        if limit is not None and limit < -1:
            _refuse_window(ValueError, window_size)
    left, right = (None if n is None or n == -1 or n >= _NO_LIMIT else _int(n) for n in limits)
    causal = causal or right == 0
    return causal, left, None if causal else right


def _int(number: Any) -> Any:
    return number if isinstance(number, (int, torch.SymInt)) else int(number)


def _refuse_window(error: type[Exception], window_size: Any) -> NoReturn:
    raise error(
        f"window_size is {window_size!r}, must be two ints (left, right) of at least 0, or -1 for "
        "no limit"
    )


def renamed(error: Exception, names: dict[str, str]) -> Exception:
    """The error of a function that was called, with the caller's names of its arguments."""
    pattern = rf"\b({'|'.join(names)})\b"
    return type(error)(re.sub(pattern, lambda name: names[name[0]], str(error)))
