"""A user's variant of attention: its definition, and the definition with what it reads."""

from __future__ import annotations

import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cute_kernels.checks import MAX_HEAD_DIM, check_int
from cute_kernels.compile.hooks import (
    COORDINATES,
    CPP_TYPES,
    FACTS,
    KNOWN,
    MOST_AXES,
    MOST_CAPTURED,
    RESERVED,
    Hooks,
)
from cute_kernels.compile.hooks import Tensor as Declared
from cute_kernels.variants.kernels import load, rows_of

DTYPES = {getattr(torch, name): name for name in CPP_TYPES}
_NUMBER_TYPES = {int: "int32", float: "float32"}
_HOOKS = ("score", "mask", "weight")

Declaration = tuple[Any, ...]


class Variant:
    """What a call changes of attention: the scores, which keys a query sees, how P is weighed.

    The hooks are bodies of C++ functions, compiled with the kernels on this machine when a call on
    CUDA first needs them (see `add_tile_config`), and Python functions for the CPU. What they may
    use, examples and costs are in docs/variants.md.

    Args:
        name: lower case letters, digits and ``_``; of kernels and messages.
        score: from ``score``, the product of query and key times softmax_scale, another one.
        mask: whether the query sees the key. What causal and window_size hide stays hidden.
        weight: what P is multiplied by after the row sums: the LSE has no weights. At most 15 in
            float16.
        tensors: by the name that hooks read it by, dtype and axes of each, such as ``("float32",
            "head")``. Axes are "batch", "head", "query", "key", "query_row", "key_row", a size, or
            None for any size; at most 4. A size of 1 of a coordinate is the same for all of it. A
            hook reads ``bias[head][query][key]``; indices outside of an axis mean the nearest one
            inside.
        numbers: by name, int or float.
        score_gradient: the derivative of `score` with respect to it, instead of what compiling
            `score` for dual numbers makes of it.
        score_python, mask_python, weight_python: the same for the CPU, functions of tensors that
            broadcast, whose parameters are any of the names that the C++ may use.

    Raises:
        ValueError: a name is taken or no name, a declaration makes no sense, there is no hook.
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        name: str,
        *,
        score: str | None = None,
        mask: str | None = None,
        weight: str | None = None,
        tensors: Mapping[str, Declaration] | None = None,
        numbers: Mapping[str, type] | None = None,
        score_gradient: str | None = None,
        score_python: Callable[..., Tensor] | None = None,
        mask_python: Callable[..., Tensor] | None = None,
        weight_python: Callable[..., Tensor] | None = None,
    ) -> None:
        _check_identifier("name", name, r"[a-z][a-z0-9_]*")
        bodies = {"score": score, "mask": mask, "weight": weight, "score_gradient": score_gradient}
        for hook, body in bodies.items():
            if body is not None and not isinstance(body, str):
                raise TypeError(f"{hook} is a {type(body).__name__}, must be a str or None")
        self.python = {"score": score_python, "mask": mask_python, "weight": weight_python}
        if not any((*bodies.values(), *self.python.values())):
            raise ValueError(f"variant {name} has no hook: give it score, mask or weight")
        if score_gradient is not None and score is None:
            raise ValueError("score_gradient is given, but there is no score")
        self.hooks = Hooks(
            name,
            score,
            mask,
            weight,
            score_gradient,
            _declared_tensors(tensors or {}),
            _declared_numbers(numbers or {}),
        )
        names = [*(tensor.name for tensor in self.hooks.tensors), *dict(self.hooks.numbers)]
        for captured in names:
            _check_identifier("a captured value", captured, r"[A-Za-z_][A-Za-z0-9_]*")
            if captured in RESERVED or names.count(captured) > 1:
                raise ValueError(f"{captured!r} cannot name a captured value: it is taken")
        for hook, function in self.python.items():
            _check_function(f"{hook}_python", function, names, hook == "score")
        self._make_known()

    def _make_known(self) -> None:
        of_both = [self.hooks_of(block_mask) for block_mask in (False, True)]
        # Compilers do not trace how a key is made.
        self._keys = [hooks.key for hooks in of_both]
        for key, hooks in zip(self._keys, of_both, strict=True):
            KNOWN.setdefault(key, hooks)

    @property
    def name(self) -> str:
        return self.hooks.name

    def hooks_of(self, block_mask: bool) -> Hooks:
        """Those of the kernels of calls with or without a block mask."""
        return self.hooks._replace(block_mask=block_mask)

    def key_of(self, block_mask: bool) -> str:
        """That of these hooks."""
        return self._keys[1 if block_mask else 0]

    def __call__(self, **captured: Tensor | float) -> BoundVariant:
        """The variant with what its hooks read, as calls take it.

        Raises:
            TypeError: a tensor or number is missing, of the wrong type, or not declared.
        """
        return BoundVariant(self, captured)

    def compile(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *,
        gradient: bool = True,
        of: Sequence[str] = (),
        block_mask: bool = False,
    ) -> list[str]:
        """Compiles kernels ahead of the first call, and adds them to this process.

        Args:
            dtype: float16 or bfloat16.
            head_dim: the larger one of q and v.
            gradient: also the backward kernel.
            of: the captured tensors that it computes gradients of.
            block_mask: the kernels of calls with a block mask, which are others.

        Returns:
            The names of the kernels.

        Raises:
            ValueError, TypeError: an argument is not as described.
            RuntimeError: as `add_tile_config`; what the compiler says names the hook and its line.
            NotImplementedError: there is no such gradient.
        """
        if dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"dtype is {dtype!r}, must be torch.float16 or torch.bfloat16")
        check_int("head_dim", head_dim, least=1, none="")
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim is {head_dim}, must be at most {MAX_HEAD_DIM}")
        declared = [tensor.name for tensor in self.hooks.tensors]
        if wrong := [name for name in of if name not in declared]:
            raise ValueError(f"of has {wrong[0]!r}, must be of {_listed(declared)}")
        rows = rows_of(self.key_of(block_mask), dtype, head_dim, gradient, of)
        load(rows)
        return [row["name"] for row in rows]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of pickle: another process has to know the hooks, too."""
        self.__dict__.update(state)
        self._make_known()

    def __repr__(self) -> str:
        return f"Variant({self.name!r})"


