"""The step that training would run, to be compiled for devices that are not here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh

from engine.config.dpo import DPOConfig
from engine.config.run import RunConfig
from engine.data.layouts import grid_of
from engine.data.pairs import Limits
from engine.data.shapes import Shape, Sizes, stream_shapes
from engine.models import Decoder, DecoderConfig
from engine.objective.references import Cached, Reference, check_comparable
from engine.parallel.sharding import DATA, FSDP, check_mesh
from engine.planning.models import abstract_models
from engine.training.checks import check_op
from engine.training.compilation import Request
from engine.training.optimizer import make_optimizer
from engine.training.programs import Programs
from engine.training.reference import make_reference

# Of a run whose length is not known; nothing that is planned depends on it.
_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LimitSizes:
    """The batches of a run whose data is not read: the largest that there may be."""

    steps: int
    shapes: tuple[Shape, ...]
    grid: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What the programs of a run depend on: see `training.programs.Outline`."""

    arguments: DPOConfig
    mesh: Mesh
    plan: Sizes
    reads_values: bool
    eval_plans: Mapping[str, Sizes] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Step:
    """A train step for the largest of a run's batches."""

    run: PlannedRun
    model: DecoderConfig  # the policy's
    policy: Decoder  # of shapes
    reference: Reference
    shape: Shape
    request: Request

    @property
    def positions(self) -> int:
        """Of a step's rows over all devices, padding included."""
        microbatches, shards, pairs = self.run.plan.grid
        rows = self.run.arguments.arrangement.rows(pairs)
        return microbatches * shards * rows * self.shape[0]

    @property
    def operands(self) -> tuple[Any, ...]:
        """(state, frozen parameters, reference's operands, batch, numbers)."""
        return self.request.arguments[self.shape]


def sizes_by_limits(arguments: DPOConfig, mesh: Mesh) -> LimitSizes:
    """The largest batch that the options allow: every row `max_length` long.

    Raises:
        InputError: sizes that the mesh or the accumulation steps do not divide.
    """
    grid = grid_of(
        arguments.total_batch_size,
        arguments.gradient_accumulation_steps,
        mesh.shape[DATA] * mesh.shape[FSDP],
        "total_batch_size",
    )
    limits = Limits(
        max_prompt_length=arguments.max_prompt_length,
        max_completion_length=arguments.max_completion_length,
        max_length=arguments.max_length,
        truncation_mode=arguments.truncation_mode,
    )
    return LimitSizes(
        steps=arguments.max_training_steps or _STEPS,
        shapes=stream_shapes(limits, grid[2], arguments.arrangement)[-1:],
        grid=grid,
    )


def make_step(
    run: RunConfig,
    config: DecoderConfig,
    reference: DecoderConfig | None,
    mesh: Mesh,
    sizes: Sizes | None = None,
    has_values: bool = False,
) -> Step:
    """The step of a run for the largest of its batches; nothing is compiled.

    Args:
        config: the policy's, with its adapter; `reference`: a named reference's.
        sizes: of the run's own batches; None: those that its options allow.
        has_values: the data brings the reference's log-probabilities.
    Raises:
        InputError: whatever training would refuse of these.
    """
    arguments = run.trainer
    for one in (config, reference):
        if one is not None:
            check_mesh(one, mesh)
    if reference is not None:
        check_comparable(config, reference, synced=arguments.sync_ref_model)
    sizes = sizes or sizes_by_limits(arguments, mesh)
    largest = max(sizes.shapes)
    sizes = LimitSizes(steps=sizes.steps, shapes=(largest,), grid=sizes.grid)
    check_op(arguments, config, run.model.dtype, sizes, mesh)
    reads = not arguments.without_reference and (
        arguments.precompute_ref_log_probs or has_values
    )
    planned = PlannedRun(arguments=arguments, mesh=mesh, plan=sizes, reads_values=reads)
    policy, given = abstract_models(run, config, mesh)
    source = Cached() if reads else make_reference(policy, given, arguments)
    optimizer = make_optimizer(arguments, config, mesh, sizes.steps)
    request = Programs(planned, policy, source, optimizer).train_request()
    return Step(
        run=planned,
        model=config,
        policy=policy,
        reference=source,
        shape=largest,
        request=request,
    )


def with_options(run: RunConfig, **changes: Any) -> RunConfig:
    """The run with other options of its trainer."""
    return replace(run, trainer=replace(run.trainer, **changes))
