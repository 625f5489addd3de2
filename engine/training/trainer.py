"""A prepared run and its weights: train, evaluate, save."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan
from engine.errors import InputError
from engine.models import Decoder, save_pretrained
from engine.objective.references import (
    FrozenModel,
    NoReference,
    Reference,
    SyncedModel,
    model_for_reference,
)
from engine.parallel.batch import Batch, abstract_batch
from engine.parallel.sharding import place
from engine.paths import as_path
from engine.training.compilation import (
    Compiled,
    Request,
    compile_all,
    keep_programs,
)
from engine.training.evaluation import check_finite, evaluate
from engine.training.events import Listener, Listeners
from engine.training.listeners import MetricsFile, Terminal, WandB
from engine.training.loop import Loop, Progress
from engine.training.metrics import Sums
from engine.training.optimizer import learning_rate_schedule, make_optimizer
from engine.training.prepare import (
    Prepared,
    loss_options,
    step_options,
)
from engine.training.step import (
    StepOut,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    split_model,
)

logger = logging.getLogger(__name__)


class Trainer:
    """A run that has passed every check, with its weights.

    Args:
        run: what `prepare` returns.
        model: its arrays become the trainer's, and it is unusable while `train` runs;
            when that returns it holds the trained ones.
        reference_model: likewise, for good; None is `model` as it is now.
        listeners: are told of every step and every line of metrics, after the file.
    """

    def __init__(
        self,
        run: Prepared,
        model: Decoder,
        reference_model: Decoder | None,
        listeners: tuple[Listener, ...] = (),
    ):
        keep_programs()
        self.run = run
        self._listeners = listeners
        self._given = model
        arguments = run.arguments
        self._reference = make_reference(model, reference_model, arguments)
        self._graphdef, _, self._frozen = split_model(model)
        total = run.plan.steps
        self._optimizer = make_optimizer(arguments, model.config, total)
        self.state = init_state(model, self._optimizer)
        self.progress = Progress()
        whole = place(P(), model.mesh)
        self._numbers = jax.tree.map(
            lambda x: jax.device_put(jnp.float32(x), whole), loss_options(arguments)
        )
        self._steps: tuple[Compiled, Compiled | None] | None = None

    @property
    def arguments(self) -> DPOConfig:
        """Every option."""
        return self.run.arguments

    @property
    def plan(self) -> BatchPlan:
        """The batches of the run."""
        return self.run.plan

    @property
    def num_tokens(self) -> int:
        """Unpadded tokens that have gone through the policy."""
        return self.progress.tokens

    @property
    def model(self) -> Decoder:
        """The policy as it is now. The next training step uses its arrays up."""
        return nnx.merge(self._graphdef, self.state.params, self._frozen)

    def train(self) -> dict[str, float]:
        """Run every step, write metrics and the trained model; the last metrics.

        Raises:
            InputError: something is no longer a finite number; or training is over.
        """
        if self.progress.step >= self.run.plan.steps:
            raise InputError(
                f"all {self.run.plan.steps} steps of this trainer are done; make a new "
                "trainer of its model to go on"
            )
        directory = as_path(self.arguments.save_directory)
        train_step, _ = self._compiled()
        listener = Listeners((*self._default_listeners(directory), *self._listeners))

        def dispatch(batch: Batch, step: int) -> StepOut:
            self.state, out = train_step(
                self.state,
                self._frozen,
                self._reference.operands,
                batch,
                self._numbers,
            )
            self._reference.update(self.state.params, step)
            return out

        loop = Loop(
            self.arguments,
            self.run.plan,
            self.run.mesh,
            dispatch=dispatch,
            evaluations={
                prefix: self._evaluation(prefix) for prefix in self.run.eval_plans
            },
            listener=listener,
            progress=self.progress,
        )
        with _told(listener, self.run.plan.steps, self.progress.step):
            try:
                loop.run()
            finally:
                self.progress = loop.progress
                nnx.update(self._given, self.state.params)
        self.save_model(directory)
        return loop.latest

    def _default_listeners(self, directory: Path) -> Iterator[Listener]:
        arguments = self.arguments
        yield MetricsFile(directory)
        yield Terminal(arguments.model_name, arguments.progress_bar)
        if arguments.use_wandb:
            yield WandB(arguments, directory)

    def _evaluation(self, prefix: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            found = self._evaluate(prefix)
            check_finite(found, prefix, int(self.state.step))
            return found

        return run

    def evaluate(self) -> dict[str, float]:
        """TRL's metrics over the whole of `eval_dataset`, each name after `eval_`.

        Raises:
            InputError: the trainer was made without an `eval_dataset`.
        """
        if not self.run.eval_plans:
            raise InputError("evaluate() needs an eval_dataset; give the trainer one")
        found: dict[str, float] = {}
        for prefix in self.run.eval_plans:
            found |= self._evaluate(prefix)
            found[f"{prefix}num_tokens"] = self.num_tokens
        return found

    def _evaluate(self, prefix: str) -> dict[str, float]:
        _, eval_step = self._compiled()
        assert eval_step is not None

        def score(batch: Batch) -> Sums:
            return eval_step(
                self.state.params,
                self._frozen,
                self._reference.operands,
                batch,
                self._numbers,
            )

        found = evaluate(score, self.run.eval_plans[prefix], self.run.mesh)
        return {f"{prefix}{name}": value for name, value in found.items()}

    def _compiled(self) -> tuple[Compiled, Compiled | None]:
        """The train and the eval step, compiled for every shape of the run."""
        if self._steps is None:
            self._steps = self._compile()
        return self._steps

    def _compile(self) -> tuple[Compiled, Compiled | None]:
        run, model = self.run, self.model
        options = step_options(run.arguments)
        schedule = learning_rate_schedule(run.arguments, run.plan.steps)
        state = abstract_state(model, self._optimizer)
        rest = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (self._frozen, self._reference.operands, self._numbers),
        )
        frozen, operands, numbers = rest

        def arguments_of(plans: Any, first: Any) -> dict[tuple[int, int], tuple]:
            return {
                shape: (
                    first,
                    frozen,
                    operands,
                    abstract_batch(shape, plan.layout.grid, run.mesh),
                    numbers,
                )
                for plan in plans
                for shape in plan.shapes
            }

        train_step = make_train_step(
            model, self._reference, self._optimizer, schedule, options
        )
        requests: list[Request] = [(train_step, 3, arguments_of([run.plan], state))]
        if run.eval_plans:
            eval_step = make_eval_step(model, self._reference, options)
            requests.append(
                (eval_step, 3, arguments_of(run.eval_plans.values(), state.params))
            )
        train, *evaluation = compile_all(requests)
        return train, evaluation[0] if evaluation else None

    def save_model(self, directory: str | Path) -> None:
        """Write the model and its tokenizer in Hugging Face form."""
        save_pretrained(
            self.model,
            directory,
            tokenizer=self.run.tokenizer,
            dtype=self.arguments.save_dtype,
        )
        logger.info("saved the model and its tokenizer in %s", directory)


def make_reference(
    policy: Decoder, given: Decoder | None, arguments: DPOConfig
) -> Reference:
    """Where the reference's log-probabilities come from."""
    if arguments.reference_free:
        return NoReference()
    synced = arguments.sync_ref_model
    model = model_for_reference(policy, given, synced=synced)
    if not synced:
        return FrozenModel(model)
    return SyncedModel(
        model,
        every=arguments.ref_model_sync_steps,
        alpha=arguments.ref_model_mixup_alpha,
    )


@contextmanager
def _told(listener: Listener, total_steps: int, done: int) -> Iterator[None]:
    """Tells a listener of a run's beginning and end."""
    error: BaseException | None = None
    try:
        listener.started(total_steps, done)
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        listener.ended(error)
