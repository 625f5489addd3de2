"""A prepared run and its weights: train, evaluate, save."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from engine.config.dpo import DPOConfig
from engine.data.stream_plans import Plan
from engine.errors import InputError
from engine.models import Decoder, save_pretrained
from engine.objective.references import Cached, SyncedModel
from engine.parallel import processes
from engine.parallel.batch import Batch
from engine.paths import as_path
from engine.training.attention_check import check_attention
from engine.training.checkpointing import Checkpointing
from engine.training.compilation import (
    enough_memory,
    keep_programs,
)
from engine.training.evaluation import NotFinite, check_finite, evaluate
from engine.training.events import Generation, Listener, Listeners, telling
from engine.training.form_check import check_form
from engine.training.generations import ask
from engine.training.listeners import MetricsFile, own_listeners
from engine.training.loop import Loop
from engine.training.metrics import Sums
from engine.training.optimizer import make_optimizer
from engine.training.precompute import with_reference_values
from engine.training.prepare import Prepared
from engine.training.programs import Programs
from engine.training.progress import Progress
from engine.training.records import described
from engine.training.reference import make_reference
from engine.training.resume import (
    changing,
    identity,
    starts_as_reference,
    take_back,
)
from engine.training.signals import finishing_steps
from engine.training.start_check import ReferenceCheck, StartCheck
from engine.training.step import (
    StepOut,
    init_state,
)

logger = logging.getLogger(__name__)


class Trainer:
    """A run that has passed every check, with its weights.

    Args:
        run: what `prepare` returns.
        model: its arrays become the trainer's, and it is unusable while `train` runs;
            when that returns it holds the trained ones.
        reference_model: likewise, for good; None is `model` as it is now. Where it is
            scored before the first step, its arrays are deleted.
        listeners: are told of every step and every line of metrics, after the file.
        config: by dotted keys, what else must be the same where a run goes on.
    """

    def __init__(
        self,
        run: Prepared,
        model: Decoder,
        reference_model: Decoder | None,
        listeners: Iterable[Listener] = (),
        config: Mapping[str, Any] = MappingProxyType({}),
    ):
        keep_programs()
        # Before the reference's weights may be freed.
        self._starts_as_reference = starts_as_reference(run, model, reference_model)
        self._answers = ask(run, model, reference_model)
        self.run = run = with_reference_values(run, model, reference_model)
        arguments = run.arguments
        metrics = MetricsFile(as_path(arguments.save_directory))
        own = own_listeners(arguments, run.about.config)
        own = (metrics, *own) if processes.is_first() else ()
        self._listeners = Listeners((*own, *listeners))
        self._model_given = model
        self._reference = (
            Cached()
            if run.reads_values
            else make_reference(model, reference_model, arguments)
        )
        if self._answers is not None and isinstance(self._reference, SyncedModel):
            self._answers.compile(self._reference.decoder)
        steps = run.plan.steps
        optimizer = make_optimizer(arguments, model.config, run.mesh, steps)
        self._programs = Programs(run, model, self._reference, optimizer)
        self.state = init_state(model, optimizer)
        self.progress = Progress()
        self._checkpointing = Checkpointing(
            arguments,
            steps,
            metrics,
            progress=self.progress,
            arrays=lambda: changing(self.state, self._reference),
            identity=lambda: identity(
                run, config, self._programs.frozen, self._reference
            ),
            best=run.best_model,
        )
        self._failure: NotFinite | None = None
        self._saved = False

    @property
    def arguments(self) -> DPOConfig:
        """Every option."""
        return self.run.arguments

    @property
    def plan(self) -> Plan:
        """The batches of the run."""
        return self.run.plan

    @property
    def num_tokens(self) -> int:
        """Unpadded tokens that have gone through the policy."""
        return self.progress.tokens

    @property
    def model(self) -> Decoder:
        """The policy as it is now. The next training step uses its arrays up."""
        programs = self._programs
        return nnx.merge(programs.graphdef, self.state.params, programs.frozen)

    def train(self) -> dict[str, float]:
        """Run every step, write metrics and the trained model; the last metrics.

        After an interruption it goes on with the next step, and in a new process from
        the newest checkpoint in `save_directory`, unless `resume` is False.

        Raises:
            InputError: something is no longer a finite number; training is over; the
                model's arrays have been used up elsewhere; or see `Checkpointing`.
            Interrupted: SIGTERM or Ctrl-C; the step before it is saved.
        """
        self._check_usable()
        if self._saved:
            raise InputError(
                f"all {self.run.plan.steps} steps of this trainer are done; make a new "
                "trainer of its model to go on"
            )
        if not self.progress.step:
            found = self._checkpointing.restore(
                changing(self._programs.abstract_state, self._reference)
            )
            if found is not None:
                self.state = take_back(found, self._reference)
        self._checkpointing.begin(self.run.mesh)
        programs, check = self._programs, self._checks()
        # Last, since it gives back what compilers have freed.
        programs.compile(training=True)

        def dispatch(batch: Batch, step: int) -> StepOut:
            self.state, out = programs.train(self.state, batch)
            self._reference.update(self.state.params, programs.frozen, step)
            return out

        loop = Loop(
            self.arguments,
            self.run.plan,
            self.run.mesh,
            dispatch=dispatch,
            evaluations={
                prefix: functools.partial(self._evaluate_while_training, prefix)
                for prefix in self.run.eval_plans
            },
            listener=self._listeners,
            progress=self.progress,
            check_first=check,
            rows=self.run.rows_of_step,
            saving=self._checkpointing,
            best=self.run.best_model,
            generate=self._generate if self._answers is not None else None,
        )
        with telling(self._described(), self.run.plan.steps, self.progress.step):
            try:
                with enough_memory(), finishing_steps(self._checkpointing.stop):
                    loop.run()
            except NotFinite as error:
                where = self._checkpointing.newest()
                self._failure = NotFinite(f"{error}; {where}")
                raise self._failure from None
            finally:
                nnx.update(self._model_given, self.state.params)
                self._checkpointing.close()
            if self.arguments.load_best_model_at_end:
                self._take_best()
            self.save_model(self.arguments.save_directory)
        self._checkpointing.finished()
        self._saved = True
        return self.progress.latest

    def _checks(self) -> Callable[[StepOut], None] | None:
        """Compare what devices compute, before they do; and what to do with step 1."""
        run, model, first = self.run, self.model, not self.progress.step
        if not self.arguments.start_check:
            return None
        check_attention(run.model, run.arguments, model.dtype, run.mesh)
        if not first:  # what goes on has been compared
            return None
        check_form(run, model)
        if self.arguments.without_reference:
            return None
        if self._starts_as_reference:
            return StartCheck(self.arguments, model.dtype)
        return ReferenceCheck(run.model.vocab_size, model.dtype)

    def _generate(self) -> list[Generation]:
        assert self._answers is not None
        reference = self._reference
        synced = reference.decoder if isinstance(reference, SyncedModel) else None
        return self._answers(self.model, synced)

    def _take_best(self) -> None:
        """Become the model that was the best, if it is another one."""
        abstract = changing(self._programs.abstract_state, self._reference)
        found = self._checkpointing.load_best(abstract)
        if found is not None:
            self.state = take_back(found, self._reference)
            nnx.update(self._model_given, self.state.params)

    def _described(self) -> Listener:
        """All listeners, of a run whose description is printed and will be kept."""
        about = described(self.run, self._programs.compiled)
        kept = [about] if processes.is_first() else []
        return Listeners((self._listeners, *kept))

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise self._failure
        held = jax.tree.leaves((self.state.params, self._programs.frozen))
        if any(x.is_deleted() for x in held):
            raise InputError(
                "the arrays of this trainer's model have been used up by another "
                "trainer; load the model anew for each"
            )

    def _evaluate_while_training(self, prefix: str) -> dict[str, float]:
        metrics = self._evaluate(prefix)
        check_finite(metrics, prefix, self.progress.step)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """TRL's metrics over the whole of `eval_dataset`, each name after `eval_`.

        Raises:
            InputError: the trainer was made without an `eval_dataset`.
        """
        if not self.run.eval_plans:
            raise InputError("evaluate() needs an eval_dataset; give the trainer one")
        metrics: dict[str, float] = {}
        for prefix in self.run.eval_plans:
            metrics |= self._evaluate(prefix)
        return metrics

    def _evaluate(self, prefix: str) -> dict[str, float]:
        programs, plan = self._programs, self.run.eval_plans[prefix]
        programs.compile(training=False)

        def score(batch: Batch) -> Sums:
            return programs.evaluate(self.state.params, batch)

        metrics = evaluate(score, plan, self.run.mesh) | {"num_tokens": self.num_tokens}
        return {f"{prefix}{name}": value for name, value in metrics.items()}

    def save_model(self, directory: str | Path) -> None:
        """Write the model and its tokenizer in Hugging Face form.

        Raises:
            InputError: a directory that cannot be written; a model that training has
                made unusable.
        """
        self._check_usable()
        save_pretrained(
            self.model,
            directory,
            tokenizer=self.run.tokenizer,
            dtype=self.arguments.save_dtype,
        )
        logger.info("saved the model and its tokenizer in %s", directory)
