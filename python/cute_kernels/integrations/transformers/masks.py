"""What a model's mask says, as the kernels take it.

transformers describes a mask by a function of indices, a composition of few parts. Here it is read
part by part; one with a part that is not known becomes the 4D mask of "sdpa". What was read goes to
the layers in a tensor, as `encode` has it: whatever carries masks around (gradient
checkpointing, compilers, hooks that move tensors) carries it, too, and models hand on masks of four
dimensions as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    find_packed_sequence_indices,
    sdpa_mask,
)
from transformers.utils.import_utils import is_fake_tensor

from cute_kernels.torch_private import is_exporting

MaskFunction = Callable[..., Any]


class Pattern(NamedTuple):
    """What a mask function hides, beside what is padding."""

    causal: bool = False
    window: bool = False  # of config.sliding_window
    width: int = 0  # of the window, by the distance of keys that it still shows
    chunk: int | None = None  # queries see only their own chunk of so many keys
    packed: Tensor | None = None  # (batch, seqlen): of which sequence a token is
    restarts: bool = False  # chunks are counted from each packed sequence's first key


class Lengths(NamedTuple):
    """Sequences that lie one behind the other in (batch * seqlen, heads, head_dim): arguments of
    `flash_attn_varlen_func`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None


class Ends(NamedTuple):
    """Where the keys of each sequence of a batch start and stop: (batch,), int32."""

    starts: Tensor
    stops: Tensor


class Seen(NamedTuple):
    """Which keys a call's queries see: of the first `keys`, or of the lengths' own."""

    causal: bool
    left: int | None  # how far back, and where it is not causal also ahead; None: no window
    keys: int
    chunk: int | None = None  # only keys of the query's own chunk of so many
    lengths: Lengths | None = None
    ends: Ends | None = None  # the same as lengths, of sequences that are a row of the batch each

    def is_square_causal(self, queries: int) -> bool:
        """Whether PyTorch's `is_causal` says it all."""
        limits = (self.left, self.chunk, self.lengths)
        return self.causal and self.keys == queries and all(x is None for x in limits)


