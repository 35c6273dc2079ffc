"""Activation of the integration with PyTorch: what it changes, and that all of it is undone."""

import pytest
import torch
from aten_calls import state_of_dispatcher
from torch.nn import attention

from cute_kernels.integrations import torch as integration
from cute_kernels.integrations import torch_choice


def state():
    """What `activate` changes."""
    order = torch._C._get_sdp_priority_order()
    implementations = attention.list_flash_attention_impls()
    tag = torch.compiler.config.cache_key_tag
    return state_of_dispatcher(), order, implementations, integration.current(), tag


def test_activation_is_undone():
    before = state()
    assert integration.NAME not in before[2]
    for _ in range(2):
        integration.activate()
        integration.activate()
        assert integration.current() == integration.NAME
        overridden, _, implementations, _, tag = state()
        assert tag == before[-1] + "cute_kernels"
        assert all(
            "with_keyset" not in a and a != b for a, b in zip(overridden, before[0], strict=True)
        )
        assert integration.NAME in implementations
        integration.deactivate()
        integration.deactivate()
        assert state() == before


class Implementation:
    """Another, of the registry's kind."""

    active = False

    def __init__(self):
        Implementation.active = True

    def remove(self):
        Implementation.active = False


@pytest.fixture
def another():
    attention.register_flash_attention_impl("another", register_fn=Implementation)
    attention.activate_flash_attention_impl("another")
    yield "another"
    attention.restore_flash_attention_impl()
    torch_choice.forget_implementation("another")


def test_an_implementation_that_was_active_is_active_again(another):
    integration.activate()
    assert not Implementation.active
    integration.deactivate()
    assert Implementation.active and integration.current() == another


def test_an_implementation_that_came_later_stays(another):
    before = state_of_dispatcher()
    integration.activate()
    attention.activate_flash_attention_impl(another)
    assert state_of_dispatcher() == before
    integration.deactivate()
    assert Implementation.active and integration.current() == another


def test_flash_comes_before_cudnn_until_undone():
    given = torch._C._get_sdp_priority_order()
    flash, cudnn = (
        int(getattr(attention.SDPBackend, f"{name}_ATTENTION")) for name in ("FLASH", "CUDNN")
    )
    others = [n for n in given if n not in (flash, cudnn)]
    try:
        torch._C._set_sdp_priority_order([cudnn, flash, *others])
        undo = torch_choice.put_flash_before_cudnn()
        assert torch._C._get_sdp_priority_order() == [flash, cudnn, *others]
        undo()
        assert torch._C._get_sdp_priority_order() == [cudnn, flash, *others]
        undo = torch_choice.put_flash_before_cudnn()
        torch._C._set_sdp_priority_order([*others, flash, cudnn])  # the user's own
        undo()
        torch_choice.put_flash_before_cudnn()()
        assert torch._C._get_sdp_priority_order() == [*others, flash, cudnn]
    finally:
        torch._C._set_sdp_priority_order(given)


def test_caches_of_compilers_are_told_apart_until_undone():
    config = torch.compiler.config
    given = config.cache_key_tag
    try:  # not by monkeypatch, which deletes what such a module's own dictionary does not have
        config.cache_key_tag = "mine"
        undo = torch_choice.tag_caches("ours")
        assert config.cache_key_tag == "mineours"
        undo()
        assert config.cache_key_tag == "mine"
        undo = torch_choice.tag_caches("ours")
        config.cache_key_tag = "another"
        undo()
        assert config.cache_key_tag == "another"
    finally:
        config.cache_key_tag = given


def test_a_torch_without_a_registry_is_named(monkeypatch):
    monkeypatch.delattr(attention, "restore_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"needs torch 2\.11 or newer"):
        integration.activate()
    assert integration.current() is None