class BoundVariant:
    """A variant with its tensors and numbers: what ``variant=`` of a call takes."""

    def __init__(self, variant: Variant, captured: Mapping[str, Any]) -> None:
        self.variant = variant
        hooks = variant.hooks
        declared = [*(tensor.name for tensor in hooks.tensors), *dict(hooks.numbers)]
        if wrong := [name for name in captured if name not in declared]:
            raise TypeError(f"variant {variant.name} has no {wrong[0]}; it has {_listed(declared)}")
        if missing := [name for name in declared if name not in captured]:
            raise TypeError(f"variant {variant.name} needs {_listed(missing)}")
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []
        for tensor in hooks.tensors:
            value = captured[tensor.name]
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{tensor.name} is a {type(value).__name__}, must be a torch.Tensor"
                )
            self.tensors.append(value)
        for name, dtype in hooks.numbers:
            value = captured[name]
            allowed: Any = numbers.Integral if dtype == "int32" else numbers.Real
            if not isinstance(value, allowed) or isinstance(value, bool):
                kind = "an int" if dtype == "int32" else "a number"
                raise TypeError(f"{name} is {value!r}, must be {kind}")
            if dtype == "int32" and not -(2**31) <= value < 2**31:
                raise ValueError(f"{name} is {value}, must be an int of 32 bits")
            self.numbers.append(int(value) if dtype == "int32" else _float32(name, value))

    def with_tensors(self, tensors: list[Tensor]) -> BoundVariant:
        """The same with other ones."""
        other = object.__new__(type(self))  # torch 2.11 cannot trace copy.copy
        other.variant, other.tensors, other.numbers = self.variant, tensors, self.numbers
        return other

    def captured(self) -> dict[str, Any]:
        """By name."""
        hooks = self.variant.hooks
        names = [*(tensor.name for tensor in hooks.tensors), *dict(hooks.numbers)]
        return dict(zip(names, [*self.tensors, *self.numbers], strict=True))

    def __repr__(self) -> str:
        return f"{self.variant!r}(...)"


