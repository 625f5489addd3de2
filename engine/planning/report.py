"""An account as text."""

from collections.abc import Iterator, Sequence

from engine.models import attention
from engine.parallel.sharding import mesh_words
from engine.planning.account import Account
from engine.planning.work import PHASES

_GIB = 2**30


def report(account: Account, shapes: str) -> str:
    """The whole page.

    Args:
        shapes: where the shapes of the batch come from, in words.
    """
    sections = [
        _run(account, shapes),
        _memory(account),
        _arithmetic(account),
        _communication(account),
        _time(account),
    ]
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines)


def verdict(account: Account) -> str:
    """Whether it fits, in a few words."""
    capacity = _size(account.target.capacity)
    if account.fits:
        return f"fits: {_size(account.peak)} of {capacity}"
    if account.peak is None:
        return f"does not fit into {capacity}"
    return f"does not fit: {_size(account.peak)} of {capacity}"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"


def count(number: int, what: str) -> str:
    """`1 pair`, `2 pairs`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _run(account: Account, shapes: str) -> Iterator[str]:
    target, step = account.target, account.step
    (microbatches, _, pairs), (length, capacity) = step.run.plan.grid, step.shape
    yield (
        f"target       {target.text}: {count(target.count, 'device')} "
        f"({target.chip.name}), compiled by {target.chip.compiler}; nothing has run"
    )
    yield f"mesh         {mesh_words(step.run.mesh.shape)}"
    rows = step.run.arguments.arrangement.rows(pairs)
    yield (
        f"batch        {count(account.pairs, 'pair')} in "
        f"{count(microbatches, 'microbatch').replace('batchs', 'batches')} of "
        f"{count(pairs, 'pair')} a device: {count(rows, 'row')} of {length:,} tokens, "
        f"up to {capacity:,} of them scored"
    )
    yield f"shapes       {shapes}"
    arguments, policy = step.run.arguments, step.policy
    case = attention.Case.of(
        step.run.mesh, arguments.arrangement, policy.dtype, step.model
    )
    yield f"attention    {attention.describe(arguments.attention, case)}"


def _memory(account: Account) -> Iterator[str]:
    held = account.held
    yield "memory of each device"
    for name, size in (
        ("parameters, trained", held.parameters),
        ("parameters, frozen", held.frozen),
        ("optimizer", held.optimizer),
        ("reference", held.reference),
        ("batch", held.batch),
    ):
        if size:
            yield f"  {name:<22}{_size(size):>12}"
    yield from _reference_on_host(account)
    yield f"  {'gradients':<22}{_size(account.gradients):>12}  during a step, float32"
    yield (
        f"  {'activations, the rest':<22}{_size(account.activations):>12}  during a "
        f"step; the head takes at most {_size(account.head)} of it"
    )
    yield (
        f"  {'peak':<22}{_size(account.peak):>12}  {verdict(account)} "
        f"({account.target.capacity_words})"
    )
    if account.refusal is not None:
        yield f"  its compiler: {account.refusal}"


def _reference_on_host(account: Account) -> Iterator[str]:
    if not account.step.run.arguments.offload_ref_model:
        return
    if account.on_host:
        size = _size(account.on_host)
        yield f"  {'(reference, on host)':<22}{size:>12}  of its host's memory"
    else:
        yield "  (on a device its reference will not be: this compiler knows no host)"


def _arithmetic(account: Account) -> Iterator[str]:
    work = account.work
    yield "matrix products of each device, TFLOP, loops counted as often as they run"
    yield f"  {'':<14}" + "".join(f"{phase:>12}" for phase in (*PHASES, "all"))
    for part in dict.fromkeys(part for part, _ in work.flops):
        counts = [work.flops.get((part, phase), 0) for phase in PHASES]
        yield f"  {part:<14}" + "".join(
            f"{x / 1e12:>12.4g}" for x in (*counts, sum(counts))
        )
    total = [work.of_phase(phase) for phase in PHASES]
    yield f"  {'all':<14}" + "".join(f"{x / 1e12:>12.4g}" for x in (*total, work.total))
    if account.compiler_flops:
        yield (
            f"  (XLA's own count of all arithmetic, what is in a loop once: "
            f"{account.compiler_flops / 1e12:.4g})"
        )
    if work.uncounted:
        yield f"  not counted: {', '.join(sorted(work.uncounted))}"


def _communication(account: Account) -> Iterator[str]:
    traffic = account.traffic
    if traffic is None:
        return
    if not traffic.collectives:
        yield "communication: none"
        return
    yield (
        "communication of each device in a step"
        + f"{'calls':>8}{'of GB':>10}{'receives GB':>14}{'exposed':>10}"
    )
    for one in traffic.collectives:
        name = f"{one.kind} over {' x '.join(one.axes)} ({one.group})"
        yield (
            f"  {name:<36}{one.calls:>8}{one.payload / 1e9:>10.3f}"
            f"{one.wire / 1e9:>14.3f}{one.exposed / 1e9:>10.3f}"
        )
    yield "  (exposed: received while no product, kernel or loop runs)"


def _time(account: Account) -> Iterator[str]:
    traffic, chip = account.traffic, account.target.chip
    if traffic is None:
        return
    unknown = (
        f"; {count(traffic.unknown_loops, 'loop')} of unknown length counted once"
        if traffic.unknown_loops
        else ""
    )
    moved = f"{traffic.memory_bytes / 1e9:.4g} GB read and written{unknown}"
    times = account.times
    if times is None:
        yield f"memory traffic of each device: {moved}"
        yield "time: not predicted, as nobody says how fast this machine is"
        return
    yield "time of a step, predicted from peak rates: nothing is measured"
    for name, seconds, how in (
        (
            "products",
            times.products_s,
            f"{account.work.total / 1e12:.4g} TFLOP at "
            f"{chip.flops_per_s / 1e12:g} TFLOP/s",
        ),
        ("memory", times.memory_s, f"{moved}, at {chip.bytes_per_s / 1e9:g} GB/s"),
        (
            "communication",
            times.communication_s,
            f"in rings, at {chip.link_bytes_per_s / 1e9:g} GB/s into a device; "
            f"{times.exposed_s:.3g} s of it exposed",
        ),
    ):
        yield f"  {name:<22}{seconds:>10.3g} s  {how}"
    yield (
        f"  {'a step':<22}{times.least_s:>10.3g} s  where all of these overlap; "
        f"{times.most_s:.3g} s where none do"
    )
    slow, fast = (account.tokens / x for x in (times.most_s, times.least_s))
    yield (
        f"  {'tokens/s':<22}{slow:>10,.0f}    to {fast:,.0f}, padding included; "
        f"{account.pairs / times.most_s:,.4g} to {account.pairs / times.least_s:,.4g} "
        "pairs/s"
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns, each as wide as its widest cell; all but the first to the right."""
    every = [header, *lines]
    widths = [max(len(line[i]) for line in every) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in every
    )
