"""Where the reference's log-probabilities come from: a model, the batch, nowhere."""

import functools
from pathlib import Path
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from engine.errors import InputError
from engine.models import Decoder, DecoderConfig, load_model
from engine.objective.scoring import (
    GroupTokens,
    ScoringOptions,
    score_completions,
)
from engine.parallel.batch import Batch
from engine.parallel.host_memory import to_host
from engine.parallel.sharding import FSDP, ParameterPath, param_specs, parameter_spec


@runtime_checkable
class Reference(Protocol):
    """What rewards are measured from.

    `operands` are arrays that the compiled step is given at every call, and does not
    use up; `specs` has a PartitionSpec for each.
    """

    operands: Any = ()
    specs: Any = ()

    def logps(
        self,
        operands: Any,
        frozen: Any,
        microbatch: Batch,
        group: GroupTokens,
        options: ScoringOptions,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Summed log-probabilities of the chosen and the rejected, inside shard_map.

        frozen: those of the policy's parameters that are not trained.
        """
        ...

    def update(self, params: Any, frozen: Any, step: int) -> None:
        """Called after each optimizer step, with all of the policy's parameters.

        Does nothing, unless a reference follows the policy.
        """


class NoReference(Reference):
    """Counts the reference's log-probabilities as 0."""

    def logps(
        self,
        operands: Any,
        frozen: Any,
        microbatch: Batch,
        group: GroupTokens,
        options: ScoringOptions,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Zeros."""
        del operands, frozen, microbatch, options
        zeros = jnp.zeros_like(group.pair_weights)
        return zeros, zeros


class Cached(Reference):
    """Values that each batch brings: see `Pairs.ref_logps`."""

    def logps(
        self,
        operands: Any,
        frozen: Any,
        microbatch: Batch,
        group: GroupTokens,
        options: ScoringOptions,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The batch's, of the pairs of the fsdp group."""
        del operands, frozen, group, options
        values = microbatch.pairs.ref_logps
        assert values is not None, "the batch has no values of the reference"
        chosen, rejected = lax.all_gather(
            jnp.asarray(values[0]), FSDP, axis=1, tiled=True, to="invarying"
        )
        return chosen, rejected


def reads_values(reference: Reference) -> bool:
    """Whether it reads values that the batch must bring."""
    return isinstance(reference, Cached)


class FrozenModel(Reference):
    """A model that stays as it is; `decoder`'s arrays become the operands."""

    def __init__(self, decoder: Decoder):
        self._graphdef, self.operands = nnx.split(decoder)
        self.specs = param_specs(decoder.config, decoder.mesh)

    @property
    def decoder(self) -> Decoder:
        """The model as it is now."""
        return nnx.merge(self._graphdef, self.operands)

    def logps(
        self,
        operands: Any,
        frozen: Any,
        microbatch: Batch,
        group: GroupTokens,
        options: ScoringOptions,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The model's, without a gradient."""
        del frozen
        model = nnx.merge(self._graphdef, operands)
        found = score_completions(model, microbatch, group, options)
        return lax.stop_gradient(found.chosen), lax.stop_gradient(found.rejected)


class SharedModel(Reference):
    """A model of which the policy has arrays too, among those that it does not train.

    Those are in memory once, and an operand of the step once: the policy's.
    """

    def __init__(self, decoder: Decoder, policy: Decoder):
        theirs = decoder.config.parameters()
        frozen = _frozen_arrays(policy)
        self._decoder = (decoder.config, decoder.mesh, decoder.dtype, decoder.remat)
        self.operands = {
            path: x.get_value()
            for path, x in decoder.variables().items()
            if frozen.get(path) is not x.get_value()
        }
        self.specs = {
            path: parameter_spec(theirs[path], decoder.config, decoder.mesh)
            for path in self.operands
        }

    def logps(
        self,
        operands: Any,
        frozen: Any,
        microbatch: Batch,
        group: GroupTokens,
        options: ScoringOptions,
    ) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The model's, without a gradient."""
        config, mesh, dtype, remat = self._decoder
        arrays = {path: x[...] for path, x in nnx.to_flat_state(frozen)} | operands
        model = Decoder(config, arrays, mesh=mesh, dtype=dtype.name, remat=remat)
        found = score_completions(model, microbatch, group, options)
        return lax.stop_gradient(found.chosen), lax.stop_gradient(found.rejected)


def _frozen_arrays(model: Decoder) -> dict[ParameterPath, Any]:
    table = model.config.parameters()
    found = model.variables().items()
    return {path: x.get_value() for path, x in found if not table[path].trainable}


def shares_arrays(decoder: Decoder, policy: Decoder) -> bool:
    """Whether `decoder` has arrays of the policy's that are not trained."""
    frozen = {id(x) for x in _frozen_arrays(policy).values()}
    return any(id(x.get_value()) in frozen for x in decoder.variables().values())


class SyncedModel(FrozenModel):
    """A model that moves towards the policy every `every` optimizer steps."""

    def __init__(self, decoder: Decoder, policy: Decoder, *, every: int, alpha: float):
        super().__init__(decoder)
        self._every = every
        mix = jax.jit(
            functools.partial(mix_parameters, alpha=alpha),
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda x: x.sharding, self.operands),
        )
        # Compiled here: nothing is during a run.
        self._mix = mix.lower(self.operands, nnx.split(policy)[1]).compile()

    def update(self, params: Any, frozen: Any, step: int) -> None:
        """Mix the policy in where it is time; the old arrays are used up."""
        if step % self._every == 0:
            policy = nnx.merge_state(params, frozen)
            self.operands = self._mix(self.operands, policy)


def mix_parameters[Params](ref_params: Params, params: Params, alpha: float) -> Params:
    """alpha * policy + (1 - alpha) * reference, in the reference's dtype."""

    def mix(ref: jax.Array, policy: jax.Array) -> jax.Array:
        mixed = alpha * policy.astype(jnp.float32)
        mixed += (1 - alpha) * ref.astype(jnp.float32)
        return mixed.astype(ref.dtype)

    return jax.tree.map(mix, ref_params, params)


def load_reference(
    name: str | Path, policy: Decoder, *, synced: bool, dtype: str | None = None
) -> Decoder:
    """A named reference, which computes in `dtype`; None: as the policy does.

    One that never changes needs no more digits than are computed with.
    """
    dtype = dtype or policy.dtype.name
    return load_model(
        name,
        mesh=policy.mesh,
        dtype=dtype,
        param_dtype="float32" if synced else dtype,
        remat=policy.remat,
    )


def model_for_reference(
    policy: Decoder, given: Decoder | None, *, synced: bool, offload: bool = False
) -> Decoder:
    """A decoder of which the reference may own the arrays.

    Arrays of the policy's are copied, as the training step uses them up; a given
    model's are taken over. They are in the compute dtype, since every use starts with
    that cast; in float32 where the reference follows the policy, as small updates would
    be lost in bfloat16. What is cast replaces the given model's own arrays, which would
    otherwise live on beside it. Of models of shapes alone the shapes are made.

    offload: matrices into the host's memory. (A TPU cannot copy one layer's norms out
    of the stack of all, whose rows are interleaved there.)
    """
    source = policy if given is None else given
    dtype = jnp.dtype(jnp.float32) if synced else source.dtype
    policys = {id(x) for x in jax.tree.leaves(nnx.state(policy))}

    def own(path: Any, x: Any) -> Any:
        matrix = x.ndim - (path[0].key == "layers") >= 2
        return to_host(cast(x)) if offload and matrix else cast(x)

    def cast(x: Any) -> Any:
        if x.dtype == dtype and id(x) not in policys:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
        return x.astype(dtype) if x.dtype != dtype else jnp.copy(x)

    graphdef, params = nnx.split(source)
    params = jax.tree.map_with_path(own, params)
    if given is not None and given is not policy:
        nnx.update(given, params)
    return nnx.merge(graphdef, params)


def refuse_to_offload_a_base() -> NoReturn:
    """What a reference shares with the policy is where the policy computes.

    Raises:
        InputError: always.
    """
    raise InputError(
        "offload_ref_model=True has no effect with LoRA where the reference is on the "
        "base that the policy is on, in memory once; remove it"
    )


def check_comparable(
    policy: DecoderConfig, reference: DecoderConfig, *, synced: bool
) -> None:
    """Refuse a reference that cannot be compared with the policy.

    Raises:
        InputError: of another vocabulary; or, where it is synced, of other shapes.
    """
    if policy.vocab_size != reference.vocab_size:
        raise InputError(
            f"reference_model has a vocabulary of {reference.vocab_size} and model one "
            f"of {policy.vocab_size}; both must use the same tokenizer: give another "
            "reference_model"
        )
    if synced and not _same_shapes(policy, reference):
        raise InputError(
            "sync_ref_model=True mixes model into reference_model, so both must have "
            "the same architecture; give another reference_model, or none"
        )


def _same_shapes(one: DecoderConfig, other: DecoderConfig) -> bool:
    def shapes(config: DecoderConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {path: x.shape for path, x in config.parameters().items()}

    return one.num_layers == other.num_layers and shapes(one) == shapes(other)