def encode(
    causal: bool,
    window: bool,
    chunk: bool,
    keys: int,
    lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """A mask that says what `Seen` does, for `decode`.

    Args:
        window, chunk: whether there is one, of the config's width.
        keys: how many are seen, without `lengths`.
        lengths: (4 or 6, sequences + 1), int32: rows as in `Lengths`, the last two with an entry
            too many; then perhaps as in `Ends`, with two.

    Returns:
        (rows, sequences + 1 or keys, 1 + causal, 1 + window + 2 chunk), int32.
    """
    flags = (1 + causal, 1 + window + 2 * chunk)
    if lengths is None:
        return torch.empty((0, keys, *flags), dtype=torch.int32, device=device)
    return lengths[:, :, None, None].expand(-1, -1, *flags)


def decode(
    mask: Tensor, kv_length: int, window: int | None = None, chunk: int | None = None
) -> Seen | Tensor:
    """What `encode` made the mask of; the mask itself if it is another one.

    Args:
        kv_length: of the call.
        window, chunk: as wide as the config has them.

    Raises:
        ValueError: there is one, and its width is None.
    """
    if mask.dtype != torch.int32 or mask.dim() != 4:
        return mask
    rows, entries, causal, limits = mask.shape
    has_window, has_chunk = (limits - 1) % 2 == 1, limits > 2
    for name, there, width in (
        ("sliding_window", has_window, window),
        ("attention_chunk_size", has_chunk, chunk),
    ):
        if there and width is None:
            raise ValueError(
                f"the mask is one of a {name}, but neither the layer nor its config says how wide"
            )
    left = None
    if has_window and window is not None:
        left = window - 1 if causal == 2 else window
    lengths = of_batch = None
    if rows > 0:
        starts_q, starts_k, used_q, used_k, *ends = mask[:, :, 0, 0].contiguous().unbind()
        lengths = Lengths(starts_q, starts_k, used_q[:-1], used_k[:-1])
        of_batch = Ends(ends[0][:-2], ends[1][:-2]) if ends else None
    keys = kv_length if rows > 0 else entries
    return Seen(causal == 2, left, keys, chunk if has_chunk else None, lengths, of_batch)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """A mask function of transformers' AttentionMaskInterface: None where `attention` needs no
    mask, what `encode` gives, or the mask of "sdpa".

    In a forward pass it waits for a GPU once at most, as transformers' own for "sdpa" does.
    """
    call = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if is_exporting():
        return mask_without_breaks(*call, **options)
    if torch.compiler.is_compiling() and not _is_plain(*call):
        return _outside_graphs(*call, **options)
    return _read(*call, **options)


def mask_without_breaks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """`mask` that compilers can trace to its end."""
    call = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    if torch.compiler.is_compiling() and not _is_plain(*call):
        return _mask_of_sdpa(*call, **options)
    return _read(*call, **options)


def _is_plain(*call: Any) -> bool:
    """Whether `_read` can be traced."""
    *_, mask_function, attention_mask = call
    known = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    return attention_mask is None and known


def _mask_of_sdpa(*call: Any, **options: Any) -> Tensor | None:
    # Always a mask: where there is none, the layers go by their own idea of causal.
    options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    explicit: Tensor | None = sdpa_mask(*call, **options)
    return explicit


def _read(*call: Any, **options: Any) -> Tensor | None:
    _, q_length, kv_length, q_offset, kv_offset, mask_function, padding = call
    pattern = None if options.get("use_vmap") else _pattern(mask_function)
    if pattern is None or not _is_readable(padding, q_offset, kv_offset, pattern.packed):
        return _mask_of_sdpa(*call, **options)
    chunk = pattern.chunk is not None and not _is_one_chunk(pattern.chunk, kv_offset, kv_length)
    if chunk and not (isinstance(kv_offset, int) and kv_offset == 0):
        return _mask_of_sdpa(*call, **options)  # keys are counted from the first that there was
    if chunk and pattern.packed is not None and not pattern.restarts:
        return _mask_of_sdpa(*call, **options)  # so counts transformers up to 5.17, at least
    window = pattern.window and kv_length > pattern.width + 1
    if window and not pattern.causal and q_length != kv_length:
        return _mask_of_sdpa(*call, **options)
    device = torch.device(options.get("device", "cpu"))
    used = _used(call, pattern, window, device)
    if used is None:
        return _mask_of_sdpa(*call, **options)
    keys, lengths = used
    kind = "causal" if pattern.causal else "bidirectional"
    may_skip = options.get(f"allow_is_{kind}_skip", kind == "causal")
    if may_skip and not window and not chunk and lengths is None and keys == kv_length:
        return None
    return encode(pattern.causal, window, chunk, keys, lengths, device)


def _is_one_chunk(chunk: int, kv_offset: int | Tensor, kv_length: int) -> bool:
    return isinstance(kv_offset, int) and kv_offset + kv_length <= chunk


_disable: Callable[..., Callable[..., Tensor | None]] = torch.compiler.disable
_outside_graphs = _disable(
    _read, reason="the sequences of a padded or packed batch are looked for outside of graphs"
)


def _pattern(function: MaskFunction) -> Pattern | None:
    """What a mask function of transformers is composed of; None if a part is not known."""
    if function is causal_mask_function:
        return Pattern(causal=True)
    if function is bidirectional_mask_function:
        return Pattern()
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or function.__module__ != causal_mask_function.__module__:
        return None
    values = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    match function.__qualname__.partition(".")[0], values:
        case "and_masks", {"mask_functions": parts}:
            return _all_of([_pattern(part) for part in parts])
        case "sliding_window_overlay", {"sliding_window": int(width)}:
            return Pattern(window=True, width=width - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(width)}:
            return Pattern(window=True, width=width)
        case "chunked_overlay", {"chunk_size": int(chunk)}:
            return Pattern(chunk=chunk)
        case "packed_sequence_mask_function", {"packed_sequence_mask": Tensor() as packed}:
            return Pattern(packed=packed)
        case "remap_positions_for_packed_sequence", {"mask_function": remapped}:
            inner = _pattern(remapped)  # positions of one sequence are consecutive
            return None if inner is None else inner._replace(restarts=True)
    return None


def _all_of(parts: list[Pattern | None]) -> Pattern | None:
    known = [part for part in parts if part is not None]
    windows = [part for part in known if part.window]
    if len(known) < len(parts) or len(windows) > 1:
        return None
    return Pattern(
        causal=any(part.causal for part in known),
        window=bool(windows),
        width=windows[0].width if windows else 0,
        chunk=next((part.chunk for part in known if part.chunk is not None), None),
        packed=next((part.packed for part in known if part.packed is not None), None),
        restarts=any(part.restarts for part in known),
    )


def _is_readable(*values: Any) -> bool:
    """Whether tensors among the values have contents."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    return not any(is_fake_tensor(x) or x.device.type == "meta" for x in tensors)


def _used(
    call: Any, pattern: Pattern, window: bool, device: torch.device
) -> tuple[int, Tensor | None] | None:
    """How many keys are used, or the lengths for `encode`; None if the padding is not of the kind
    that lengths can say: before and after a sequence."""
    batch, q_length, kv_length, q_offset, kv_offset, _, padding = call
    if kv_length == 0:
        return None
    if pattern.packed is not None:
        if padding is not None or q_length != kv_length:
            return None
        return kv_length, _lengths_of_packed(pattern.packed.expand(batch, -1).to(device))

    # The first query's place among the keys; static caches keep it on the device.
    first: int | Tensor = q_offset - kv_offset if pattern.causal else 0
    if isinstance(first, Tensor) and q_length > 1 and not torch.compiler.is_compiling():
        first = int(first)  # waits, as transformers does: a cache is filled once
    stop: int | Tensor = first + q_length if pattern.causal else kv_length
    if isinstance(stop, int) and not q_length * pattern.causal <= stop <= kv_length:
        return None
    starts = torch.zeros(batch, dtype=torch.int64, device=device)
    stops = starts + stop
    if padding is not None:
        padding = _on_keys(padding.to(device), kv_length, kv_offset)
        starts, stops, all_used, one_run = _runs(padding, stop)
        if not one_run:
            return None
        if all_used and isinstance(stop, int):
            return stop, None
    elif isinstance(stop, int):
        return stop, None
    if pattern.causal or window:
        # The queries among these keys, so that the last of both stand at the same place.
        q_starts, q_stops = ((x - first).clamp(0, q_length) for x in (starts, stops))
    else:
        q_starts, q_stops = torch.zeros_like(starts), torch.full_like(stops, q_length)
    row = torch.arange(batch, device=device)
    # A sequence of nothing comes first, for what is before the first one's start.
    rows = (
        _with_ends(q_starts + row * q_length, batch * q_length),
        _with_ends(starts + row * kv_length, batch * kv_length),
        _with_ends(q_stops - q_starts, 0),
        _with_ends(stops - starts, 0),
        torch.nn.functional.pad(starts, (0, 2)),
        torch.nn.functional.pad(stops, (0, 2)),
    )
    return kv_length, torch.stack(rows).to(torch.int32)


def _on_keys(padding: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """(batch, kv_length): of a 2D mask that begins with the first token, the part of these keys."""
    missing = kv_offset + kv_length - padding.shape[1]
    padding = torch.nn.functional.pad(padding, (0, max(missing, 0)))
    return padding[:, kv_offset : kv_offset + kv_length].bool()


def _runs(padding: Tensor, stop: int | Tensor) -> tuple[Tensor, Tensor, bool, bool]:
    """Where the keys of each sequence start and stop, not beyond `stop`; whether that is all of
    them, and whether those between are keys, too. The last two wait for a GPU."""
    places = torch.arange(padding.shape[1], device=padding.device)
    padding = padding & (places < stop)
    number = padding.sum(1)
    starts = torch.where(number > 0, padding.int().argmax(1), 0)
    stops = torch.where(padding, places + 1, 0).amax(1)
    facts = torch.stack([(number == stop).all(), (stops - starts == number).all()])
    all_used, one_run = facts.tolist()
    return starts, stops, all_used, one_run


def _with_ends(values: Tensor, last: int) -> Tensor:
    """0, the values, last."""
    return torch.nn.functional.pad(torch.nn.functional.pad(values, (1, 0)), (0, 1), value=last)


def _lengths_of_packed(packed: Tensor) -> Tensor | None:
    """For `encode`, of a number for each token, which changes where a sequence begins; None if each
    row is one. Waits for a GPU."""
    begins = torch.nn.functional.pad(packed[:, 1:] != packed[:, :-1], (1, 0), value=True)
    starts = begins.flatten().nonzero().flatten()
    if starts.shape[0] == packed.shape[0]:
        return None
    starts = torch.nn.functional.pad(starts, (0, 1), value=packed.numel())
    used = torch.nn.functional.pad(starts.diff(), (0, 1))
    return torch.stack([starts, starts, used, used]).to(torch.int32)


class _Positions:
    """Remembers the last position_ids: all layers of a model are given the same."""

    def __init__(self) -> None:
        # One object, as other threads may ask about others: the tensor, its version, the answer.
        self._last: tuple[Callable[[], Tensor | None], int, Lengths | None] = (
            lambda: None,
            0,
            None,
        )

    def lengths(self, position_ids: Tensor) -> Lengths | None:
        if position_ids.is_inference():  # has no version, so that it may be another one by now
            return self._look(position_ids)
        last, version, lengths = self._last
        if last() is not position_ids or version != position_ids._version:
            version, lengths = position_ids._version, self._look(position_ids)
            self._last = weakref.ref(position_ids), version, lengths
        return lengths

    def _look(self, position_ids: Tensor) -> Lengths | None:
        packed = find_packed_sequence_indices(position_ids)
        rows = None if packed is None else _lengths_of_packed(packed)
        return None if rows is None else Lengths(rows[0], rows[1])


_positions = _Positions()


def packed_by_positions(position_ids: Tensor, query: Tensor, keys: int) -> Lengths | None:
    """The sequences of a batch of one row; None if it is one, or where nobody may wait for a GPU.

    Waits for a GPU once in a forward pass of a model.
    """
    queries = query.shape[2]
    if torch.compiler.is_compiling() or queries == 1 or queries != keys:
        return None
    if position_ids.shape != (1, queries) or query.shape[0] != 1 or not _is_readable(position_ids):
        return None
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return _positions.lengths(position_ids)
