"""The passes that a table of tiles has rows for: columns, what fits, and the names in C++."""

from __future__ import annotations

from .decode import DECODE, FP8_DECODE, LATENT
from .forward import (
    FORWARD_FIELDS,
    PREFILL_FIELDS,
    as_forward,
    forward_problems,
    forward_registers,
    forward_shared_memory,
    prefill_problems,
    query_block_problems,
)
from .rows import (
    DTYPES,
    ELEMENT_BYTES,
    HEAD,
    REQUIRED,
    WARPGROUP_M,
    WARPGROUP_THREADS,
    WORKING_REGISTERS,
    Field,
    Pass,
    Row,
    aligned,
)

FP8_DTYPES = {  # of Q and K
    "e4m3": ("cutlass::float_e4m3_t", "ScoreType::kE4m3"),
    "int8": ("int8_t", "ScoreType::kInt8"),
}
MASKS = {"any": "kAny", "full": "kFull", "causal": "kCausal", "none": "kNone"}

ACCUMULATOR_BYTES = 4
SCALE_ROWS = 64  # FP8: keys that share a scale
PACKED_VALUE_KEYS = 128  # FP8: keys of V that a packed sequence has whole blocks of
SEQUENCE_KEY_BLOCK_BYTES = 100  # backward, any_call: what is known of a key block
KEY_BLOCK = 16  # backward: channels of a k-step of WGMMA, 4 registers as an operand
SUM_CHANNELS = 8  # FP8 with linear_exp: channels of V that are ones
SWIZZLE_ELEMENTS = 16  # a row of the 32-byte swizzle, the narrowest
WARPGROUP_WARPS = 4
MASKED_QUERIES = 128  # backward, any_call: of a key and four threads (attention/mask.hpp)
# What setmaxnreg leaves a consumer thread (forward/traits.hpp); one consumer warpgroup keeps the
# compiler's limit.
CONSUMER_REGISTERS = {1: 255, 2: 240, 3: 160, 4: 112}
FP8_FIELDS = (
    *HEAD,
    Field("head_dim_v", int, None, "kHeadDimV"),  # None: head_dim
    Field("any_call", bool, False, "kAnyCall"),
    Field("mask", str, "any"),
    Field("tile_m", int),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("pingpong", bool, True, "kPingpong"),
    Field("overlap", bool, True, "kOverlap"),
    Field("linear_exp", bool, False, "kLinearExp"),
    Field("promote_every", int, 0, "kPromoteEvery"),
    Field("moves_of_four", int, 0, "kMovesOfFour"),
    Field("why", str),
)
BACKWARD_FIELDS = (
    *HEAD,
    Field("head_dim_v", int, None, "kHeadDimV"),  # None: head_dim
    Field("any_call", bool, False, "kAnyCall"),
    Field("softcap", bool, False),
    Field("mask", str, "any"),
    Field("tile_m", int, REQUIRED, "kTileM"),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("consumer_warpgroups", int, 2, "kConsumerWarpgroups"),
    Field("key_blocks_in_registers", int, 0, "kKeyBlocksInRegisters"),
    Field("value_blocks_in_registers", int, 0, "kValueBlocksInRegisters"),
    Field("split_products", bool, False, "kSplitProducts"),
    Field("statistics_by_product", bool, False, "kStatisticsByProduct"),
    Field("scores_behind_dk", bool, False, "kScoresBehindDk"),
    Field("scores_ahead", bool, False, "kScoresAhead"),
    Field("why", str),
)
# A forward tile has 64 queries for each consumer warpgroup; a backward row says both.
CONSUMER_WARPGROUPS = Field("consumer_warpgroups", int, REQUIRED, "kConsumerWarpgroups")


