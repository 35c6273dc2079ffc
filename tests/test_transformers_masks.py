"""What the integration with transformers reads from masks, against the explicit ones."""

import pytest
import torch

tiny = pytest.importorskip("tiny_models", reason="needs transformers 5 or newer")
transformers = tiny.transformers
from transformers.masking_utils import (  # noqa: E402
    AttentionMaskInterface,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from cute_kernels import flash_attn_with_kvcache  # noqa: E402
from cute_kernels.integrations.transformers import (  # noqa: E402
    NAME,
    attention,
    fallback,
    masks,
    register,
)

pytestmark = pytest.mark.usefixtures("in_transformers")

SEQLEN = 23

CONFIG = transformers.LlamaConfig(
    **tiny.DECODER, sliding_window=5, attention_chunk_size=7, attn_implementation=NAME
)


def explicit(encoded, queries, keys):
    """(batch, 1, queries, keys) of a mask for our attention."""
    query, key = torch.empty(3, 1, queries, 8), torch.empty(3, 1, keys, 8)
    return fallback._explicit(masks.decode(encoded, keys, 5, 7), query, key)


@pytest.mark.parametrize("seed", range(12))
def test_masks_say_what_explicit_ones_do(seed):
    """Of random padding, lengths and windows, in the rows of what is not padding."""
    chance = torch.Generator().manual_seed(seed)
    for _ in range(8):
        keys, queries = (int(torch.randint(1, n, (), generator=chance)) for n in (24, 12))
        queries = min(queries, keys)
        first, last = torch.randint(0, keys + 1, (2, 3), generator=chance).sort(dim=0).values
        place = torch.arange(keys)[None]
        padding = (place >= first[:, None]) & (place < last[:, None])
        create = (
            create_causal_mask,
            create_sliding_window_causal_mask,
            create_chunked_causal_mask,
        )[seed % 3]
        embeds = torch.empty(3, queries, 0)
        cache = transformers.DynamicCache()
        if keys > queries:
            past = torch.zeros(3, 1, keys - queries, 1)
            cache.update(past, past, 0)
        inputs = (CONFIG, embeds, padding, cache)
        found = create(*inputs)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        right = create(*inputs, allow_is_causal_skip=False)
        register()
        if found is None:
            found = masks.encode(True, False, False, keys, None, torch.device("cpu"))
        assert found.dtype == torch.int32
        kept = padding[:, keys - queries :]
        shown = explicit(found, queries, keys).expand(3, 1, queries, keys)
        assert torch.equal(shown[:, 0][kept], right[:, 0][kept])
        assert not shown[:, 0][~kept].any() or torch.equal(shown, right)


def test_unknown_parts_become_explicit_masks():
    embeds = torch.empty(3, SEQLEN, 0)

    def own(batch, head, query, key):
        return key != 3

    found = create_causal_mask(CONFIG, embeds, None, None, and_mask_function=own)
    assert found.dtype == torch.bool and found.shape[-2:] == (SEQLEN, SEQLEN)
    assert not found[..., 3].any()
    blocks = torch.zeros(3, SEQLEN, dtype=torch.long)
    found = create_causal_mask(CONFIG, embeds, None, None, block_sequence_ids=blocks)
    assert found.dtype == torch.bool and found.all()


def test_another_thread_may_ask_about_other_positions_meanwhile(monkeypatch):
    """DataParallel's replicas are threads."""
    query = torch.empty(1, 1, SEQLEN, 8)
    ours, theirs = (torch.cat([torch.arange(n), torch.arange(SEQLEN - n)])[None] for n in (5, 9))
    reference = masks.weakref.ref

    def after_the_other(position_ids):
        monkeypatch.setattr(masks.weakref, "ref", reference)
        assert starts(theirs) == [0, 9, SEQLEN]
        return reference(position_ids)

    def starts(position_ids):
        return masks.packed_by_positions(position_ids, query, SEQLEN).cu_seqlens_q.tolist()

    monkeypatch.setattr(masks.weakref, "ref", after_the_other)
    for _ in range(2):
        assert starts(ours) == [0, 5, SEQLEN]


def test_positions_are_looked_at_again_after_a_change():
    query = torch.empty(1, 2, SEQLEN, 8)
    position_ids = torch.cat([torch.arange(n) for n in (9, 3, 11)])[None]
    assert masks.packed_by_positions(position_ids, query, SEQLEN).cu_seqlens_q.tolist() == [
        *(0, 9, 12, 23)
    ]
    position_ids.copy_(torch.arange(SEQLEN)[None])
    assert masks.packed_by_positions(position_ids, query, SEQLEN) is None


def test_a_step_of_a_chunked_layer(monkeypatch):
    """Attends to its keys as to a cache, which are cut into parts; chunks begin at the first key
    that is no padding."""
    keys, first, last = 22, torch.tensor([0, 3, 9]), torch.tensor([22, 22, 22])
    place = torch.arange(keys)[None]
    padding = (place >= first[:, None]) & (place < last[:, None])
    cache = transformers.DynamicCache()
    cache.update(*2 * (torch.zeros(3, 1, keys - 1, 1),), 0)
    inputs = (CONFIG, torch.empty(3, 1, 0), padding, cache)
    mask = create_chunked_causal_mask(*inputs)
    query, key, value = (torch.randn(3, 2, n, 8) for n in (1, keys, keys))
    called = []

    def recorded(*inputs, **options):
        called.append(options["attention_chunk"])
        return flash_attn_with_kvcache(*inputs, **options)

    monkeypatch.setattr(attention, "flash_attn_with_kvcache", recorded)
    module = torch.nn.Module()
    module.config, module.is_causal = CONFIG, True
    out, _ = attention.attention(module, query, key, value, mask, scaling=0.3)
    seen = masks.decode(mask, keys, None, 7)
    shown = fallback._explicit(seen, query, key)
    right = torch.nn.functional.scaled_dot_product_attention(query, key, value, shown, scale=0.3)
    torch.testing.assert_close(out.transpose(1, 2), right)
    assert called == [7]
