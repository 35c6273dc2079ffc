"""The rows of attention to a cache."""

from __future__ import annotations

from .rows import (
    DTYPES,
    ELEMENT_BYTES,
    HEAD,
    REQUIRED,
    SHARED_BYTES_OF_ALL,
    SHARED_BYTES_RESERVED,
    WARPGROUP_M,
    WARPGROUP_THREADS,
    WORKING_REGISTERS,
    Field,
    Pass,
    Row,
    aligned,
)

# What setmaxnreg leaves a consumer thread (decode/traits.hpp), by the numbers of a CTA's consumer
# warpgroups and of CTAs, and where tiles have two heads
DECODE_CONSUMER_REGISTERS = {(1, 1): 255, (1, 2): 184, (2, 1): 208}
DECODE_CONSUMER_REGISTERS_OF_TWO_HEADS = 200

# Of each of four warps: two sums, the line of all work, the CTA's place there.
WORK_BYTES_OF_WARPGROUP = 4 * (2 * 4 + 16 + 52)
# Of a warp's walk over the CTA's parts, where it lies in shared memory
WALK_BYTES = 96

DECODE_FIELDS = (
    *HEAD,
    Field("tile_m", int, WARPGROUP_M),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("ctas", int, 1, "kCtas"),
    Field("heads", int, 1, "kHeads"),
    Field("least_rows", int, 0),
    Field("why", str),
)


