"""Whether models, tokenizer, data and mesh fit together; no weight is read."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_kernels.op import tiling
from dpo_kernels.op.backends import load_backend
from dpo_kernels.op.devices import of_jax
from dpo_kernels.pallas_tpu import backward_tiling as tpu_tiling
from dpo_kernels.spread import blocks_of
from engine.config.dpo import DPOConfig
from engine.config.lora import check_dropout
from engine.data.doubts import check_answers_differ
from engine.data.pairs import PairTokens
from engine.data.reference_logps import check_values
from engine.data.shapes import Sizes
from engine.errors import InputError
from engine.models import DecoderConfig, attention
from engine.objective.references import check_comparable, refuse_to_offload_a_base
from engine.parallel.sharding import (
    SEQUENCE,
    SPLIT,
    VOCAB,
    check_mesh,
    padded_vocab,
    size_of,
)
from engine.training.streams import unknown_id


def check_models(
    arguments: DPOConfig,
    mesh: Mesh,
    model: DecoderConfig,
    reference: DecoderConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, PairTokens],
) -> None:
    """Refuse models that do not fit the mesh, each other, or the data sets.

    Raises:
        InputError: naming what does not fit.
    """
    for config in (model, reference):
        if config is not None:
            check_mesh(config, mesh)
    if reference is not None:
        if arguments.without_reference:
            raise InputError(
                f"reference_model has no effect with {arguments.without_reference}; "
                "remove one"
            )
        check_comparable(model, reference, synced=arguments.sync_ref_model)
    if arguments.offload_ref_model and model.adapter is not None and reference is None:
        refuse_to_offload_a_base()
    check_values(arguments, sets, has_reference=reference is not None)
    adapter = model.adapter
    check_dropout(arguments, None if adapter is None else adapter.dropout)
    check_vocabulary(model, tokenizer, *sets.values())
    for name, pairs in sets.items():
        check_answers_differ(name, pairs)


def check_vocabulary(
    config: DecoderConfig, tokenizer: PreTrainedTokenizerBase, *data: PairTokens
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
        largest = int(pairs.tokens.max(initial=0))
        if largest >= size:
            raise unknown_id(tokenizer, largest, size, "the data")


def op_problem(
    config: DPOConfig, model: DecoderConfig, dtype: Any, capacity: int, mesh: Mesh
) -> tiling.Problem:
    """What the op is asked at a time: `capacity` tokens are scored on each device."""
    V = padded_vocab(model, mesh) // size_of(VOCAB, mesh)
    devices = size_of(SPLIT, mesh)
    _, size = blocks_of(-(-capacity // mesh.shape[SEQUENCE]), devices, V)
    return tiling.Problem(
        T=devices * size,
        D=model.hidden_size,
        V=V,
        dtype=jnp.dtype(dtype),
        workspace_bytes=config.workspace_bytes,
        device=of_jax(mesh.devices.flat[0]),
        ragged=True,
    )


def check_op(
    config: DPOConfig, model: DecoderConfig, dtype: Any, plan: Sizes, mesh: Mesh
) -> None:
    """Refuse a workspace that nothing fits in, and what cannot run here.

    Raises:
        InputError: with the reason that the op, or attention, would give.
    """
    attention.choose(
        config.attention, attention.Case.of(mesh, config.arrangement, dtype, model)
    )
    for _, capacity in plan.shapes:
        problem = op_problem(config, model, dtype, capacity, mesh)
        try:
            backend = load_backend(config.implementation, problem)
            if backend.backward is None:
                tiling.backward_tile(problem, fused=backend.fused_dlogits)
            elif tpu_tiling.backward_tile(problem) is None:  # the only one of its own
                raise ValueError(
                    f"workspace_bytes={config.workspace_bytes} is too small for the "
                    f"gradients of {problem.T} rows; give at least "
                    f"{tpu_tiling.least_workspace(problem)}, or raise "
                    "gradient_accumulation_steps"
                )
        except (ValueError, NotImplementedError) as error:
            raise InputError(str(error)) from error
