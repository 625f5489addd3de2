"""What a run found, in words and tables: goals, peers, what went wrong."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench import rows
from bench.device import plan

OURS = "dpo_kernels"
Row = rows.Row


def line(row: Row) -> str:
    """One row as it comes."""
    words = [row["op"], row["implementation"]]
    if row["T"]:
        words.append(f"{row['T']}x{row['D']}x{row['V']} {row['dtype']}")
    if row.get("setting"):
        words.append(row["setting"])
    return f"  {', '.join(words)}: {finding(row)}"


def finding(row: Row) -> str:
    """The number that matters, or why there is none."""
    if "error" in row:
        return f"ERROR {row['error']}"
    for name in ("missing", "unfinished"):
        if name in row:
            return f"{name}: {row[name]}"
    found = []
    if row["ms"] is not None:
        found.append(f"{row['ms']} ms")
    if row["pct_peak"] is not None:
        found.append(f"{row['pct_peak']}% of R")
    for name in ("ratio", "gradient_error", "head_share", "errors_found"):
        if row.get(name) is not None:
            found.append(f"{name} {row[name]}")
    if "passed" in row:
        found.append("pass" if row["passed"] else "FAIL")
    if "met" in row:
        found.append(f"{row['goal']}: {'met' if row['met'] else 'MISSED'}")
    return ", ".join(found) or "done"


def correct(new: Sequence[Row], sections: Sequence[str]) -> bool:
    """Whether what ran in this run computes what it should.

    A check that died is as bad as one that failed; one that time ran out on is not.
    """
    checks = [row for row in new if row["section"] in ("correctness", "sanitizer")]
    if "correctness" in sections and not any("passed" in row for row in checks):
        return False
    return all(row.get("passed", "error" not in row) for row in checks)


def judged(found: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Every goal: what it is, where, and how it came out."""
    out = []
    for row in found:
        if "met" in row:
            where = f"{row['implementation']} at {row['T']}x{row['D']}x{row['V']}"
            value = finding(row).partition(f", {row['goal']}")[0]
            out.append((row["goal"], where, verdict(row["met"], value)))
    return out + list(against_peers(found))


def verdict(met: bool, value: str) -> str:
    """A cell of the table."""
    return f"{'met' if met else 'MISSED'} ({value})"


def against_peers(found: Sequence[Row]) -> Iterable[tuple[str, str, str]]:
    """Faster than each peer at no more memory, by some workspace of ours."""
    for op in (plan.GRADIENT, plan.DPO, plan.STEP):
        timed = [
            row
            for row in found
            if row["op"] == op
            and row["ms"] is not None
            and row["section"] != "sweep"
            and not row.get("setting", "").startswith("num_valid")
        ]
        for row in timed:
            if row["implementation"].startswith(OURS):
                continue
            same = [
                one
                for one in timed
                if one["implementation"].startswith(OURS) and shape(one) == shape(row)
            ]
            if same:
                yield compared(row, same)


def shape(row: Row) -> tuple[Any, ...]:
    """Where two rows may be compared; rows of the step have other head rows."""
    if row["op"] == plan.STEP:
        return row["D"], row["V"]
    return row["T"], row["D"], row["V"]


def compared(peer: Row, ours: Sequence[Row]) -> tuple[str, str, str]:
    """One peer's line."""
    lean = [row for row in ours if no_more(row["peak_bytes"], peer["peak_bytes"])]
    best = min(lean or ours, key=lambda row: row["ms"])
    value = (
        f"{best['ms']} ms with {gib(best['peak_bytes'])} ({best.get('setting')}), "
        f"theirs {peer['ms']} ms with {gib(peer['peak_bytes'])}"
    )
    where = f"{peer['op']} at {peer['T']}x{peer['D']}x{peer['V']}"
    goal = f"faster than {peer['implementation']}, no more memory"
    return goal, where, verdict(bool(lean) and best["ms"] < peer["ms"], value)


def no_more(ours: int | None, theirs: int | None) -> bool:
    """Where neither says, nobody is accused."""
    return ours is None or theirs is None or ours <= theirs


def gib(peak: int | None) -> str:
    """Bytes in GiB."""
    return "unknown memory" if peak is None else f"{peak / 2**30:.2f} GiB"


def report(found: Sequence[Row]) -> str:
    """All of it."""
    goals = judged(found)
    parts = [rows.table(("goal", "where", "outcome"), goals)] if goals else []
    wrong = [row for row in found if row.get("passed") is False]
    failed = [row for row in found if "error" in row]
    parts.append(
        f"{sum('passed' in row for row in found)} checks, {len(wrong)} wrong; "
        f"{len(found)} rows, {len(failed)} without a result; goals: "
        f"{sum(g[2].startswith('met') for g in goals)} met, "
        f"{sum(g[2].startswith('MISSED') for g in goals)} missed"
    )
    parts += [line(row) for row in (*wrong, *failed)]
    return "\n".join(parts)