def decode_shared_memory(row: Row, producers: int = 1, walks: int | None = None) -> dict[str, int]:
    """`producers`: warpgroups, beside those of consumers. `walks`: of how many warps the walk over
    the CTA's parts lies in shared memory, if other than of consumers where registers are scarce."""
    if walks is None:
        in_memory = row["tile_n"] == 128 or row["head_dim"] == 256
        walks = 4 * row["tile_m"] // WARPGROUP_M if in_memory else 0
    stage = row["tile_n"] * row["heads"] * row["head_dim"] * ELEMENT_BYTES
    return aligned(
        {
            "K": row["stages"] * stage,
            "V": row["stages"] * stage,
            "Q": row["tile_m"] * row["head_dim"] * ELEMENT_BYTES,
            # full and empty, of every stage of K and V and of Q; what warps know of the work, a
            # flag; two statistics of each row
            "barriers and work": 2 * 8 * (2 * row["stages"] + 1)
            + (row["tile_m"] // WARPGROUP_M + producers) * WORK_BYTES_OF_WARPGROUP
            + walks * WALK_BYTES
            + 4
            + 2 * 4 * row["tile_m"],
        }
    )


def decode_registers(row: Row) -> dict[str, int]:
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    return {
        "scores": scores,
        "output": WARPGROUP_M * row["head_dim"] // WARPGROUP_THREADS,
        "packed P": scores * ELEMENT_BYTES // 4,
        "working": WORKING_REGISTERS,
    }


def decode_rows_problems(row: Row) -> list[str]:
    """Of how rows of a cache are gathered."""
    found = []
    if row["head_dim"] not in (64, 128, 256):
        found.append(
            f"head_dim = {row['head_dim']} must be 64, 128 or 256: the lanes of a warp gather rows "
            f"of 16-byte pieces, 8 lanes or more each"
        )
    if row["tile_n"] % 32 or not 32 <= row["tile_n"] <= 128:
        found.append(
            f"tile_n = {row['tile_n']} must be a multiple of 32 up to 128: each of 128 threads "
            f"finds one row at most"
        )
    return found


def decode_lanes_problems(row: Row) -> list[str]:
    """Of rows that a producer's warps find and copy as they are (decode/load.hpp)."""
    if row["tile_n"] != 96:
        return []
    return ["tile_n = 96 must be 32, 64 or 128: the lanes of a warp find the rows of whole blocks"]


def decode_room_problems(
    row: Row, parts: dict[str, int], registers: dict[str, int], budget: int
) -> list[str]:
    found = []
    room = SHARED_BYTES_OF_ALL // row["ctas"] - SHARED_BYTES_RESERVED
    if sum(parts.values()) > room:
        found.append(
            f"shared memory of one of {row['ctas']} CTAs: {sum(parts.values())} > {room} bytes"
        )
    needed = sum(registers.values())
    if needed > budget:
        found.append(f"registers of a consumer thread: {needed} > {budget}")
    return found


def decode_problems(row: Row) -> list[str]:
    found = decode_rows_problems(row) + decode_lanes_problems(row)
    if row["stages"] * WARPGROUP_M < row["tile_m"]:
        found.append(
            f"stages = {row['stages']} must be at least {row['tile_m'] // WARPGROUP_M}: consumer "
            f"warpgroups take turns with them"
        )
    if row["heads"] != 1 and (row["heads"], row["head_dim"], row["tile_m"]) != (
        2,
        64,
        2 * WARPGROUP_M,
    ):
        found.append(
            f"heads = {row['heads']} must be 1, or 2 with head_dim = 64 and tile_m = "
            f"{2 * WARPGROUP_M}: each of two consumer warpgroups has a head of 128 bytes a row"
        )
    warpgroups = row["tile_m"] / WARPGROUP_M, row["ctas"]
    if warpgroups not in DECODE_CONSUMER_REGISTERS:
        found.append(
            f"tile_m = {row['tile_m']} must be {WARPGROUP_M} with one or two ctas, or "
            f"{2 * WARPGROUP_M} with one, which has two consumer warpgroups then"
        )
        return found
    budget = DECODE_CONSUMER_REGISTERS[warpgroups]
    if row["heads"] == 2:
        budget = DECODE_CONSUMER_REGISTERS_OF_TWO_HEADS
    return found + decode_room_problems(
        row, decode_shared_memory(row), decode_registers(row), budget
    )


# Of caches of 8 bits: one kernel takes e4m3 and int8, and queries of any type. Tiles of few rows
# are warps' own (decode/fp8_warps_traits.hpp), those of many warpgroups' (fp8_wide_traits.hpp).
FP8_CACHE = "fp8"
FP8_CONSUMERS = 2
FP8_FEW_ROWS = 32
FP8_MANY_ROWS = {2 * WARPGROUP_M: 2, 3 * WARPGROUP_M: 3}  # and their consumer warpgroups
FP8_WARPS = 4 * FP8_CONSUMERS
FP8_WARP_ROWS, FP8_WARP_KEYS = 16, 32  # at a time (decode/fp8_warps_part.hpp)
# By the consumer warpgroups of many rows: registers of a consumer thread, after setmaxnreg
FP8_WIDE_REGISTERS = {2: 208, 3: 152}
FP8_WIDE_WARPGROUPS = 4  # with those of producers
FP8_PIECE_BYTES = 16  # of a row, which one thread copies and converts
FP8_DECODE_FIELDS = (
    *HEAD,
    Field("tile_m", int, REQUIRED, "kTileM"),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("staged", int, 0, "kStaged"),
    Field("ctas", int, 1, "kCtas"),
    Field("heads", int, 1, "kHeads"),
    Field("consumer_warpgroups", int, FP8_CONSUMERS, "kConsumerWarpgroups"),
    Field("least_rows", int, 0),
    Field("why", str),
)


def has_few_rows(row: Row) -> bool:
    """Less than a product of warpgroups has."""
    return bool(row["tile_m"] < WARPGROUP_M)


def fp8_decode_shared_memory(row: Row) -> dict[str, int]:
    return fp8_warps_shared_memory(row) if has_few_rows(row) else fp8_wide_shared_memory(row)


def fp8_warps_shared_memory(row: Row) -> dict[str, int]:
    """K and V as they are in the cache; O is every warp's own, Q lies there or apart."""
    stage = row["tile_n"] * row["head_dim"]
    warp_rows = FP8_WARPS * FP8_WARP_ROWS
    of_keys = row["stages"] * row["tile_n"]
    return aligned(
        {
            "K": row["stages"] * stage,
            "V": row["stages"] * stage,
            "Q": FP8_FEW_ROWS * row["head_dim"] * ELEMENT_BYTES if row["head_dim"] == 128 else 0,
            "O": warp_rows * row["head_dim"] * ELEMENT_BYTES,
            # of rows of K, of V and of Q, and of a sequence's V; every warp's walk; full and
            # empty, of every stage of K and of V; as of decode
            "factors, barriers and work": 4 * (2 * of_keys + FP8_FEW_ROWS + 1)
            + FP8_WARPS * WALK_BYTES
            + 2 * 8 * 2 * row["stages"]
            + 3 * WORK_BYTES_OF_WARPGROUP
            + 4
            + 8 * FP8_WARPS
            + 4 * 4 * warp_rows,
        }
    )


def fp8_pieces(row: Row) -> tuple[int, int]:
    """Of a producer thread, of K in a block and in a slot (decode/fp8_wide_traits.hpp)."""
    pieces = row["tile_n"] * row["head_dim"] // (WARPGROUP_THREADS * FP8_PIECE_BYTES)
    return pieces, next(count for count in (4, 3, 2, 1) if pieces % count == 0)


def fp8_wide_shared_memory(row: Row) -> dict[str, int]:
    """As decode_shared_memory, and what is on its way."""
    slot = fp8_pieces(row)[1] * WARPGROUP_THREADS * FP8_PIECE_BYTES
    staged = {
        "K and V of 8 bits": row["staged"] * 2 * slot,
        # of rows of K and V, staged and in stages, and of queries
        "factors": 4 * 2 * (row["staged"] + row["stages"]) * row["tile_n"] + 4 * row["tile_m"],
    }
    return {
        **decode_shared_memory(
            row, FP8_WIDE_WARPGROUPS - row["consumer_warpgroups"], 4 * FP8_WIDE_WARPGROUPS
        ),
        **aligned({"staged and factors": sum(staged.values())}),
    }


def fp8_decode_registers(row: Row) -> dict[str, int]:
    if not has_few_rows(row):
        return decode_registers(row)
    scores = FP8_WARP_ROWS * FP8_WARP_KEYS // 32
    output = FP8_WARP_ROWS * row["head_dim"] // 32
    return {
        "scores": scores,
        "output": output,
        "Q": output * ELEMENT_BYTES // 4 if row["head_dim"] <= 128 else 0,
        "packed P": scores * ELEMENT_BYTES // 4,
        "working": WORKING_REGISTERS,
    }


def fp8_decode_problems(row: Row) -> list[str]:
    found = decode_rows_problems(row)
    if row["tile_m"] not in (FP8_FEW_ROWS, *FP8_MANY_ROWS):
        found.append(f"tile_m = {row['tile_m']} must be 32, 128 or 192")
        return found
    if (row["ctas"], row["consumer_warpgroups"]) != (1, FP8_MANY_ROWS.get(row["tile_m"], 2)):
        found.append(
            f"ctas = {row['ctas']} and consumer_warpgroups = {row['consumer_warpgroups']} must be "
            f"1 and {FP8_MANY_ROWS.get(row['tile_m'], 2)}"
        )
    if row["heads"] != 1:
        found.append(f"heads = {row['heads']} must be 1")
    if found:
        return found
    found += fp8_warps_problems(row) if has_few_rows(row) else fp8_wide_problems(row)
    budget = DECODE_CONSUMER_REGISTERS[FP8_CONSUMERS, 1]
    return found + decode_room_problems(
        row,
        fp8_decode_shared_memory(row),
        fp8_decode_registers(row),
        budget if has_few_rows(row) else FP8_WIDE_REGISTERS[row["consumer_warpgroups"]],
    )


def fp8_warps_problems(row: Row) -> list[str]:
    found = decode_lanes_problems(row)
    turns = FP8_WARPS * FP8_WARP_KEYS // row["tile_n"]
    if row["stages"] < turns:
        found.append(
            f"stages = {row['stages']} must be at least {turns}: consumer warps take turns with "
            f"them, {FP8_WARP_KEYS} keys each"
        )
    if row["staged"]:
        found.append(
            f"staged = {row['staged']} must be 0 with tile_m = {row['tile_m']}: K and V stay as "
            f"they are in the cache"
        )
    return found


def fp8_wide_problems(row: Row) -> list[str]:
    found = []
    if row["stages"] < row["consumer_warpgroups"]:
        found.append(
            f"stages = {row['stages']} must be at least {row['consumer_warpgroups']}: consumer "
            f"warpgroups take turns with them"
        )
    if row["staged"] < 1:
        found.append(
            f"staged = {row['staged']} must be at least 1 with tile_m = {row['tile_m']}: blocks of "
            f"8 bits are on their way before they become float16"
        )
    pieces, of_slot = fp8_pieces(row)
    if row["consumer_warpgroups"] == 3 and pieces > of_slot:
        found.append(
            f"tile_n = {row['tile_n']} with tile_m = {row['tile_m']}: a block must be one slot "
            f"where one producer warpgroup has K and V"
        )
    return found


# A key is [latent | rope], of which the latent is the value, too. It lands in pieces
# (latent/traits.hpp).
LATENT_PIECES = 4
LATENT_FIELDS = (
    *HEAD,
    Field("head_dim_v", int, REQUIRED, "kHeadDimV"),
    Field("tile_m", int, WARPGROUP_M),
    Field("tile_n", int, REQUIRED, "kTileN"),
    Field("stages", int, 2, "kStages"),
    Field("consumer_warpgroups", int, 2, "kConsumerWarpgroups"),
    Field("why", str),
)


def latent_shared_memory(row: Row) -> dict[str, int]:
    row_bytes = (row["head_dim"] + row["head_dim_v"]) * ELEMENT_BYTES
    stages, consumers = row["stages"], row["consumer_warpgroups"]
    return aligned(
        {
            "K and V": stages * row["tile_n"] * row_bytes,
            "Q": row["tile_m"] * row_bytes,
            # maxima, factors and two sums of each row; full and empty of
            # every piece of a stage and of Q, full of P; what warps know of the work; flags
            "statistics, barriers and work": 4 * 4 * row["tile_m"]
            + 8 * (stages * 2 * LATENT_PIECES + 2 + consumers)
            + (consumers + 1) * WORK_BYTES_OF_WARPGROUP
            + 4 * (consumers + 1),
        }
    )


def latent_registers(row: Row) -> dict[str, int]:
    scores = WARPGROUP_M * row["tile_n"] // WARPGROUP_THREADS
    return {
        "scores": scores,
        "output": WARPGROUP_M
        * row["head_dim_v"]
        // row["consumer_warpgroups"]
        // WARPGROUP_THREADS,
        "packed P": scores * ELEMENT_BYTES // 4,
        "working": WORKING_REGISTERS,
    }


def latent_problems(row: Row) -> list[str]:
    right = {
        "head_dim": 64,
        "head_dim_v": 512,
        "tile_m": WARPGROUP_M,
        "tile_n": 64,
        "stages": 2,
        "consumer_warpgroups": 2,
    }
    return [
        f"{column} = {row[column]} must be {size}: the kernel is written for it alone"
        for column, size in right.items()
        if row[column] != size
    ]


LATENT = Pass(
    name="latent",
    cpp="Latent",
    launch_header="latent/launch.hpp",
    table_header="latent/tile_config.hpp",
    fields=LATENT_FIELDS,
    dtypes=DTYPES,
    element="Element",
    config=("tile_m", "tile_n"),
    shared_memory=latent_shared_memory,
    registers=latent_registers,
    problems=latent_problems,
    workspace=True,
    output_slices=2,
)

FP8_DECODE = Pass(
    name="decode_fp8",
    cpp="Fp8Decode",
    launch_header="decode/fp8_launch.hpp",
    table_header="decode/fp8_tile_config.hpp",
    fields=FP8_DECODE_FIELDS,
    dtypes={FP8_CACHE: ("cutlass::half_t", "CacheType::kEightBits")},
    element="Element",
    config=("tile_m", "tile_n", "least_rows"),
    shared_memory=fp8_decode_shared_memory,
    registers=fp8_decode_registers,
    problems=fp8_decode_problems,
    workspace=True,
)

DECODE = Pass(
    name="decode",
    cpp="Decode",
    launch_header="decode/launch.hpp",
    table_header="decode/tile_config.hpp",
    fields=DECODE_FIELDS,
    dtypes=DTYPES,
    element="Element",
    config=("tile_m", "tile_n", "heads", "least_rows"),
    shared_memory=decode_shared_memory,
    registers=decode_registers,
    problems=decode_problems,
    workspace=True,
)
