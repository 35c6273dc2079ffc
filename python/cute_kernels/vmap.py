"""torch.func.vmap of attention: the mapped dimension becomes part of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

Rule = Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]


def fold_into_batch(
    call: Callable[..., tuple[Tensor, ...]], check: Callable[..., None], sinks: int
) -> Rule:
    """The vmap rule of a call whose tensors, given and returned, all have the batch first, but for
    the sinks, which have none: those of a whole batch are the same.

    Args:
        call: what is mapped over.
        check: raises unless one of the mapped calls can be answered; takes what `call` takes.
        sinks: which input they are.
    """

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any, **keywords: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        if in_dims[sinks : sinks + 1] not in ((), (None,)):
            raise NotImplementedError(
                "flash_attn_func has no rule for torch.func.vmap over sinks: map over the other "
                "tensors, or call it once for each of the sinks"
            )
        own = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and i != sinks}
        mapped = {i: _mapped_first(x, in_dims[i], info.batch_size) for i, x in own.items()}
        check(*(_one(mapped[i]) if i in mapped else x for i, x in enumerate(inputs)), **keywords)
        folded = (mapped[i].flatten(0, 1) if i in mapped else x for i, x in enumerate(inputs))
        outputs = call(*folded, **keywords)
        batch = next(iter(mapped.values())).shape[1]
        apart = tuple(x.reshape(info.batch_size, batch, *x.shape[1:]) for x in outputs)
        return apart, (0,) * len(apart)

    return rule


def refuse_vmap(
    call: Callable[..., tuple[Tensor, ...]], check: Callable[..., None], sinks: int
) -> Rule:
    """The vmap rule of calls on packed sequences, of which each has lengths of its own."""

    def rule(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(
            "flash_attn_varlen_func has no rule for torch.func.vmap, which jacrev and per-sample "
            "gradients use too: pack the sequences of all mapped calls into one call"
        )

    return rule


def _mapped_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """x with the mapped dimension in front, repeated where x has none. Which dimensions of a
    mapped tensor lie side by side its user does not see: the last ones do afterwards."""
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped if mapped.stride(-1) == 1 else mapped.contiguous()


def _one(mapped: Tensor) -> Tensor:
    """A tensor of one of the mapped calls, though there be none."""
    return mapped[0] if mapped.shape[0] > 0 else mapped.new_empty(mapped.shape[1:])