def fp8_shared_memory(row: Row) -> dict[str, int]:
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    channels = row["head_dim_v"] + (SUM_CHANNELS if row["linear_exp"] else 0)
    rows = consumers * WARPGROUP_M
    return aligned(
        {
            "K": stages * row["tile_n"] * row["head_dim"],
            "V": stages * row["tile_n"] * channels,
            "Q": rows * row["head_dim"],
            "O": rows * row["head_dim_v"] * ELEMENT_BYTES,
            "scales and barriers": consumers * row["head_dim_v"] * 4
            + 16  # what int8 products are added to
            + 2 * 8 * (2 * stages + consumers),
        }
    )


def fp8_registers(row: Row) -> dict[str, int]:
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    channels = row["head_dim_v"] + (SUM_CHANNELS if row["linear_exp"] else 0)
    return {
        "scores": scores,
        "output": WARPGROUP_M * channels // WARPGROUP_THREADS,
        "packed P": scores // 4 if row["overlap"] else 0,
        "working": WORKING_REGISTERS,
    }


def swizzled_columns(channels: int) -> int:
    """Elements of a row of the widest swizzle that divides so many channels."""
    return next((row for row in (64, 32) if channels % row == 0), SWIZZLE_ELEMENTS)


def dq_slices(row: Row) -> int:
    """How many warpgroups, in both CTAs where there are two, share the product dQ."""
    return int(row["consumer_warpgroups"]) * (2 if row["split_products"] else 1)


