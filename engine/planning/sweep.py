"""Meshes and batch sizes of a run on one target: what fits, and how fast it may be."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.config.run import RunConfig
from engine.errors import InputError
from engine.planning.account import Account
from engine.planning.changes import Variant
from engine.planning.planner import Planner
from engine.planning.report import table
from engine.planning.steps import Step, with_options

_GIB = 2**30
_MOST_TENSOR = 8
_MOST_SIZES = 5  # batch sizes of a mesh


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mesh and batch size."""

    mesh: tuple[int, int, int]  # data, fsdp, tensor
    pairs: int  # of a step, over all devices
    account: Account | None  # None: what a step holds is more than there is

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.account is not None and self.account.fits

    @property
    def name(self) -> str:
        """The mesh as a user types it."""
        return "x".join(map(str, self.mesh))


def mesh_shapes(devices: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) of so many devices, of powers of two along tensor.

    With parameters split over all devices first; copies of them (data) only beside
    no splitting of layers.
    """
    tensor = 1
    while tensor <= min(devices, _MOST_TENSOR):
        if devices % tensor == 0:
            yield 1, devices // tensor, tensor
        tensor *= 2
    data = 2
    while data <= devices:
        if devices % data == 0:
            yield data, devices // data, 1
        data *= 2


def sweep(run: RunConfig, planner: Planner) -> Iterator[Point]:
    """Each mesh with 1, 2, 4, ... pairs a shard, until a batch does not fit.

    Rows stay spread over as many devices as they are.
    """
    for mesh in mesh_shapes(planner.target.count // run.sharding.sequence):
        data, fsdp, tensor = mesh
        sharding = replace(run.sharding, data=data, fsdp=fsdp, tensor=tensor)
        size = data * fsdp
        for _ in range(_MOST_SIZES):
            changed = with_options(
                replace(run, sharding=sharding),
                total_batch_size=size,
                gradient_accumulation_steps=1,
            )
            variant = Variant((f"{data}x{fsdp}x{tensor}, {size} pairs",), changed)
            try:
                step = planner.step(variant.run)
            except InputError:  # the mesh does not divide the model
                break
            point = _point(variant, step, planner, mesh, size)
            yield point
            if not point.fits:
                break
            size *= 2


def _point(
    variant: Variant,
    step: Step,
    planner: Planner,
    mesh: tuple[int, int, int],
    pairs: int,
) -> Point:
    account = None
    if not planner.hopeless(step):
        account = planner.account(variant.run, f"with {variant.overrides[0]}")
    return Point(mesh=mesh, pairs=pairs, account=account)


def show(points: list[Point]) -> str:
    """A table."""
    header = ("data x fsdp x tensor", "pairs", "peak GiB", "fits")
    header += ("a step, s", "tokens/s", "communication, s")
    return table(header, [_line(point) for point in points])


def _line(point: Point) -> tuple[str, ...]:
    account = point.account
    peak = "" if account is None or account.peak is None else account.peak / _GIB
    cells = [point.name, str(point.pairs), f"{peak:.2f}" if peak else "more"]
    cells.append("yes" if point.fits else "no")
    times = account.times if account else None
    if account is None or times is None:
        return (*cells, "", "", "")
    least, most = times.least_s, times.most_s
    return (
        *cells,
        f"{least:.3f} - {most:.3f}",
        f"{account.tokens / most:,.0f} - {account.tokens / least:,.0f}",
        f"{times.communication_s:.3f}",
    )


def as_json(points: list[Point]) -> list[dict]:
    """The rows of the table."""
    rows = []
    for point in points:
        account = point.account
        times = account.times if account else None
        rows.append(
            {
                "mesh": list(point.mesh),
                "pairs": point.pairs,
                "fits": point.fits,
                "peak_bytes": account and account.peak,
                "seconds": times and dataclasses.asdict(times),
                "tokens_per_step": account and account.tokens,
            }
        )
    return rows
