"""Gradients of the loss of a whole global batch, whatever it is split into.

A model's gradient needs of the loss no more than d loss / d log-probabilities. A loss
that takes pairs one by one is therefore differentiated a microbatch at a time; one that
compares pairs is given the log-probabilities of the whole batch first, and each
microbatch's model is differentiated with what comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from dpo_kernels import TokenLogprobs
from engine.objective.interface import LossOptions, LossOut, PairLogps
from engine.objective.losses import Loss
from engine.objective.references import Reference
from engine.objective.scoring import (
    GroupTokens,
    ScoringOptions,
    group_tokens,
    pair_likelihood,
    score_completions,
)
from engine.parallel.batch import Batch
from engine.parallel.collectives import (
    after,
    sum_over_tokens,
    vary_over_tokens,
    zeros_like,
)
from engine.parallel.sharding import BATCH, DATA
from engine.training.metrics import (
    STATS,
    Observed,
    PairValues,
    Sums,
    metric_sums,
    pair_values,
)

Params = nnx.State[str, Any]


class Scored(NamedTuple):
    """The policy and the reference on a microbatch: of the pairs of an fsdp group."""

    logps: PairLogps
    tokens: TokenLogprobs
    group: GroupTokens


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised, but for its numbers."""

    loss: Loss
    reference: Reference
    scoring: ScoringOptions
    graphdef: nnx.GraphDef  # of the policy
    mesh: Mesh

    def score(
        self,
        params: Params,
        frozen: Params,
        ref: Any,
        microbatch: Batch,
        mean_chosen_length: Float[Array, ""],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Scored:
        """Run both models; `ref` are the reference's operands.

        The reference first: what the policy keeps for its gradient is not there yet.
        """
        model = nnx.merge(self.graphdef, params, frozen)
        group = group_tokens(microbatch)
        microbatch = after(microbatch, group, self.mesh)
        references = self.reference.logps(ref, frozen, microbatch, group, self.scoring)
        policy = score_completions(
            model,
            after(microbatch, references, self.mesh),
            group,
            self.scoring,
            stats=(*STATS, *self.loss.stats),
            dropout_key=dropout_key,
        )
        ref_chosen, ref_rejected = references
        logps = PairLogps(
            chosen=policy.chosen,
            rejected=policy.rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_length=policy.chosen_length,
            rejected_length=policy.rejected_length,
            weights=group.pair_weights,
            whole_chosen=policy.whole_chosen,
            mean_chosen_length=jnp.full_like(policy.chosen_length, mean_chosen_length),
            likelihood=(
                pair_likelihood(policy, group, self.scoring)
                if "collision" in self.loss.stats
                else jnp.ones_like(policy.chosen)
            ),
        )
        return Scored(logps, policy.tokens, group)

    def gradients(
        self,
        params: Params,
        frozen: Params,
        ref: Any,
        batch: Batch,
        options: LossOptions,
        specs: Params,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Params, Sums]:
        """float32 gradients of the mean loss over all pairs, and the batch's sums."""
        params = vary_over_tokens(params, specs)
        mean_length = _mean_chosen_length(batch)

        def score(params: Params, microbatch: Batch) -> Scored:
            return self.score(params, frozen, ref, microbatch, mean_length, dropout_key)

        split = _whole_batch if self.loss.whole_batch else _pair_by_pair
        grads, sums = split(self.loss, score, params, batch, options)
        grads, sums = after((grads, sums), grads, self.mesh)
        return sum_over_tokens(grads, specs), over_data(sums)

    def evaluate(
        self, params: Params, frozen: Params, ref: Any, batch: Batch, options: Any
    ) -> Sums:
        """The batch's sums alone."""
        mean_length = _mean_chosen_length(batch)

        def score(microbatch: Batch) -> Scored:
            return self.score(params, frozen, ref, microbatch, mean_length)

        def sums(microbatch: Batch, *loss: LossOut) -> Sums:
            scored = score(microbatch)
            (out,) = loss or (self.loss.function(scored.logps, options),)
            return _sums(scored, out, options)

        if not self.loss.whole_batch:
            return over_data(_added(sums, batch))
        every = _gathered(_of_microbatches(lambda mb: score(mb).logps, batch))
        losses = _own(self.loss.function(every, options), _count(batch))
        return over_data(_added(sums, batch, losses))

    def evaluate_pairs(
        self, params: Params, frozen: Params, ref: Any, batch: Batch, options: Any
    ) -> PairValues:
        """What each pair of this fsdp group adds to the sums.

        Args:
            batch: of one microbatch.
        """
        assert _count(batch) == 1
        mean_length = _mean_chosen_length(batch)
        scored = self.score(params, frozen, ref, _pick(batch, 0), mean_length)
        if self.loss.whole_batch:
            every = _gathered(jax.tree.map(lambda x: x[None], scored.logps))
            out = _pick(_own(self.loss.function(every, options), 1), 0)
        else:
            out = self.loss.function(scored.logps, options)
        observed = Observed(scored.logps, out, scored.tokens, options)
        return pair_values(observed, scored.group, self.scoring)


def over_data(sums: Sums) -> Sums:
    """Over data: along the other axes every device holds the same sums."""
    return jax.tree.map(lambda x: lax.psum(x, DATA), sums)


def _sums(scored: Scored, loss: LossOut, options: LossOptions) -> Sums:
    observed = Observed(scored.logps, loss, scored.tokens, options)
    return metric_sums(observed, scored.group)


def _count(batch: Batch) -> int:
    """How many microbatches there are."""
    return batch.pairs.weights.shape[0]


def _pick(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _of_microbatches(function: Callable[[Batch], Any], batch: Batch) -> Any:
    """The results for each microbatch, stacked."""
    if _count(batch) == 1:
        return jax.tree.map(lambda x: x[None], function(_pick(batch, 0)))
    return lax.map(function, batch)


def _added(function: Callable[..., Any], batch: Batch, *more: Any) -> Any:
    """The sum over microbatches of `function(microbatch, ...)`, of float32 leaves.

    `more` are trees that, like the batch, have a leading axis of microbatches.
    """
    first = _pick((batch, *more), 0)
    if _count(batch) == 1:
        return function(*first)
    shapes = jax.eval_shape(function, *first)
    zeros = jax.tree.map(zeros_like, shapes)

    def add(carry: Any, inputs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, function(*inputs)), None

    return lax.scan(add, zeros, (batch, *more))[0]


def _float32(grads: Params) -> Params:
    """Gradients as they are added up: sums in bfloat16 would lose small ones."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), grads)


def _num_pairs(batch: Batch) -> Float[Array, ""]:
    return lax.psum(batch.pairs.weights.sum(), BATCH)


def _mean_chosen_length(batch: Batch) -> Float[Array, ""]:
    """Scored tokens of a chosen completion, in the mean over the pairs of all devices.

    At least 1, so that nothing is divided by it where nothing is scored.
    """
    weights = batch.pairs.weights
    lengths = batch.scored.counts[..., : weights.shape[-1]].astype(jnp.float32)
    total = lax.psum((weights * lengths).sum(), BATCH)
    return jnp.maximum(total / _num_pairs(batch), 1.0)


def _pair_by_pair(
    loss: Loss, score: Callable, params: Params, batch: Batch, options: LossOptions
) -> tuple[Params, Sums]:
    """One pass: each microbatch's share of the loss, and its gradient."""
    pairs = _num_pairs(batch)

    def share(params: Params, microbatch: Batch) -> tuple[Array, Sums]:
        scored = score(params, microbatch)
        out = loss.function(scored.logps, options)
        value = (scored.logps.weights * out.per_pair).sum() / pairs
        return value, _sums(scored, out, options)

    def gradient(microbatch: Batch) -> tuple[Params, Sums]:
        grads, sums = jax.grad(share, has_aux=True)(params, microbatch)
        return _float32(grads), sums

    return _added(gradient, batch)


def _whole_batch(
    loss: Loss, score: Callable, params: Params, batch: Batch, options: LossOptions
) -> tuple[Params, Sums]:
    """Score everything, differentiate the loss, then each microbatch's model.

    The models of several microbatches run twice, since what they keep for the backward
    does not fit into memory for all of them; that of a single one runs once.
    """
    pairs = _num_pairs(batch)

    def logps_of(params: Params, microbatch: Batch) -> tuple[PairLogps, Scored]:
        scored = score(params, microbatch)
        return scored.logps, jax.tree.map(lax.stop_gradient, scored)

    def value(every: PairLogps) -> tuple[Array, LossOut]:
        out = loss.function(every, options)
        return (every.weights * out.per_pair).sum() / pairs, out

    def with_loss(logps: PairLogps) -> tuple[PairLogps, LossOut]:
        dlogps, out = jax.grad(value, has_aux=True)(_gathered(logps))
        return _own(dlogps, _count(batch)), _own(out, _count(batch))

    if _count(batch) == 1:
        logps, pullback, scored = jax.vjp(
            lambda p: logps_of(p, _pick(batch, 0)), params, has_aux=True
        )
        dlogps, out = with_loss(jax.tree.map(lambda x: x[None], logps))
        (grads,) = pullback(_pick(dlogps, 0))
        return _float32(grads), _sums(scored, _pick(out, 0), options)

    every = _of_microbatches(lambda mb: score(params, mb).logps, batch)
    dlogps, losses = with_loss(every)

    def gradient(
        microbatch: Batch, dlogps: PairLogps, out: LossOut
    ) -> tuple[Params, Sums]:
        _, pullback, scored = jax.vjp(
            lambda p: logps_of(p, microbatch), params, has_aux=True
        )
        (grads,) = pullback(dlogps)
        return _float32(grads), _sums(scored, out, options)

    return _added(gradient, batch, dlogps, losses)


def _gathered(logps_AB: PairLogps) -> PairLogps:
    """All pairs of the optimizer step, in one order on every device."""
    return jax.tree.map(
        lambda x: lax.all_gather(x, DATA, to="invarying").reshape(-1), logps_AB
    )


def _own(tree: Any, microbatches: int) -> Any:
    """Of values of all pairs, this fsdp group's, by microbatch."""

    def own(x: Array) -> Array:
        x_DAB = x.reshape(lax.axis_size(DATA), microbatches, -1)
        return lax.dynamic_index_in_dim(x_DAB, lax.axis_index(DATA), 0, keepdims=False)

    return jax.tree.map(own, tree)
