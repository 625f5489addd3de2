"""The train and the eval step, each one jit(shard_map(...)), compiled ahead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from engine.models import Decoder
from engine.models.dropout import step_key
from engine.objective.losses import Loss
from engine.objective.references import Reference, reads_values
from engine.objective.scoring import ScoringOptions
from engine.parallel.batch import Batch, batch_specs, put_whole
from engine.parallel.collectives import global_norm
from engine.parallel.sharding import DATA, param_specs, place
from engine.training.compiler_options import compiler_options
from engine.training.gradients import Objective, Params
from engine.training.metrics import PairValues, Sums
from engine.training.optimizer import Optimizer


class TrainState(NamedTuple):
    """What an optimizer step changes. The step donates it: the old one is gone."""

    step: Int[Array, ""]  # optimizer steps done
    params: Params  # the trainable ones
    opt_state: optax.OptState


class StepOut(NamedTuple):
    """What an optimizer step tells."""

    sums: Sums  # over the global batch, of the parameters before the update
    grad_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]  # of this update
    # Whether the run can go on: the parameters after the update are finite, and so are
    # the loss and the gradient, unless such an update is left out.
    finite: Bool[Array, ""]
    applied: Bool[Array, ""]  # whether the update was made


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The static part of a step."""

    loss: Loss
    scoring: ScoringOptions
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False  # leave out an update that is not finite
    seed: int = 0  # of the rounding of parameters that are not float32
    overlap_collectives: bool = True


def split_model(model: Decoder) -> tuple[nnx.GraphDef, Params, Params]:
    """A model's graph, its trainable parameters and the others."""
    graphdef, params, frozen = nnx.split(model, nnx.Param, ...)
    return graphdef, params, frozen


def split_specs(model: Decoder) -> tuple[Params, Params]:
    """A PartitionSpec for each trainable parameter, and for each of the others."""
    specs = param_specs(model.config, model.mesh)
    trainable, frozen = nnx.split_state(specs, nnx.Param, ...)
    return trainable, frozen


def opt_state_specs(optimizer: Optimizer, params, specs) -> Any:
    """A PartitionSpec for each leaf of the optimizer's state: its parameter's own.

    Where an axis was summed over, and has length 1, it is not sharded.
    """
    of = {
        path: (x.ndim, spec)
        for (path, x), spec in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(specs), strict=True
        )
    }

    def spec_of(path: Any, leaf: Any) -> P:
        found = (of[path[i:]] for i in range(len(path)) if path[i:] in of)
        ndim, spec = next(found, (0, P()))
        if leaf.ndim != ndim:  # a count
            return P()
        entries = zip(leaf.shape, spec, strict=False)
        return P(*(None if size == 1 else entry for size, entry in entries))

    return jax.tree.map_with_path(spec_of, jax.eval_shape(optimizer.init, params))


def state_specs(model: Decoder, optimizer: Optimizer) -> TrainState:
    """A PartitionSpec in the place of each array of the state."""
    specs = split_specs(model)[0]
    step: Any = P()
    opt_specs = opt_state_specs(optimizer, split_model(model)[1], specs)
    return TrainState(step=step, params=specs, opt_state=opt_specs)


def abstract_state(model: Decoder, optimizer: Optimizer) -> TrainState:
    """Shapes, dtypes and shardings of the state, to compile for or to restore into."""

    def initial(params: Params) -> TrainState:
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    shapes = jax.eval_shape(initial, split_model(model)[1])
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=place(spec, model.mesh)
        ),
        shapes,
        state_specs(model, optimizer),
    )


def init_state(model: Decoder, optimizer: Optimizer) -> TrainState:
    """The state before the first step. It takes the model's arrays over.

    The first step uses them up: until they are replaced, `model` is empty then.
    """
    # In variables of its own: what happens to the model's is not the state's matter.
    params = jax.tree.map(lambda x: x, split_model(model)[1])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer))
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = put_whole(np.int32(0), model.mesh)
    return TrainState(step=step, params=params, opt_state=init(params))