def backward_shared_memory(row: Row) -> dict[str, int]:
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    k, v = (row["tile_n"] * row[size] * ELEMENT_BYTES for size in ("head_dim", "head_dim_v"))
    block = stages * row["tile_m"] * ELEMENT_BYTES
    split = row["split_products"]
    scores = row["tile_m"] * row["tile_n"] * ELEMENT_BYTES
    dq = row["tile_m"] * row["head_dim"] * ACCUMULATOR_BYTES
    # lse and delta: parts for WGMMA, or for threads in fp32
    row_bytes = 16 if row["statistics_by_product"] else 2 * ACCUMULATOR_BYTES
    statistics = stages * row["tile_m"] * row_bytes
    # full and empty: of every stage of Q and dO, of every warpgroup's dQ (full of each of its
    # buffers), of the next key block's number (and that); full: K, V, P, both dS, the other CTA's K
    # and dS, every warpgroup's dV; empty: K and V, dS
    barriers = 8 * (4 * stages + consumers * (2 + stages) + 12)
    barriers += 2 * 8 if row["scores_ahead"] else 0  # dS of the second step, full and empty
    barriers += 5 * WARPGROUP_WARPS * consumers  # what a warp knows of keys and queries not finite
    barriers += 2 * SEQUENCE_KEY_BLOCK_BYTES if row["any_call"] else 0
    return aligned(
        {
            "K": k,
            "V": v,
            "Q": block * row["head_dim"],
            "dO": block * row["head_dim_v"],
            "dS": (5 if row["scores_ahead"] else 2) * scores,  # of two steps, and P
            # split by products, dQ leaves through Q's and dO's memory if at all
            **({"the other CTA's K": k // 2} if split else {"dQ": dq, "dV": v}),
            "LSE, delta and barriers": statistics + barriers,
        }
    )


def backward_registers(row: Row) -> dict[str, int]:
    split = row["split_products"]
    scores = WARPGROUP_M * row["tile_m"] // WARPGROUP_THREADS
    dq = row["tile_m"] * row["head_dim"] // (WARPGROUP_THREADS * dq_slices(row))
    in_registers = row["key_blocks_in_registers"], row["value_blocks_in_registers"]
    dk, dv = (WARPGROUP_M * row[size] // WARPGROUP_THREADS for size in ("head_dim", "head_dim_v"))
    return {
        "scores and dP, then dQ": scores + dq
        if row["scores_ahead"]
        else max(scores if split else 2 * scores, dq),
        "keys": 4 * (max(in_registers) if split else sum(in_registers)),
        "ones": 8 if row["statistics_by_product"] else 0,  # WGMMA's operands for lse and delta
        "dK": max(dk, dv) if split else dk,
        "dV": 0 if split else dv,
        "working": WORKING_REGISTERS,
    }


def fp8_problems(row: Row) -> list[str]:
    found = query_block_problems(row)
    if row["tile_n"] % SCALE_ROWS or not SCALE_ROWS <= row["tile_n"] <= 256:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of {SCALE_ROWS}, the keys that share a "
            f"scale, up to 256"
        )
    if row["linear_exp"] and (row["tile_n"] > 128 or row["head_dim_v"] == 256):
        found.append(
            f"linear_exp needs {SUM_CHANNELS} more channels of V, for the row sums: tile_n of 64 "
            f"or 128 (one swizzled column) and head_dim_v + {SUM_CHANNELS} <= 256"
        )
    if row["any_call"] and PACKED_VALUE_KEYS % row["tile_n"]:
        found.append(
            f"any_call needs tile_n of 64 or 128: packed sequences have whole blocks of "
            f"{PACKED_VALUE_KEYS} keys of V to themselves"
        )
    if row["linear_exp"] and row["overlap"]:
        found.append(
            "linear_exp needs overlap = false: each block's row sums would take registers that the "
            "scores and P of two blocks do not leave"
        )
    if row["promote_every"] < 0:
        found.append(f"promote_every = {row['promote_every']} must be 0 or more")
    if row["promote_every"] == 1 and row["overlap"]:
        found.append(
            "promote_every = 1 needs overlap = false: a block's products take the registers of its "
            "scores"
        )
    if not 0 <= row["moves_of_four"] <= 4:
        found.append(f"moves_of_four = {row['moves_of_four']} must be 0 to 4")
    return found


def backward_problems(row: Row) -> list[str]:
    found = []
    consumers, split = row["consumer_warpgroups"], row["split_products"]
    if row["tile_m"] % WARPGROUP_M or not WARPGROUP_M <= row["tile_m"] <= 256:
        found.append(
            f"tile_m = {row['tile_m']} must be 64, 128, 192 or 256: it is N of the WGMMA K Q^T (at "
            f"most 256) and M of dS K"
        )
    if row["any_call"] and row["tile_m"] > MASKED_QUERIES:
        found.append(
            f"any_call needs tile_m of up to {MASKED_QUERIES}, but it is {row['tile_m']}: a thread "
            f"masks 32 queries of a key, each by a bit"
        )
    slices = dq_slices(row)
    one_each = slices * WARPGROUP_M
    if row["tile_m"] not in (WARPGROUP_M, one_each) and row["head_dim"] % one_each:
        found.append(
            f"tile_m = {row['tile_m']} must be {WARPGROUP_M} or {one_each} with head_dim = "
            f"{row['head_dim']}: dQ is split over {slices} warpgroups, each with 64 of the "
            f"queries, or with channels, 64 of them if tile_m is not 64"
        )
    if row["tile_m"] == WARPGROUP_M and row["head_dim"] % (slices * SWIZZLE_ELEMENTS):
        found.append(
            f"head_dim = {row['head_dim']} must be a multiple of {slices * SWIZZLE_ELEMENTS} with "
            f"tile_m = {row['tile_m']}: dQ's channels are split over {slices} warpgroups, in "
            f"swizzled rows of {SWIZZLE_ELEMENTS}"
        )
    key_slice = row["head_dim"] // (1 if row["tile_m"] == one_each else slices)  # K's, for dQ
    for operand, size, channels in (
        ("key", "head_dim", key_slice),
        ("value", "head_dim_v", row["head_dim_v"]),
    ):
        blocks, column = row[size] // KEY_BLOCK, f"{operand}_blocks_in_registers"
        registers, of_a_row = row[column], swizzled_columns(channels) // KEY_BLOCK
        if registers < 0 or (registers > 0 and blocks % registers):
            found.append(
                f"{column} = {registers} must be 0 or divide {blocks}, the blocks of {KEY_BLOCK} "
                f"channels that {size} = {row[size]} has"
            )
        elif registers > 0 and registers % of_a_row and of_a_row % registers:
            found.append(
                f"{column} = {registers} must divide {of_a_row}, the blocks of {KEY_BLOCK} "
                f"channels of a swizzled row, or be a multiple of it"
            )
    if row["stages"] < 2:
        found.append(
            f"stages = {row['stages']} must be at least 2: the next Q is waited for before the "
            f"last one is released"
        )
    if consumers != 2:
        found.append(
            f"consumer_warpgroups = {consumers} must be 2: of the four warps that move data one "
            f"loads, one adds the dQ of each consumer warpgroup, one keeps deterministic order"
        )
    elif row["tile_n"] != WARPGROUP_M * (1 if split else consumers):
        found.append(
            f"tile_n = {row['tile_n']} must be {consumers * WARPGROUP_M}, 64 keys for each of "
            f"{consumers} warpgroups, or {WARPGROUP_M} with split_products, which they share"
        )
    if split and not row["statistics_by_product"]:
        found.append("split_products needs statistics_by_product: no thread reads lse or delta")
    if row["softcap"] and not row["statistics_by_product"]:
        found.append("softcap needs statistics_by_product: threads read lse, WGMMA subtracts delta")
    if row["scores_ahead"] and (row["softcap"] or not split):
        found.append("scores_ahead needs split_products = true, softcap = false")
    if split and row["scores_behind_dk"]:
        found.append("scores_behind_dk needs split_products = false: no warpgroup has S and dK")
    return found


def row_config(row: Row) -> tuple[object, ...]:
    """What the C++ RowConfig has after name and dtype."""
    head_dim = row["head_dim"]
    mask = f"MaskClass::{MASKS[row.get('mask', 'any')]}"
    any_call, softcap = (row.get(column, False) for column in ("any_call", "softcap"))
    variant = f'"{row["variant"]}"' if "variant" in row else "nullptr"
    return head_dim, row.get("head_dim_v", head_dim), any_call, softcap, variant, mask


PASSES = {
    p.name: p
    for p in (
        Pass(
            name="forward",
            cpp="Forward",
            launch_header="forward/launch.hpp",
            table_header="tile_config.hpp",
            fields=FORWARD_FIELDS,
            dtypes=DTYPES,
            element="Element",
            config=("tile_m", "speed", "overhead", "grouped", "tile_n"),
            shared_memory=forward_shared_memory,
            registers=forward_registers,
            problems=forward_problems,
            swizzle=32,
            workspace=True,
            variants=True,
            of_groups=("window/launch.hpp", "Window"),
        ),
        Pass(
            name="backward",
            cpp="Backward",
            launch_header="backward/launch.hpp",
            table_header="tile_config.hpp",
            fields=BACKWARD_FIELDS,
            dtypes=DTYPES,
            element="Element",
            config=("tile_n",),
            shared_memory=backward_shared_memory,
            registers=backward_registers,
            problems=backward_problems,
            swizzle=32,
            workspace=True,
            variants=True,
        ),
        Pass(
            name="forward_fp8",
            cpp="Fp8Forward",
            launch_header="forward/fp8_launch.hpp",
            table_header="fp8_tile_config.hpp",
            fields=FP8_FIELDS,
            dtypes=FP8_DTYPES,
            element="ElementQk",
            config=("tile_m", "linear_exp"),
            shared_memory=fp8_shared_memory,
            registers=fp8_registers,
            problems=fp8_problems,
            workspace=True,
        ),
        DECODE,
        FP8_DECODE,
        Pass(
            name="prefill",
            cpp="Prefill",
            launch_header="prefill/launch.hpp",
            table_header="prefill/tile_config.hpp",
            fields=PREFILL_FIELDS,
            dtypes=DTYPES,
            element="Element",
            config=("tile_m", "tile_n"),
            shared_memory=lambda row: forward_shared_memory(as_forward(row)),
            registers=lambda row: forward_registers(as_forward(row)),
            problems=prefill_problems,
            workspace=True,
        ),
        LATENT,
    )
}
