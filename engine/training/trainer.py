"""The loop: dispatch a step, read the one before, evaluate, save."""

import dataclasses
import functools
import importlib
import itertools
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from engine.config.dpo import DPOConfig
from engine.data.pairs import Batch, prefetch
from engine.errors import InputError
from engine.models import Decoder, load_model, save_pretrained
from engine.objective.references import make_reference, sync_reference
from engine.training.metrics import MetricsFile, Window, means
from engine.training.optimizer import learning_rate_schedule, make_optimizer
from engine.training.preparation import (
    PreferenceData,
    check_vocabulary,
    check_workspace,
    plan_evaluation,
    plan_training,
    prepare_pairs,
    step_options,
    total_steps,
)
from engine.training.step import (
    Sums,
    init_state,
    make_eval_step,
    make_train_step,
    put_batch,
)

logger = logging.getLogger(__name__)


class DPOTrainer:
    """Preference-tunes a model on pairs of completions.

    Args:
        model: what `load_model` returns, or a directory or hub id to load. Training
            uses up its arrays; when `train` returns it holds the trained ones.
        reference_model: what rewards are measured from; None is `model` as it is now.
        arguments: every option.
        train_dataset: rows with prompt, chosen and rejected, as text or as messages;
            a `datasets.Dataset`, a list of dicts, or what `prepare_pairs` returns.
        eval_dataset: likewise, held out.
        processing_class: the tokenizer.
    Raises:
        InputError: data, options, model and mesh that do not fit together.
    """

    def __init__(
        self,
        *,
        model: Decoder | str | Path,
        reference_model: Decoder | str | Path | None = None,
        arguments: DPOConfig | None = None,
        train_dataset: PreferenceData,
        eval_dataset: PreferenceData | None = None,
        processing_class: PreTrainedTokenizerBase,
    ):
        """Tokenises the data and makes the state; nothing is written yet."""
        self.arguments = arguments = arguments or DPOConfig()
        self.tokenizer = processing_class
        pairs = prepare_pairs(arguments, train_dataset, processing_class)
        eval_pairs = None
        if eval_dataset is not None:
            eval_pairs = prepare_pairs(arguments, eval_dataset, processing_class)
        elif arguments.eval_steps is not None:
            raise InputError(
                f"eval_steps={arguments.eval_steps} has no effect without an "
                "eval_dataset; remove it or give some data to evaluate"
            )
        self.model = model if isinstance(model, Decoder) else load_model(model)
        if isinstance(reference_model, str | Path):
            reference_model = load_model(reference_model, mesh=self.model.mesh)
        config, mesh = self.model.config, self.model.mesh
        check_vocabulary(config, processing_class, pairs, eval_pairs)
        check_workspace(arguments, config, self.model.dtype)
        self.plan = plan_training(arguments, pairs, mesh)
        self.eval_plan = None
        if eval_pairs is not None:
            self.eval_plan = plan_evaluation(arguments, eval_pairs, mesh)
        self.total_steps = total_steps(arguments, self.plan)
        self.reference = make_reference(
            self.model,
            reference_model,
            reference_free=arguments.reference_free,
            synced=arguments.sync_ref_model,
        )
        self._ref_params = (
            None if self.reference is None else nnx.state(self.reference, nnx.Param)
        )
        self._schedule = learning_rate_schedule(arguments, self.total_steps)
        optimizer = make_optimizer(arguments, config, self.total_steps)
        options = step_options(arguments)
        self._train_step = make_train_step(
            self.model, self.reference, optimizer, options
        )
        self._eval_step = make_eval_step(self.model, self.reference, options)
        self._sync = jax.jit(
            functools.partial(sync_reference, alpha=arguments.ref_model_mixup_alpha),
            donate_argnums=0,
        )
        self.state = init_state(self.model, optimizer)
        self.num_tokens = 0

    def train(self) -> dict[str, float]:
        """Run every step, write metrics and the trained model; the last metrics.

        Raises:
            InputError: the loss is no longer a finite number.
        """
        directory = Path(self.arguments.save_directory)
        self._log = _Log(self.arguments, directory, self.total_steps)
        try:
            self._run_steps()
        finally:
            self._log.close()
            nnx.update(self.model, self.state.params)
        self.save_model(directory)
        return self._log.latest

    def _run_steps(self) -> None:
        arguments, mesh = self.arguments, self.model.mesh
        window, pending = Window(), None
        steps = itertools.islice(self._epochs(), self.total_steps)
        clock = time.perf_counter()
        for step, (epoch, batch, num_tokens) in enumerate(steps, start=1):
            self.state, sums = self._train_step(
                self.state, self._ref_params, put_batch(batch, mesh)
            )
            # Read only now, while the new step runs: the log never waits for it.
            if pending is not None:
                clock = self._record(window, *pending, clock)
            pending = (step, epoch, sums, num_tokens)
            if arguments.sync_ref_model and step % arguments.ref_model_sync_steps == 0:
                self._ref_params = self._sync(self._ref_params, self.state.params)
            last = step == self.total_steps
            due = arguments.eval_steps and step % arguments.eval_steps == 0
            if last or (due and self.eval_plan is not None):
                self._record(window, *pending, clock)
                pending = None
                if last and window.steps:
                    self._write(window, step, epoch)
                if self.eval_plan is not None:
                    self._log.write({"step": step, "epoch": epoch} | self.evaluate())
                clock = time.perf_counter()

    def _epochs(self) -> Iterator[tuple[float, Batch, int]]:
        """(epoch, batch, tokens) of each step; epochs count microbatches, like TRL."""
        size = self.arguments.microbatch_size
        pairs = len(self.plan.pairs)
        pairs = min(
            pairs, self.plan.batches_per_epoch * self.arguments.total_batch_size
        )
        for index in range(self.arguments.num_train_epochs):
            done = 0
            for batch, tokens in prefetch(self.plan.batches(index)):
                done += int(batch.weights.sum())
                yield index + -(-done // size) / -(-pairs // size), batch, tokens

    def _record(
        self,
        window: Window,
        step: int,
        epoch: float,
        sums: Sums,
        num_tokens: int,
        clock: float,
    ) -> float:
        """Wait for a step, and write its line if it is time; the time it was done."""
        host_sums = {name: float(x) for name, x in jax.device_get(sums).items()}
        now = time.perf_counter()
        self.num_tokens += num_tokens
        window.add(host_sums, now - clock, num_tokens)
        self._log.advance(window)
        if not math.isfinite(host_sums["loss"]):
            self._write(window, step, epoch)
            raise InputError(
                f"step {step}: the loss is {host_sums['loss']}; lower learning_rate, "
                f"or look at the data; the metrics so far are in {self._log.file.path}"
            )
        if step % self.arguments.log_steps == 0:
            self._write(window, step, epoch)
        return now

    def _write(self, window: Window, step: int, epoch: float) -> None:
        line = {
            "step": step,
            "epoch": epoch,
            "learning_rate": float(self._schedule(step - 1)),
            "num_tokens": self.num_tokens,
        }
        self._log.write(line | window.close())

    def evaluate(self) -> dict[str, float]:
        """TRL's metrics over the whole of `eval_dataset`, each name after `eval_`.

        Raises:
            InputError: the trainer was made without an `eval_dataset`.
        """
        if self.eval_plan is None:
            raise InputError("evaluate() needs an eval_dataset; give the trainer one")
        began = time.perf_counter()
        totals: dict[str, float] = {}
        for batch, _ in prefetch(self.eval_plan.batches(0)):
            sums = self._eval_step(
                self.state.params, self._ref_params, put_batch(batch, self.model.mesh)
            )
            for name, x in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(x)
        found = means(totals) | {"num_tokens": self.num_tokens}
        found["perf/seconds"] = time.perf_counter() - began
        return {f"eval_{name}": value for name, value in found.items()}

    def save_model(self, directory: str | Path) -> None:
        """Write the model and its tokenizer in Hugging Face form."""
        nnx.update(self.model, self.state.params)
        save_pretrained(self.model, directory)
        self.tokenizer.save_pretrained(directory)
        logger.info("saved the model and its tokenizer in %s", directory)


class _Log:
    """Metrics go to the file, to the progress bar or the terminal, and to wandb."""

    def __init__(self, arguments: DPOConfig, directory: Path, total_steps: int):
        self.file = MetricsFile(directory)
        self.latest: dict[str, float] = {}
        # disable=None: no bar where the output is no terminal; a line a record then.
        self.bar = tqdm(
            total=total_steps,
            desc=arguments.model_name,
            unit="step",
            disable=None if arguments.progress_bar else True,
        )
        self.wandb = None
        if arguments.use_wandb:
            # No dependency of ours: DPOConfig has checked that it is installed.
            self.wandb = importlib.import_module("wandb").init(
                name=arguments.model_name,
                dir=str(directory),
                config=dataclasses.asdict(arguments),
            )

    def advance(self, window: Window) -> None:
        """One step is done: move the bar."""
        self.bar.update(1)
        newest = window.steps[-1]
        self.bar.set_postfix_str(
            f"loss {newest['loss']:.4f}, margin {newest['rewards/margins']:.3f}, "
            f"accuracy {newest['rewards/accuracies']:.2f}, "
            f"{window.tokens / max(window.seconds, 1e-9):,.0f} tokens/s",
            refresh=False,
        )

    def write(self, line: dict[str, Any]) -> None:
        """One line of metrics, to everyone who listens."""
        self.latest |= line
        self.file.write(line)
        if self.wandb is not None:
            self.wandb.log(line, step=line["step"])
        prefix = "eval_" if "eval_loss" in line else ""
        shown = [
            f"{name} {line[prefix + key]:.4f}"
            for name, key in (
                ("loss", "loss"),
                ("margin", "rewards/margins"),
                ("accuracy", "rewards/accuracies"),
            )
        ]
        kind = "eval " if prefix else ""
        text = f"{kind}step {line['step']}: {', '.join(shown)}"
        if prefix and not self.bar.disable:
            self.bar.write(text)
        elif self.bar.disable:
            logger.info(text)

    def close(self) -> None:
        """End the bar and the wandb run."""
        self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
