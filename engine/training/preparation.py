"""What training, and a check before it, derive from options, data, model and mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_kernels.op import tiling
from dpo_kernels.op.devices import Device
from engine.config.dpo import DPOConfig
from engine.data.pairs import BatchPlan, PairTokens, PreferenceRows, tokenize_pairs
from engine.errors import InputError
from engine.models import DecoderConfig
from engine.objective.losses import LOSSES, LossOptions
from engine.parallel.sharding import DATA, FSDP
from engine.training.scoring import ScoringOptions
from engine.training.step import StepOptions

PreferenceData = (
    PairTokens | PreferenceRows | datasets.Dataset | Sequence[Mapping[str, Any]]
)


def prepare_pairs(
    config: DPOConfig, data: PreferenceData, tokenizer: PreTrainedTokenizerBase
) -> PairTokens:
    """The tokens of `data` under the length options; tokens are passed through."""
    if isinstance(data, PairTokens):
        return data
    return tokenize_pairs(
        data,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        truncation_mode=config.truncation_mode,
    )


def check_vocabulary(
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase,
    *data: PairTokens | None,
) -> None:
    """Refuse a tokenizer that has ids which the model has no embedding for.

    Added tokens past the vocabulary do no harm while no row has them (Gemma 3 has one).

    Raises:
        InputError: naming the sizes, and the id where a row has one.
    """
    size = config.vocab_size
    if tokenizer.vocab_size > size:
        raise InputError(
            f"the model's vocab_size={size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} tokens; use the model's own tokenizer"
        )
    for pairs in data:
        largest = 0 if pairs is None else int(pairs.tokens.max(initial=0))
        if largest >= size:
            raise InputError(
                f"the model's vocab_size={size} has no token {largest} "
                f"({tokenizer.convert_ids_to_tokens(largest)!r}), which is in the "
                "data; use the model's own tokenizer"
            )


def check_workspace(config: DPOConfig, decoder: DecoderConfig, dtype: Any) -> None:
    """Refuse a workspace in which not even the smallest tile of logits fits."""
    try:
        problem = tiling.Problem(
            T=2 * tiling.LEAST_BLOCK_T,  # more than a block: d head is a sum then
            D=decoder.hidden_size,
            V=decoder.vocab_size,
            dtype=dtype,
            workspace_bytes=config.workspace_bytes,
            device=Device(platform="cpu", kind="cpu"),
            ragged=True,
        )
        tiling.backward_tile(problem, fused=False)
    except ValueError as error:
        raise InputError(str(error)) from error


def _shards(mesh: Mesh) -> int:
    return mesh.shape[DATA] * mesh.shape[FSDP]


def plan_training(config: DPOConfig, pairs: PairTokens, mesh: Mesh) -> BatchPlan:
    """The batches of the training epochs.

    Raises:
        InputError: sizes that the mesh or the accumulation steps do not divide.
    """
    return BatchPlan(
        pairs,
        pairs_per_batch=config.total_batch_size,
        accumulation=config.gradient_accumulation_steps,
        shards=_shards(mesh),
        shuffle=config.shuffle_train_dataset,
        seed=config.seed,
        drop_last=config.drop_last,
    )


def plan_evaluation(config: DPOConfig, pairs: PairTokens, mesh: Mesh) -> BatchPlan:
    """The batches of one evaluation: every pair once, in order."""
    size = config.pairs_per_eval_batch
    return BatchPlan(pairs, pairs_per_batch=size, shards=_shards(mesh))


def total_steps(config: DPOConfig, plan: BatchPlan) -> int:
    """Optimizer steps of the whole run."""
    steps = config.num_train_epochs * plan.batches_per_epoch
    if config.max_training_steps is not None:
        steps = min(steps, config.max_training_steps)
    return steps


def step_options(config: DPOConfig) -> StepOptions:
    """The options that are compiled into a step."""
    return StepOptions(
        loss=LOSSES[config.loss_type],
        loss_options=LossOptions(
            beta=config.beta, label_smoothing=config.label_smoothing
        ),
        scoring=ScoringOptions(
            workspace_bytes=config.workspace_bytes,
            implementation=config.implementation,
        ),
        max_grad_norm=config.max_grad_norm,
    )
