"""The train and the eval step, each one jit(shard_map(...))."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from engine.data.batch import Batch, batch_specs
from engine.models import Decoder
from engine.objective.losses import Loss, LossOptions, PairLogps
from engine.parallel.sharding import BATCH, DATA, FSDP, param_specs
from engine.training.scoring import (
    STATS,
    TOKEN_SUMS,
    Completions,
    ScoringOptions,
    score_completions,
    scored_rows,
    token_sums,
)

Params = nnx.State[str, Any]
Sums = dict[str, Float[Array, ""]]
SUMS = (
    *("loss", "chosen_rewards", "rejected_rewards", "accuracies"),
    *("chosen_logps", "rejected_logps", "pairs"),
    *TOKEN_SUMS,
)


class TrainState(NamedTuple):
    """What an optimizer step changes. The step donates it: the old one is gone."""

    step: Int[Array, ""]  # optimizer steps done
    params: Params
    opt_state: optax.OptState


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The static part of a step."""

    loss: Loss
    loss_options: LossOptions
    scoring: ScoringOptions
    max_grad_norm: float | None = None


# Without this the compiler may keep more digits than bfloat16 has wherever it fuses,
# and fuses the policy's forward otherwise than the reference's: margins would start
# near 0, not at 0.
_COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def _pair_sums(logps: PairLogps, weights_B: Array, options: StepOptions) -> Sums:
    """Weighted sums over the pairs of this fsdp group."""
    beta = options.loss_options.beta
    chosen = beta * (logps.chosen - logps.ref_chosen)
    rejected = beta * (logps.rejected - logps.ref_rejected)
    per_pair = {
        "loss": options.loss.pairwise(logps, options.loss_options),
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "accuracies": (chosen > rejected).astype(jnp.float32),
        "chosen_logps": logps.chosen,
        "rejected_logps": logps.rejected,
    }
    # A filler pair scores no token, and whatever its loss is, it weighs nothing.
    return {name: (weights_B * x).sum() for name, x in per_pair.items()} | {
        "pairs": weights_B.sum()
    }


def _batch_sums(
    model: Decoder, reference: Decoder | None, microbatch: Batch, options: StepOptions
) -> Sums:
    """Every sum that the loss and the metrics are made of; `loss` is differentiable."""
    rows = scored_rows(microbatch)
    weights_B = lax.all_gather(microbatch.weights, FSDP, tiled=True, to="invarying")
    policy = score_completions(model, microbatch, rows, options.scoring, stats=STATS)
    ref_chosen = ref_rejected = jnp.zeros_like(policy.chosen)
    if reference is not None:
        ref: Completions = jax.tree.map(
            lax.stop_gradient,
            score_completions(reference, microbatch, rows, options.scoring),
        )
        ref_chosen, ref_rejected = ref.chosen, ref.rejected
    logps = PairLogps(
        chosen=policy.chosen,
        rejected=policy.rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        chosen_length=policy.chosen_length,
        rejected_length=policy.rejected_length,
    )
    sums = token_sums(policy, rows, weights_B)
    return _pair_sums(logps, weights_B, options) | sums


def _microbatch(batch: Batch, index: Any) -> Batch:
    return jax.tree.map(lambda x: x[index], batch)


def _zeros_like(x: Array) -> Array:
    """Zeros of the same type, the axes that it varies over included."""
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
    zeros = jnp.zeros(x.shape, x.dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def _over_data(params: Params, specs: Params) -> Params:
    """Parameters typed as varying over the batch axes.

    Their gradients then stay this device's own until `_summed` adds them up: once a
    step, not once a microbatch, and for a layer after its reduce-scatter.
    """

    def vary(x: Array, spec: P) -> Array:
        missing = tuple(axis for axis in BATCH if axis not in _axes(spec))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, params, specs)


def _summed(grads: Params, specs: Params) -> Params:
    return jax.tree.map(
        lambda x, spec: lax.psum(x, tuple(a for a in BATCH if a not in _axes(spec))),
        grads,
        specs,
    )


def _axes(spec: P) -> tuple[str, ...]:
    found: list[str] = []
    for entry in spec:
        found += (entry,) if isinstance(entry, str) else entry or ()
    return tuple(found)


def _global_norm(grads: Params, specs: Params) -> Float[Array, ""]:
    """The norm over the whole mesh, each element counted once."""
    total = jnp.zeros(())
    for x, spec in zip(jax.tree.leaves(grads), jax.tree.leaves(specs), strict=True):
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)))
        total += lax.psum(squares, _axes(spec)) if _axes(spec) else squares
    return jnp.sqrt(total)


