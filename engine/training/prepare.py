"""What a run derives from options, data, models and mesh, and every check of it.

Nothing here reads a weight: `dpo validate` and `dpo train` refuse the same things.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from engine import __version__
from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan
from engine.data.pair_streams import PairStream
from engine.data.pairs import (
    Limits,
    PairTokens,
    PreferenceRows,
    check_limits,
    tokenize_pairs,
    warn_beyond_positions,
)
from engine.data.row_streams import RowStream
from engine.data.stream_plans import Plan
from engine.errors import InputError
from engine.models import DecoderConfig, max_positions
from engine.objective.interface import LossOptions
from engine.objective.scoring import ScoringOptions
from engine.parallel import processes
from engine.training.about import About
from engine.training.best import BestModel, best_model
from engine.training.checks import check_models, check_op
from engine.training.identity import checksum_of_pairs, flat
from engine.training.metrics import metric_names
from engine.training.plans import (
    plan_evaluation,
    plan_stream,
    plan_training,
    rows_of_batch,
)
from engine.training.schedules import check_schedule
from engine.training.step import StepOptions
from engine.training.streams import (
    check_no_values,
    checked,
    prepare_stream,
)

EVAL = "eval_"  # before the names of an evaluation's metrics

PreferenceData = (
    PairTokens | PreferenceRows | datasets.Dataset | Sequence[Mapping[str, Any]]
)
TrainingData = PreferenceData | RowStream | datasets.IterableDataset


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that has passed every check, without its weights."""

    arguments: DPOConfig
    mesh: Mesh
    model: DecoderConfig
    tokenizer: PreTrainedTokenizerBase
    train: PairTokens | PairStream
    plan: Plan
    evaluations: dict[str, PairTokens]  # by the prefix of their metrics' names
    eval_plans: dict[str, BatchPlan]
    about: About
    best_model: BestModel | None = None  # how evaluations are compared

    @property
    def sets(self) -> dict[str, tuple[PairTokens, BatchPlan]]:
        """Each data set that is held, and its batches; the training set under ""."""
        sets = {}
        if isinstance(self.train, PairTokens):
            assert isinstance(self.plan, BatchPlan)
            sets[""] = self.train, self.plan
        return sets | {
            prefix: (pairs, self.eval_plans[prefix])
            for prefix, pairs in self.evaluations.items()
        }

    def rows_of_step(self, step: int) -> str:
        """Which rows of the data a step's pairs come from, in words."""
        if "" not in self.sets:
            return f"those of batch {step} of a stream, which keeps no row numbers"
        return rows_of_batch(*self.sets[""], step - 1)

    @property
    def reads_values(self) -> bool:
        """Whether steps read the reference's log-probabilities from the batch."""
        if self.arguments.without_reference:
            return False
        return self.arguments.precompute_ref_log_probs or self.has_values

    @property
    def brings_values(self) -> bool:
        """Whether the training set has the reference's log-probabilities with it."""
        return isinstance(self.train, PairTokens) and self.train.ref_logps is not None

    @property
    def has_values(self) -> bool:
        """Whether the data brings them all, so that no reference is needed."""
        if isinstance(self.train, PairStream):
            return False
        return all(pairs.ref_logps is not None for pairs, _ in self.sets.values())

    def with_ref_logps(self, values: Mapping[str, np.ndarray]) -> "Prepared":
        """The run with these log-probabilities, by the names of `sets`."""
        sets = {
            key: replace(pairs, ref_logps=values.get(key, pairs.ref_logps))
            for key, (pairs, _) in self.sets.items()
        }
        train, (_, plan) = sets.pop(""), self.sets[""]
        return replace(
            self,
            train=train,
            plan=plan.of(train),
            evaluations=sets,
            eval_plans={k: self.eval_plans[k].of(x) for k, x in sets.items()},
        )


def prepare(
    arguments: DPOConfig,
    *,
    mesh: Mesh,
    model: DecoderConfig,
    reference: DecoderConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    train: PairTokens | PairStream,
    evaluations: Mapping[str, PairTokens],
    about: About,
    reference_dtype: Any = None,
) -> Prepared:
    """Check that everything fits together, and plan the batches.

    Raises:
        InputError: whatever does not.
    """
    sets = _held_sets(train, evaluations)
    check_models(arguments, mesh, model, reference, tokenizer, sets)
    positions = max_positions(model)
    if isinstance(train, PairStream):
        train = checked(train, model.vocab_size, positions)
    if not evaluations and (option := arguments.without_effect_alone()):
        raise InputError(
            f"{option} has no effect without an eval_dataset; remove it or give some "
            "data to evaluate"
        )
    if isinstance(train, PairStream):
        plan = plan_stream(arguments, train, mesh)
    else:
        plan = plan_training(arguments, train, mesh)
    check_schedule(arguments, plan.steps)
    best = _best_model(arguments, tuple(evaluations), plan.steps)
    eval_plans = {
        prefix: plan_evaluation(arguments, pairs, mesh)
        for prefix, pairs in evaluations.items()
    }
    for some in (plan, *eval_plans.values()):
        for of in dict.fromkeys((about.dtype, reference_dtype or about.dtype)):
            check_op(arguments, model, of, some, mesh)
    if isinstance(train, PairTokens):
        warn_beyond_positions(train, arguments.max_length, positions)
    _check_processes(arguments, about, train, evaluations)
    return Prepared(
        arguments=arguments,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        train=train,
        plan=plan,
        evaluations=dict(evaluations),
        eval_plans=eval_plans,
        about=about,
        best_model=best,
    )


