"""Models of who waits for whom: every warp a process, in any order, with barriers as the hardware
has them. A process yields IDLE where others may take a turn, or the question whether its wait has
ended."""

WARPS = 4  # of a warpgroup
IDLE = object()


class Barrier:
    """An mbarrier: a wait sees one bit of the phase's number."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self, count=1):
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a phase has"
        if self.pending == 0:
            self.pending, self.phase = self.arrivals, self.phase + 1

    def has_ended(self, phase):
        return (self.phase - 1) % 2 == phase % 2


class NamedBarriers:
    """Who comes to one says how many warps it is of."""

    def __init__(self):
        self.warps, self.here, self.passed = {}, {}, {}

    def sync(self, name, warps):
        if self.here.get(name, 0) > 0:
            assert self.warps[name] == warps, "two meetings at one barrier"
        self.warps[name] = warps
        self.here[name] = self.here.get(name, 0) + 1
        meeting = self.passed.get(name, 0)
        if self.here[name] == warps:
            self.here[name], self.passed[name] = 0, meeting + 1
        yield lambda: self.passed.get(name, 0) > meeting


class Place:
    """Shared memory that each producer warp fills a share of, and consumer warps read all of."""

    def __init__(self):
        self.shares = [None] * WARPS
        self.readers = 0

    def start_copy(self, warp):
        assert self.readers == 0, "copied over while it is read"
        self.shares[warp] = None

    def read(self, expected):
        assert self.shares == [expected] * WARPS, f"{self.shares} for {expected}"
        self.readers += 1

    def end_read(self):
        self.readers -= 1


def run_warps(live, chance, copies=(), land=None):
    """Turns of `live`, processes by name, until all have ended; some are slow for a while. Copies
    land late: `copies` are those on their way, by warp, of which land(warp) lands one."""
    waits, weights = {}, {}
    warps = range(len(copies))
    while live or any(copies):
        if not weights or chance.random() < 0.02:
            names = [*live, *(("copy", w) for w in warps)]
            weights = {name: chance.choice((0.01, 1, 1, 4)) for name in names}
        ready = [name for name in live if name not in waits or waits[name]()]
        ready += [("copy", w) for w in warps if copies[w]]
        assert ready, "all wait for one another"
        (name,) = chance.choices(ready, [weights[x] for x in ready])
        if name not in live:
            land(name[1])
            continue
        waits.pop(name, None)
        try:
            waited_for = next(live[name])
        except StopIteration:
            del live[name]
            continue
        if waited_for is not IDLE:
            waits[name] = waited_for
