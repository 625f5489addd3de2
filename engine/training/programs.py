"""The programs of a run: its steps, compiled for each shape of batch that they meet."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from engine.config.dpo import DPOConfig
from engine.data.shapes import Sizes
from engine.models import Decoder
from engine.models.remat import AUTO, remats_of_auto
from engine.objective.interface import LossOptions
from engine.objective.references import Reference
from engine.parallel.batch import Batch, abstract_batch, put_whole
from engine.parallel.sharding import place
from engine.training.compilation import (
    Compiled,
    Request,
    Shape,
    TooLittleMemory,
    compile_all,
)
from engine.training.gradients import Params
from engine.training.memory import limit_bytes
from engine.training.metrics import Sums
from engine.training.optimizer import Optimizer
from engine.training.prepare import loss_options, step_options
from engine.training.resume import abstract_arrays
from engine.training.schedules import learning_rate_schedule
from engine.training.step import (
    StepOut,
    TrainState,
    abstract_state,
    make_eval_step,
    make_train_step,
    split_model,
)

logger = logging.getLogger(__name__)

# Of a device's memory by its own account; some is lost between arrays.
_USABLE = 0.95


@runtime_checkable
class Outline(Protocol):
    """What the programs of a run depend on, besides its models; `Prepared` is one."""

    @property
    def arguments(self) -> DPOConfig:
        """Every option."""
        ...

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        ...

    @property
    def plan(self) -> Sizes:
        """The batches of training."""
        ...

    @property
    def eval_plans(self) -> Mapping[str, Sizes]:
        """Those of evaluations."""
        ...

    @property
    def reads_values(self) -> bool:
        """Whether steps read the reference's log-probabilities from the batch."""
        ...


class Programs:
    """The train step and the eval step of a run; nothing is compiled before `compile`.

    Args:
        model: its arrays that are not trained are given to every step.
    """

    def __init__(
        self,
        run: Outline,
        model: Decoder,
        reference: Reference,
        optimizer: Optimizer,
    ):
        self._run = run
        self.graphdef, params, self.frozen = split_model(model)
        # Of shapes: a step uses the arrays up.
        self._model = nnx.merge(self.graphdef, *abstract_arrays((params, self.frozen)))
        self._reference = reference
        self._optimizer = optimizer
        self._train: Compiled | None = None
        self._evaluation: Compiled | None = None

    @functools.cached_property
    def _numbers(self) -> LossOptions:
        """What the loss is given, on every device."""
        return jax.tree.map(
            lambda x: put_whole(np.float32(x), self._run.mesh),
            loss_options(self._run.arguments),
        )

    @property
    def compiled(self) -> list[Compiled]:
        """Those that there are."""
        return [x for x in (self._train, self._evaluation) if x is not None]

    def compile(self, *, training: bool) -> None:
        """Make the train step, if asked to, and the eval step, if there is a set."""
        requests: dict[str, Request] = {}
        if training and self._train is None:
            if self._model.remat == AUTO:
                self._train = self._least_recomputed()
            else:
                requests["train"] = self.train_request()
        if self._run.eval_plans and self._evaluation is None:
            requests["evaluation"] = self._eval_request()
        if requests:
            found = compile_all(list(requests.values()))
            made = dict(zip(requests, found, strict=True))
            self._train = made.get("train", self._train)
            self._evaluation = made.get("evaluation", self._evaluation)

    def _least_recomputed(self) -> Compiled:
        """The train step that recomputes no more than the devices' memory demands."""
        platform = self._run.mesh.devices.flat[0].platform
        limit = limit_bytes(self._run.mesh)
        most = math.inf if limit is None else _USABLE * limit
        *keeping, last = remats_of_auto(limit is not None)
        for remat in keeping:
            self._model.remat = remat
            with contextlib.suppress(TooLittleMemory):
                (step,) = compile_all([self.train_request()])
                taken = step.taken(platform)
                if taken is not None and taken.peak <= most:
                    logger.info("model.remat=auto is %s, which fits", remat)
                    return step
            logger.info("model.remat=auto: %s does not fit", remat)
        self._model.remat = last
        logger.info("model.remat=auto is %s", last)
        (step,) = compile_all([self.train_request()])
        return step

    def train(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepOut]:
        """A step of training, which uses the state up."""
        assert self._train is not None, "compile() comes first"
        return self._train(state, *self._operands(batch))

    def evaluate(self, params: Params, batch: Batch) -> Sums:
        """The sums of a batch under these parameters."""
        assert self._evaluation is not None, "compile() comes first"
        return self._evaluation(params, *self._operands(batch))

    def _operands(self, batch: Batch) -> tuple[Any, ...]:
        """What a step is given behind what it changes or scores."""
        return self.frozen, self._reference.operands, batch, self._numbers

    def train_request(self) -> Request:
        """The train step and all that it is compiled for."""
        run = self._run
        step = make_train_step(
            self._model,
            self._reference,
            self._optimizer,
            learning_rate_schedule(run.arguments, run.plan.steps),
            step_options(run.arguments),
        )
        return Request(step, self._abstract_arguments([run.plan], self.abstract_state))

    def _eval_request(self) -> Request:
        run = self._run
        step = make_eval_step(self._model, self._reference, step_options(run.arguments))
        plans, params = run.eval_plans.values(), self.abstract_state.params
        return Request(step, self._abstract_arguments(plans, params))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return abstract_state(self._model, self._optimizer)

    def _abstract_arguments(
        self, plans: Iterable[Sizes], first: TrainState | Params
    ) -> dict[Shape, tuple[Any, ...]]:
        """What a step is compiled for, by shape; `first`: what it changes or scores."""
        run = self._run
        frozen, operands = abstract_arrays((self.frozen, self._reference.operands))
        whole = place(PartitionSpec(), run.mesh)
        numbers = jax.tree.map(
            lambda _: jax.ShapeDtypeStruct((), np.float32, sharding=whole),
            loss_options(run.arguments),
        )
        return {
            shape: (
                first,
                frozen,
                operands,
                abstract_batch(
                    shape,
                    plan.grid,
                    run.mesh,
                    run.reads_values,
                    run.arguments.arrangement,
                ),
                numbers,
            )
            for plan in plans
            for shape in plan.shapes
        }