def _check_processes(
    arguments: DPOConfig,
    about: About,
    train: PairTokens | PairStream,
    evaluations: Mapping[str, PairTokens],
) -> None:
    """Refuse processes that would not compute the same.

    Raises:
        InputError: with the first thing that differs.
    """
    if processes.count() == 1:
        return
    pairs = train.head[1] if isinstance(train, PairStream) else train
    sets = {"train_dataset": pairs} | {f"{x}dataset": y for x, y in evaluations.items()}
    versions = {"dpo-engine": __version__, "jax": jax.__version__}
    facts = flat(arguments, "trainer") | flat(about.config) | versions
    facts |= {name: checksum_of_pairs(pairs) for name, pairs in sets.items()}
    processes.check_same(facts, "the processes of this run differ")


def _best_model(
    arguments: DPOConfig, prefixes: tuple[str, ...], steps: int
) -> BestModel | None:
    """How evaluations are compared.

    Raises:
        InputError: a metric that there is not; or one evaluation only.
    """
    names = metric_names(arguments.loss, loss_options(arguments))
    found = best_model(arguments, prefixes, names)
    every = arguments.eval_steps
    if found is not None and every is not None and every >= steps:
        raise InputError(
            f"{arguments.comparing} compares the evaluations of a run, and with "
            f"eval_steps={every} there is one, at the end of its {steps} steps; lower "
            "eval_steps"
        )
    return found


def _held_sets(
    train: PairTokens | PairStream, evaluations: Mapping[str, PairTokens]
) -> dict[str, PairTokens]:
    """The data sets that are held, by their names in messages.

    Raises:
        InputError: the reference's log-probabilities beside a stream, which has none.
    """
    sets = {f"{prefix}dataset": pairs for prefix, pairs in evaluations.items()}
    if isinstance(train, PairStream):
        check_no_values(sets)
    else:
        sets = {"train_dataset": train} | sets
    return sets


def prepare_pairs(
    config: DPOConfig, data: PreferenceData, tokenizer: PreTrainedTokenizerBase
) -> PairTokens:
    """The tokens of `data` under the length options; what is tokens already stays.

    Raises:
        InputError: a row that is not a preference pair; tokens that were not cut by
            these options.
    """
    limits = Limits(
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
    )
    if isinstance(data, PairTokens):
        check_limits(data, limits, config.score, config.tools)
        return data
    return tokenize_pairs(
        data, tokenizer, **limits._asdict(), score=config.score, tools=config.tools
    )


def prepare_training(
    config: DPOConfig, data: TrainingData, tokenizer: PreTrainedTokenizerBase
) -> PairTokens | PairStream:
    """As `prepare_pairs`; of what is streamed nothing is read.

    Raises:
        InputError: likewise; and options that a stream makes impossible.
    """
    if isinstance(data, RowStream | datasets.IterableDataset):
        return prepare_stream(config, data, tokenizer)
    return prepare_pairs(config, data, tokenizer)


def step_options(config: DPOConfig) -> StepOptions:
    """The options that are compiled into a step."""
    return StepOptions(
        loss=config.loss,
        scoring=ScoringOptions(
            workspace_bytes=config.workspace_bytes,
            implementation=config.implementation,
            ld_alpha=config.ld_alpha,
            arrangement=config.arrangement,
            attention=config.attention,
        ),
        max_grad_norm=config.max_grad_norm,
        skip_nonfinite=config.on_nonfinite == "skip",
        seed=config.seed,
        overlap_collectives=config.overlap_collectives,
    )


def loss_options(config: DPOConfig) -> LossOptions:
    """The numbers that a step is given."""
    return LossOptions(
        beta=config.beta,
        label_smoothing=config.smoothing,
        discopop_tau=config.discopop_tau,
        dpop_lambda=config.dpop_lambda,
        simpo_gamma=config.simpo_gamma,
        cpo_alpha=config.cpo_alpha,
        loss_weights=tuple(config.losses.values()),
        f_alpha_divergence_coef=config.f_alpha_divergence_coef,
        f_divergence_type=config.f_divergence_type,
    )
