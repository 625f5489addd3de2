"""How many cycles each bundle of a final schedule takes.

The compiler's last step folds cycles in which nothing issues into a delay that the text
of the bundles does not show; a bundle may also wait for a matrix unit. Two other dumps
show it: `pre-delay_hlo-static-per-bundle-utilization` has one line a cycle,
`final_hlo-static-per-bundle-utilization` one line a bundle, each with the number of
instructions by unit. The lines are matched in order; what the first has more is delay.

The header above the lines names the units: MXU (or MATMUL and MATPUSH), XLU, VALU, ...
"""

from bench.tpu.bundles import ScheduleError

# How long an instruction occupies these is in the first table only, so that the two
# cannot be compared there.
_LEFT_OUT = {"MXU", "MATMUL", "MATPUSH", "XLU"}
_WINDOW = 64  # lines to look ahead for the next match
_CONTEXT = 3  # lines that have to agree there

Line = tuple[int, ...]


def utilization(text: str) -> list[Line]:
    """The columns that can be compared, one tuple a line of the table.

    Raises:
        ScheduleError: the text has no such table.
    """
    head, mark, table = text.partition("== UTILIZATION:")
    names = [line.replace(",", " ").split() for line in head.splitlines()]
    names = next((line for line in names if "VALU" in line), [])
    if not mark or not names:
        raise ScheduleError("no table of utilization; is it a static-per-bundle dump?")
    kept = [i for i, name in enumerate(names) if name not in _LEFT_OUT]
    try:
        rows = [list(map(int, x.split())) for x in table.splitlines() if x.strip()]
        return [tuple(row[i] for i in kept) for row in rows]
    except (ValueError, IndexError) as error:
        raise ScheduleError(f"the table of utilization: {error}") from None


def _pairs(cycles: list[Line], bundles: list[Line]) -> list[tuple[int, int]]:
    """Matching (cycle, bundle) of lines where something compared issues, in order."""
    a = [(i, line) for i, line in enumerate(cycles) if any(line)]
    b = [(i, line) for i, line in enumerate(bundles) if any(line)]
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i][1] == b[j][1]:
            found.append((a[i][0], b[j][0]))
            i, j = i + 1, j + 1
            continue
        i, j = _resume(a, b, i, j)
    return found


def _resume(a: list, b: list, i: int, j: int) -> tuple[int, int]:
    """The nearest places from where a few lines agree again."""
    for distance in range(1, _WINDOW):
        for di in range(distance + 1):
            x, y = i + di, j + distance - di
            if [v for _, v in a[x : x + _CONTEXT]] == [
                v for _, v in b[y : y + _CONTEXT]
            ]:
                return x, y
    raise ScheduleError("the cycles before and after the last step do not match")


def cycles_of_bundles(
    cycles_text: str, bundles_text: str, empty: list[bool]
) -> list[int]:
    """Cycles of each bundle, at least one; `empty`: whether nothing is in the bundle.

    Raises:
        ScheduleError: tables that do not belong together.
    """
    cycles, bundles = utilization(cycles_text), utilization(bundles_text)
    if len(bundles) != len(empty):
        raise ScheduleError(
            f"{len(bundles)} lines of utilization for {len(empty)} bundles"
        )
    result = [1] * len(bundles)
    pairs = [*_pairs(cycles, bundles), (len(cycles), len(bundles))]
    for (c0, b0), (c1, b1) in zip(pairs, pairs[1:], strict=False):
        extra = (c1 - c0) - (b1 - b0)
        if extra > 0:
            # An empty bundle is there to hold a delay; without one, the bundle before
            # the next match waits.
            place = next((b for b in range(b0, b1) if empty[b]), b1 - 1)
            result[place] += extra
    return result
