"""What is timed in a case of bench.variants: all candidates, and what each of them should give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import vllm_library
from bench.cells import Cell
from bench.check import Options
from bench.providers import OURS, Provider, fa4_options, library_of
from bench.variant_cells import FORWARD, Case
from bench.variant_rules import Rule, packed_call, rule_of
from cute_kernels import BlockMask, __version__, flash_attn_func
from cute_kernels.variants.kernels import load, rows_of

FLEX, FA3, FA4 = "flex-attention", "fa3-vllm", "fa4"
LIBRARY = f"{OURS}:library"  # the same attention without hooks
PLAIN = f"{OURS}:no-blocks"  # hooks, and no block mask
BLOCKS = f"{OURS}:blocks"  # with one, which the call does not need
WITHOUT = f"{OURS}:without"  # another attention: without what the case is about
PACKED = f"{OURS}:packed"


class Candidate(NamedTuple):
    """`options`: what it should give, as references take them."""

    provider: Provider
    options: Options


@dataclass(frozen=True)
class Problem:
    case: Case
    pairs: int
    candidates: list[Candidate]


def compiled_flex_attention() -> Callable[..., Tensor]:
    """Once for each case and pass: more often than Dynamo would compile one function, and with
    gradients that are asked for again and again."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def heads_first(x: Tensor) -> Tensor:
    """(batch, seqlen, heads, head_dim) as FlexAttention would have it, and back."""
    return x.transpose(1, 2).contiguous()


def _ours(name: str, label: str, function: Callable[..., Tensor], *parameters: Tensor) -> Provider:
    return Provider(
        name=name,
        label=f"cute_kernels{label}",
        version=f"cute_kernels {__version__}",
        function=lambda cell: function,
        parameters=parameters,
    )


