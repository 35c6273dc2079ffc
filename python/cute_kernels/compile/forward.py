"""The rows of 16-bit forward kernels, and of those for many queries to a cache, which are the same
but for their loads and stores."""

from __future__ import annotations

from .rows import (
    ELEMENT_BYTES,
    HEAD,
    REQUIRED,
    SHARED_BYTES,
    WARPGROUP_M,
    WARPGROUP_THREADS,
    WORKING_REGISTERS,
    Field,
    Row,
    aligned,
)

WINDOW_QUERIES = 16  # grouped: of a warpgroup, at most
VALUE_STEP = 16  # keys that WGMMA takes at a time for P V
MAX_BOX_ROWS = 256  # of TMA

FORWARD_FIELDS = (
    *HEAD,
    Field("head_dim_v", int, None, "kHeadDimV"),  # None: head_dim
    Field("any_call", bool, False, "kAnyCall"),
    Field("grouped", bool, False),
    Field("softcap", bool, False),
    Field("mask", str, "any"),
    Field("tile_m", int),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("pingpong", bool, True, "kPingpong"),
    Field("overlap", bool, True, "kOverlap"),
    Field("separate_output", bool, False, "kSeparateOutput"),
    Field("sum_in_pairs", bool, False, "kSumInPairs"),
    Field("speed", float, 1.0),
    Field("overhead", int, 0),
    Field("why", str),
)
PREFILL_FIELDS = (
    *HEAD,
    Field("tile_m", int),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("pingpong", bool, True, "kPingpong"),
    Field("overlap", bool, True, "kOverlap"),
    Field("sum_in_pairs", bool, False, "kSumInPairs"),
    Field("why", str),
)


def window_keys(row: Row) -> int:
    """Keys of a tile of a row with `grouped`: a block, and what its last warpgroup's is shifted by
    (attention/window/plan.hpp)."""
    values = -(-row["tile_n"] // VALUE_STEP) * VALUE_STEP
    return int(values + (row["consumer_warpgroups"] - 1) * WINDOW_QUERIES)


def window_shared_memory(row: Row) -> dict[str, int]:
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    keys = stages * window_keys(row) * row["head_dim"] * ELEMENT_BYTES
    rows = consumers * WARPGROUP_M * row["head_dim"] * ELEMENT_BYTES
    # full and empty, 8 bytes each, of both stages of Q and those of keys, one more for each stage
    # that a guard looks at; what is known of two tiles, and two flags
    barriers = 2 * 8 * (2 + stages) + 8 * stages + 2 * 32 + 16
    return aligned({"K": keys, "V": keys, "Q": 2 * rows, "O": rows, "barriers": barriers})


def forward_shared_memory(row: Row) -> dict[str, int]:
    if row.get("grouped"):
        return window_shared_memory(row)
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    k = stages * row["tile_n"] * row["head_dim"] * ELEMENT_BYTES
    v = stages * row["tile_n"] * row["head_dim_v"] * ELEMENT_BYTES
    q = consumers * WARPGROUP_M * row["head_dim"] * ELEMENT_BYTES
    one_o = WARPGROUP_M * row["head_dim_v"] * ELEMENT_BYTES
    # full and empty, 8 bytes each: for every stage of K and V, and for every warpgroup's Q; one
    # more for an O that two warpgroups share, and for every stage of V that a guard looks at,
    # beside two flags
    barriers = 2 * 8 * (2 * stages + consumers) + 8 * (1 + stages) + 8
    parts = {"K": k, "V": v, "Q": q, "O": consumers * one_o, "barriers": barriers}
    if not row["separate_output"]:
        parts["O"] = 0
    elif sum(aligned(parts).values()) > SHARED_BYTES and consumers == 2:
        parts["O"] = one_o
    return aligned(parts)


def forward_registers(row: Row) -> dict[str, int]:
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    if row.get("grouped"):  # P takes the scores' place, and O what they leave
        return {"scores": scores, "working": WORKING_REGISTERS}
    return {
        "scores": scores,
        "output": WARPGROUP_M * row["head_dim_v"] // WARPGROUP_THREADS,
        "packed P": scores * ELEMENT_BYTES // 4,
        "working": WORKING_REGISTERS,
    }


def as_forward(row: Row) -> Row:
    """A prefill row as the forward row that it is but for its loads and stores."""
    return {**row, "head_dim_v": row["head_dim"], "separate_output": True}


def forward_problems(row: Row) -> list[str]:
    found = query_block_problems(row)
    if row["head_dim_v"] > row["head_dim"] and not row["separate_output"]:
        found.append(
            f"head_dim_v = {row['head_dim_v']} > head_dim = {row['head_dim']}: O does not fit in "
            f"Q's shared memory; set separate_output = true"
        )
    if row["grouped"]:
        found += window_problems(row)
    elif row["tile_n"] % VALUE_STEP or not VALUE_STEP <= row["tile_n"] <= 256:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of 16 up to 256: it is N of the WGMMA "
            f"Q K^T (at most 256) and K of P V (steps of 16)"
        )
    if row["speed"] <= 0 or row["overhead"] < 0:
        found.append(
            f"speed = {row['speed']} must be above 0, overhead = {row['overhead']} at least 0"
        )
    return found


def window_problems(row: Row) -> list[str]:
    found = []
    if row["tile_n"] % 8 or row["tile_n"] <= 0:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of 8: it is N of the WGMMA Q K^T"
        )
    elif window_keys(row) > MAX_BOX_ROWS:
        found.append(
            f"grouped: tile_n = {row['tile_n']} up to a multiple of {VALUE_STEP}, and "
            f"{WINDOW_QUERIES} for each warpgroup but one, = {window_keys(row)} must be up to "
            f"{MAX_BOX_ROWS}, the rows of a box of TMA"
        )
    if (row["head_dim"], row["head_dim_v"]) != (64, 64):
        found.append("grouped needs head dims of 64: a row is one row of the swizzle")
    if row["any_call"] or row["softcap"] or row["pingpong"] or not row["separate_output"]:
        found.append(
            "grouped needs any_call, softcap and pingpong = false, separate_output = true: it "
            "takes calls with a short window, whose keys are one block"
        )
    return found


def prefill_problems(row: Row) -> list[str]:
    found = query_block_problems(row)
    if row["tile_n"] % 32 or not 32 <= row["tile_n"] <= 256:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of 32 up to 256: a warp gathers 32 rows "
            f"at a time, and it is N of the WGMMA Q K^T"
        )
    return found


def query_block_problems(row: Row) -> list[str]:
    """Of rows whose consumer warpgroups have 64 queries each."""
    consumers = row["consumer_warpgroups"]
    if row["tile_m"] % WARPGROUP_M or not 1 <= consumers <= 4:
        return [
            f"tile_m = {row['tile_m']} must be 64, 128, 192 or 256: WGMMA's M is 64 for each of "
            f"one to four consumer warpgroups"
        ]
    if consumers == 1 and row["pingpong"]:
        return [
            f"pingpong needs two or more consumer warpgroups to take turns; "
            f"tile_m = {row['tile_m']} has one"
        ]
    return []
