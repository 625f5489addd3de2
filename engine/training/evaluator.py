"""A model that is scored and not trained: no optimizer, no state."""

from collections.abc import Iterable

import jax
import numpy as np

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan
from engine.models import Decoder
from engine.objective.references import Reference, reads_values
from engine.parallel.batch import Batch, abstract_batch, put_whole
from engine.training.compilation import Request, compile_all, enough_memory
from engine.training.evaluation import estimate
from engine.training.intervals import Estimate
from engine.training.metrics import PairValues
from engine.training.prepare import loss_options, step_options
from engine.training.step import make_pairs_step, split_model


class Evaluator:
    """Scores pairs under a model, for some plans whose shapes are compiled at once."""

    def __init__(
        self,
        arguments: DPOConfig,
        model: Decoder,
        reference: Reference,
        plans: Iterable[BatchPlan],
    ):
        self._mesh = model.mesh
        _, params, frozen = split_model(model)
        numbers = jax.tree.map(
            lambda x: put_whole(np.float32(x), model.mesh), loss_options(arguments)
        )
        self._first = params, frozen, reference.operands
        self._numbers = numbers
        *first, last = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (*self._first, numbers),
        )
        brings = reads_values(reference)
        requests = {
            shape: (
                *first,
                abstract_batch(
                    shape,
                    plan.layout.grid,
                    model.mesh,
                    brings,
                    plan.layout.arrangement,
                ),
                last,
            )
            for plan in plans
            for shape in plan.shapes
        }
        step = make_pairs_step(model, reference, step_options(arguments))
        (self._step,) = compile_all([Request(step, requests)])

    def estimate(self, plan: BatchPlan) -> dict[str, Estimate]:
        """Every metric over the pairs of a plan."""

        def score(batch: Batch) -> PairValues:
            return self._step(*self._first, batch, self._numbers)

        with enough_memory():
            return estimate(score, plan, self._mesh)