def update(
    state: TrainState,
    grads: Params,
    norm: Float[Array, ""],
    optimizer: Optimizer,
    options: StepOptions,
    usable: Bool[Array, ""] | None = None,
) -> TrainState:
    """The state after an update by float32 gradients whose global norm is `norm`.

    They are scaled down to `options.max_grad_norm` where they exceed it. Where they are
    not `usable` the state is the old one, one step later.
    """
    factor = None
    if options.max_grad_norm:
        factor = jnp.minimum(1.0, options.max_grad_norm / (norm + 1e-6))
    params, opt_state = optimizer.update(
        grads,
        state.opt_state,
        state.params,
        step_key(options.seed, state.step),
        factor=factor,
        usable=usable,
    )
    return TrainState(state.step + 1, params, opt_state)


def make_train_step(
    model: Decoder,
    reference: Reference,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    options: StepOptions,
) -> Callable[..., tuple[TrainState, StepOut]]:
    """The jitted step.

    (state, frozen parameters, reference's operands, batch, LossOptions) ->
    (state, StepOut). A reference's operands and frozen parameters stay as they are.
    """
    graphdef = split_model(model)[0]
    specs, frozen_specs = split_specs(model)
    adapter = model.config.adapter
    dropped = adapter is not None and adapter.dropout > 0
    objective = Objective(
        loss=options.loss,
        reference=reference,
        scoring=options.scoring,
        graphdef=graphdef,
        mesh=model.mesh,
    )

    def step(state: TrainState, frozen: Params, ref: Any, batch: Batch, numbers: Any):
        # No key where nothing is dropped: then the step computes no random numbers.
        key = step_key(options.seed, state.step) if dropped else None
        grads, sums = objective.gradients(
            state.params, frozen, ref, batch, numbers, specs, key
        )
        norm = global_norm(grads, specs)
        usable = jnp.isfinite(sums.sums["pairs"]["loss"] + norm)
        guard = usable if options.skip_nonfinite else None
        new = update(state, grads, norm, optimizer, options, guard)
        finite = jnp.isfinite(global_norm(new.params, specs))
        applied = usable
        if not options.skip_nonfinite:
            finite, applied = finite & usable, jnp.ones_like(usable)
        with jax.numpy_dtype_promotion("standard"):  # optax divides an int by a float
            rate = jnp.asarray(schedule(state.step), jnp.float32)
        return new, StepOut(sums, norm, rate, finite, applied)

    specs_in = state_specs(model, optimizer)
    sharded = jax.shard_map(
        step,
        mesh=model.mesh,
        in_specs=(
            specs_in,
            frozen_specs,
            reference.specs,
            batch_specs(reads_values(reference), options.scoring.arrangement),
            P(),
        ),
        out_specs=(specs_in, P()),
    )
    told = compiler_options(model.mesh, overlap=options.overlap_collectives)
    return jax.jit(sharded, donate_argnums=0, compiler_options=told)


def make_eval_step(
    model: Decoder, reference: Reference, options: StepOptions
) -> Callable[..., Sums]:
    """The jitted evaluation.

    (trainable, frozen parameters, reference's operands, batch, LossOptions) -> sums
    over the global batch.
    """
    return _eval_step(model, reference, options, each_pair=False)


def make_pairs_step(
    model: Decoder, reference: Reference, options: StepOptions
) -> Callable[..., PairValues]:
    """The jitted evaluation pair by pair, of batches of one microbatch.

    It takes what the step of `make_eval_step` takes, and returns what each pair adds to
    those sums; the pairs of a batch in no order that means anything.
    """
    return _eval_step(model, reference, options, each_pair=True)


def _eval_step(
    model: Decoder, reference: Reference, options: StepOptions, each_pair: bool
) -> Callable[..., Any]:
    objective = Objective(
        loss=options.loss,
        reference=reference,
        scoring=options.scoring,
        graphdef=split_model(model)[0],
        mesh=model.mesh,
    )
    specs, frozen_specs = split_specs(model)
    sharded = jax.shard_map(
        objective.evaluate_pairs if each_pair else objective.evaluate,
        mesh=model.mesh,
        in_specs=(
            specs,
            frozen_specs,
            reference.specs,
            batch_specs(reads_values(reference), options.scoring.arrangement),
            P(),
        ),
        out_specs=P(DATA) if each_pair else P(),
    )
    # What each pair gives is for every process to read.
    out = place(P(), model.mesh) if each_pair else None
    told = compiler_options(model.mesh, overlap=options.overlap_collectives)
    return jax.jit(sharded, out_shardings=out, compiler_options=told)
