"""A row of the table of tiles, written in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .passes import PASSES
from .table import TableError, complete, kernel_row, problems


@dataclass(frozen=True, init=False, repr=False)
class TileConfig:
    """One kernel: a pass, a dtype, and how its tiles are cut.

    The columns are those of the table of tiles, whose head explains them
    (cute_kernels/attention/tile_configs.toml); columns that are left out have the table's defaults.

    Args:
        of_pass: "forward", "backward" or "forward_fp8".
        name: lower case letters, digits and ``_``; what ``tile_config=`` of a call takes.
        dtype: "bf16" or "fp16"; of "forward_fp8" that of Q and K, "e4m3" or "int8".
        columns: ``head_dim``, ``tile_m``, ``tile_n`` and what else the pass has.

    Raises:
        ValueError: the columns make no kernel; the message has every reason, with the arithmetic
            of shared memory and registers.
        TypeError: an argument has the wrong type.
    """

    _columns: tuple[tuple[str, Any], ...]

    def __init__(self, of_pass: str, *, name: str, dtype: str, **columns: Any) -> None:
        for argument, value in (("of_pass", of_pass), ("name", name), ("dtype", dtype)):
            if not isinstance(value, str):
                raise TypeError(f"{argument} is {value!r}, must be a str")
        if of_pass not in PASSES:
            raise ValueError(f"of_pass is {of_pass!r}, must be one of {', '.join(PASSES)}")
        pass_, where = PASSES[of_pass], f"{of_pass} row {name}"
        given = {"why": "of the user's own", **columns, "name": name, "dtypes": [dtype]}
        row = complete(given, where, pass_)
        if found := problems(row, pass_):
            raise TableError("\n".join(f"{where}: {problem}" for problem in found))
        columns = {**kernel_row(row, dtype, pass_), "name": name}
        object.__setattr__(self, "_columns", tuple(columns.items()))

    @property
    def name(self) -> str:
        return str(self.as_dict()["name"])

    def as_dict(self) -> dict[str, Any]:
        """The row as ``cute_kernels.tile_configs`` lists it, a copy."""
        return dict(self._columns)

    def __repr__(self) -> str:
        row = self.as_dict()
        pass_ = PASSES[row["pass"]]
        shown = ["name", "dtype", *(field.name for field in pass_.fields if field.name in row)]
        inside = ", ".join(f"{key}={row[key]!r}" for key in dict.fromkeys(shown))
        return f"TileConfig({pass_.name!r}, {inside})"