def _gradients(
    graphdef: nnx.GraphDef,
    params: Params,
    reference: Decoder | None,
    batch: Batch,
    options: StepOptions,
    specs: Params,
) -> tuple[Params, Sums]:
    """Gradients of the mean loss of the whole global batch, and its sums."""
    pairs = lax.psum(batch.weights.sum(), BATCH)
    params = _over_data(params, specs)

    def loss(params: Params, microbatch: Batch) -> tuple[Array, Sums]:
        model = nnx.merge(graphdef, params)
        sums = _batch_sums(model, reference, microbatch, options)
        return sums["loss"] / pairs, sums

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if batch.weights.shape[0] == 1:
        (_, sums), grads = value_and_grad(params, _microbatch(batch, 0))
        return _summed(grads, specs), _total(sums)

    def accumulate(carry: tuple[Params, Sums], microbatch: Batch):
        (_, sums), grads = value_and_grad(params, microbatch)
        return jax.tree.map(jnp.add, carry, (grads, sums)), None

    zero_sums = {name: lax.pcast(jnp.zeros(()), DATA, to="varying") for name in SUMS}
    zeros = (jax.tree.map(_zeros_like, params), zero_sums)
    (grads, sums), _ = lax.scan(accumulate, zeros, batch)
    return _summed(grads, specs), _total(sums)


def _total(sums: Sums) -> Sums:
    """Over data: along the other axes every device holds the same sums."""
    return jax.tree.map(lambda x: lax.psum(x, DATA), sums)


def opt_state_specs(optimizer: optax.GradientTransformation, params, specs) -> Any:
    """A PartitionSpec for each leaf of the optimizer's state: its parameter's own."""
    shapes = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(
        optimizer,
        lambda _, spec: spec,
        shapes,
        specs,
        transform_non_params=lambda _: P(),
    )


def init_state(model: Decoder, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it owns copies of the model's parameters."""
    mesh, specs = model.mesh, param_specs(model.config, model.mesh)
    params: Params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        opt_state_specs(optimizer, params, specs),
    )
    opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jax.device_put(jnp.int32(0), NamedSharding(mesh, P()))
    return TrainState(step=step, params=params, opt_state=opt_state)


def update(
    state: TrainState,
    grads: Params,
    norm: Float[Array, ""],
    optimizer: optax.GradientTransformation,
    max_grad_norm: float | None,
) -> TrainState:
    """The state after an update by gradients whose global norm is `norm`.

    They are scaled down to `max_grad_norm` where they exceed it.
    """
    if max_grad_norm:
        factor = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state)


def make_train_step(
    model: Decoder,
    reference: Decoder | None,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
) -> Callable[[TrainState, Params | None, Batch], tuple[TrainState, Sums]]:
    """The compiled step: (state, reference's parameters, batch) -> (state, sums).

    The sums are those of `_batch_sums` over the whole global batch and `grad_norm`,
    before clipping. A reference of None scores as zeros (reference-free).
    """
    specs = param_specs(model.config, model.mesh)
    graphdef, params = nnx.split(model, nnx.Param)
    ref_graphdef = None if reference is None else nnx.split(reference, nnx.Param)[0]

    def step(state: TrainState, ref_params: Params | None, batch: Batch):
        ref = None if ref_graphdef is None else nnx.merge(ref_graphdef, ref_params)
        grads, sums = _gradients(graphdef, state.params, ref, batch, options, specs)
        norm = _global_norm(grads, specs)
        new_state = update(state, grads, norm, optimizer, options.max_grad_norm)
        return new_state, sums | {"grad_norm": norm}

    step_spec: Any = P()
    opt_specs = opt_state_specs(optimizer, params, specs)
    state_specs = TrainState(step=step_spec, params=specs, opt_state=opt_specs)
    sharded = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(state_specs, _reference_specs(reference), batch_specs()),
        out_specs=(state_specs, P()),
    )
    return jax.jit(sharded, donate_argnums=0, compiler_options=_COMPILER_OPTIONS)


def make_eval_step(
    model: Decoder, reference: Decoder | None, options: StepOptions
) -> Callable[[Params, Params | None, Batch], Sums]:
    """The compiled evaluation: (parameters, reference's parameters, batch) -> sums."""
    specs = param_specs(model.config, model.mesh)
    graphdef = nnx.split(model, nnx.Param)[0]
    ref_graphdef = None if reference is None else nnx.split(reference, nnx.Param)[0]

    def step(params: Params, ref_params: Params | None, batch: Batch) -> Sums:
        ref = None if ref_graphdef is None else nnx.merge(ref_graphdef, ref_params)
        model = nnx.merge(graphdef, params)
        return _total(_batch_sums(model, ref, _microbatch(batch, 0), options))

    sharded = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(specs, _reference_specs(reference), batch_specs()),
        out_specs=P(),
    )
    return jax.jit(sharded, compiler_options=_COMPILER_OPTIONS)


def _reference_specs(reference: Decoder | None) -> Any:
    return None if reference is None else param_specs(reference.config, reference.mesh)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The host's arrays on the devices."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs())
    return jax.device_put(batch, shardings)
