"""Members of other libraries' enums, which name what those libraries know."""

from __future__ import annotations

from typing import Any


def remove_member(names: Any, member: Any) -> None:
    """Undoes that a member was added to an enum whose class statement had none of it."""
    type.__delattr__(names, member.name)
    names._member_names_.remove(member.name)
    del names._member_map_[member.name], names._value2member_map_[member.value]