def bound(variant: object) -> BoundVariant:
    """The argument `variant` of a call. Raises TypeError."""
    if isinstance(variant, Variant):
        return variant()
    if not isinstance(variant, BoundVariant):
        raise TypeError(
            f"variant is a {type(variant).__name__}, must be a cute_kernels.Variant, called with "
            "the tensors and numbers that it has"
        )
    return variant


def _float32(name: str, value: Any) -> float:
    """The number, or while compilers trace what stands for it. Raises ValueError if a float of 32
    bits cannot be as large."""
    largest = torch.finfo(torch.float32).max
    try:
        number = float(value)
    except OverflowError:
        number = sys.float_info.max  # of either sign
    if type(number) is float and math.isfinite(number) and abs(number) > largest:
        raise ValueError(f"{name} is {value}, must be from {-largest} to {largest}")
    return number


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "neither tensors nor numbers"


def _check_identifier(what: str, name: object, pattern: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} is {name!r}, must be a str")
    if not re.fullmatch(pattern, name):
        raise ValueError(f"{what} is {name!r}, must match {pattern}")


def _declared_tensors(tensors: Mapping[str, Declaration]) -> tuple[Declared, ...]:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors is a {type(tensors).__name__}, must be a dict or None")
    if len(tensors) > MOST_CAPTURED:
        raise ValueError(f"there are {len(tensors)} tensors, must be at most {MOST_CAPTURED}")
    return tuple(_declared(name, declaration) for name, declaration in tensors.items())


def _declared(name: str, declaration: Declaration) -> Declared:
    if not isinstance(declaration, (tuple, list)) or not declaration:
        raise TypeError(f"tensors[{name!r}] is {declaration!r}, must be a tuple of dtype and axes")
    dtype, *axes = declaration
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in CPP_TYPES:
        raise ValueError(f"tensors[{name!r}] has dtype {dtype!r}, must be {', '.join(CPP_TYPES)}")
    if len(axes) > MOST_AXES:
        raise ValueError(f"tensors[{name!r}] has {len(axes)} axes, must be at most {MOST_AXES}")
    for axis in axes:
        is_size = isinstance(axis, int) and not isinstance(axis, bool) and axis > 0
        if axis is not None and axis not in COORDINATES and not is_size:
            raise ValueError(
                f"tensors[{name!r}] has the axis {axis!r}, must be {', '.join(COORDINATES)}, a "
                "size above 0, or None for any"
            )
        if axis in COORDINATES and axes.count(axis) > 1:
            raise ValueError(f"tensors[{name!r}] has the axis {axis!r} more than once")
    return Declared(name, dtype, tuple(axes))


def _declared_numbers(numbers: Mapping[str, type]) -> tuple[tuple[str, str], ...]:
    if not isinstance(numbers, Mapping):
        raise TypeError(f"numbers is a {type(numbers).__name__}, must be a dict or None")
    if len(numbers) > MOST_CAPTURED:
        raise ValueError(f"there are {len(numbers)} numbers, must be at most {MOST_CAPTURED}")
    for name, kind in numbers.items():
        if kind not in _NUMBER_TYPES:
            raise TypeError(f"numbers[{name!r}] is {kind!r}, must be int or float")
    return tuple((name, _NUMBER_TYPES[kind]) for name, kind in numbers.items())


def _check_function(name: str, function: Any, captured: list[str], has_score: bool) -> None:
    if function is None:
        return
    if not callable(function):
        raise TypeError(f"{name} is {function!r}, must be a function or None")
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is {function!r}, whose parameters Python does not know: give a function that "
            "calls it"
        ) from None
    known = {*COORDINATES, *FACTS, *captured, *(("score",) if has_score else ())}
    if unknown := [p for p in parameters if p not in known]:
        raise ValueError(
            f"{name} has the parameter {unknown[0]!r}, must be of {', '.join(sorted(known))}"
        )