def of_rule(
    case: Case, rule: Rule, seqlen: int, device: str, peers: Iterable[str], fa4: Any = None
) -> Problem:
    """Hooks with and without a block mask, FlexAttention, FlashAttention-4 (None: without it), and
    the library without hooks."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch = case.batch if rule.of_batch else None
    blocks = create_block_mask(rule.mask, batch, None, seqlen, seqlen, device=device)
    call = partial(flash_attn_func, causal=rule.causal, variant=rule.bound)
    with_blocks = partial(call, block_mask=BlockMask.from_torch(blocks))
    if rule.score is None:
        ours = [_ours(OURS, "", with_blocks), _ours(PLAIN, ", no block mask", call)]
    else:
        ours = [_ours(OURS, "", call), _ours(BLOCKS, ", with a block mask", with_blocks)]
    if rule.library:
        ours.append(_ours(LIBRARY, " without hooks", rule.library))
    candidates = [Candidate(provider, rule.options) for provider in ours]
    if rule.without:
        provider = _ours(WITHOUT, ", no variant", rule.without)
        candidates.append(Candidate(provider, partial(rule.options, score=False)))
    if FLEX in peers:
        flex = compiled_flex_attention()
        provider = Provider(
            name=FLEX,
            label="FlexAttention",
            version=f"torch {torch.__version__}",
            function=lambda cell: partial(flex, score_mod=rule.score, block_mask=blocks),
            arrange=heads_first,
        )
        candidates.append(Candidate(provider, rule.options))
    if fa4 is not None:
        from bench import fa4_rules

        function = fa4_rules.call(case.rule, list(rule.tensors), blocks)
        provider = Provider(FA4, "FA4 (CuTe DSL)", fa4[1], lambda cell: function)
        candidates.append(Candidate(provider, rule.options))
    return Problem(case, rule.pairs(case.batch, seqlen, device), candidates)


def of_arguments(case: Case, seqlen: int, device: str, fa3: Any, fa4: Any = None) -> Problem:
    """Softcap or sinks, by dense and packed calls, beside FlashAttention-3 and 4 (None: without
    it), and what they cost."""
    starts = torch.arange(0, (case.batch + 1) * seqlen, seqlen, dtype=torch.int32, device=device)
    sinks, parameters = None, ()
    if case.sinks:  # numbers that FlashAttention-3's bfloat16 has, too
        generator = torch.Generator().manual_seed(0)
        sinks = torch.randn(case.heads, generator=generator).bfloat16().float().to(device)
        parameters = (sinks.requires_grad_(),)
    plain = {"causal": True, "window_size": case.window_size}
    full = {**plain, "softcap": case.softcap, "sinks": sinks}

    def options(batches: slice, heads: slice) -> dict[str, Any]:
        return {**full, "sinks": None if sinks is None else sinks.detach()[heads]}

    dense, packed = partial(flash_attn_func, **full), packed_call(starts, seqlen, **full)
    ours = [
        _ours(OURS, "", dense, *parameters),
        _ours(PACKED, ", packed", packed, *parameters),
    ]
    candidates = [Candidate(provider, options) for provider in ours]
    without = _ours(WITHOUT, ", no softcap, no sinks", partial(flash_attn_func, **plain))
    candidates.append(Candidate(without, lambda batches, heads: plain))
    if fa3 is not None:
        function = _fa3_call(fa3, case, starts, seqlen, sinks)
        provider = Provider(
            name=FA3,
            label="FA3 (vLLM)",
            version="_vllm_fa3_C",
            function=lambda cell: function,
            takes=_is_forward,
        )
        candidates.append(Candidate(provider, options))
    if fa4 is not None:
        module, version = fa4
        theirs = None if sinks is None else sinks.detach().bfloat16().requires_grad_()
        function = partial(
            module.flash_attn_func,
            learnable_sink=theirs,
            **fa4_options(**plain, softcap=case.softcap),
        )
        provider = Provider(
            name=FA4,
            label="FA4 (CuTe DSL)",
            version=version,
            function=lambda cell: function,
            parameters=() if theirs is None else (theirs,),
        )
        candidates.append(Candidate(provider, options))
    return Problem(case, case.batch * _pairs(seqlen, case.window_size[0]), candidates)


def _fa3_call(
    fa3: Any, case: Case, starts: Tensor, seqlen: int, sinks: Tensor | None
) -> Callable[..., Tensor]:
    """Of dense q, k and v."""
    options = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": seqlen,
        "max_seqlen_k": seqlen,
        "window_size_left": case.window_size[0],
        "window_size_right": case.window_size[1],
        "softcap": case.softcap,
        "s_aux": None if sinks is None else sinks.detach().to(torch.bfloat16),
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return vllm_library.attention(fa3, *rows, **options).unflatten(0, q.shape[:2])

    return call


def _is_forward(cell: Cell) -> bool:
    return cell.of_pass == FORWARD


def _pairs(seqlen: int, left: int) -> int:
    """What queries see of as many keys: at most `left` before their own one, if that is at least
    0."""
    width = seqlen if left < 0 else min(left + 1, seqlen)
    return width * (width + 1) // 2 + (seqlen - width) * width


def load_fa3(path: Any) -> Any:
    """The operators of vLLM's library. Raises Unavailable."""
    operators, _ = library_of(
        path, vllm_library.VARIABLE, vllm_library.HOW_TO_GET, vllm_library.load_attention
    )
    return operators


def rules_of(cases: Iterable[Case], seqlen: int, device: str) -> dict[str, Rule]:
    """By the name of the case."""
    return {
        case.name: rule_of(case.rule, case.batch, case.heads, seqlen, device)
        for case in cases
        if case.rule
    }


def kernels(
    cases: Iterable[Case], rules: dict[str, Rule], dtype: torch.dtype, gradient: bool
) -> list[dict[str, Any]]:
    """The rows that all variants of the cases need, with block masks and without."""
    rows = {}
    for case in cases:
        if case.name not in rules:
            continue
        for block_mask in (False, True):
            key = rules[case.name].bound.variant.hooks_of(block_mask).key
            for row in rows_of(key, dtype, case.head_dim, gradient):
                rows[row["name"]] = row
    return list(rows.values())


def compile_kernels(rows: list[dict[str, Any]]) -> None:
    """In parallel, where the cache has them not."""
    load(rows)
