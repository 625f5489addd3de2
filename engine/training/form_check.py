"""Before the first step: the run's form of its first batch gives what plain rows give.

Rows of several sequences, shared beginnings, rows and models that are spread over
devices: all that changes rounding alone. Peers' worst faults are those where it changed
more: the loss is wrong then, and nothing else is. So the first microbatch is scored as
the run has it, and a few of its pairs in rows of their own, without a kernel.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int64

from engine.data.batches import BatchPlan
from engine.data.pair_streams import PairStream
from engine.data.pair_tokens import PairTokens
from engine.data.stream_plans import StreamPlan
from engine.errors import InputError
from engine.models import Decoder
from engine.parallel.batch import PADDED, Batch, abstract_batch, put_batch
from engine.parallel.sharding import BATCH, mesh_words, size_of
from engine.training.compilation import Request, compile_all, enough_memory
from engine.training.plain_form import (
    computing_in,
    plain_batch,
    plain_model,
    plain_scoring,
    without_values,
)
from engine.training.precompute import make_scoring_step
from engine.training.prepare import Prepared, step_options
from engine.training.step import StepOptions

logger = logging.getLogger(__name__)

_PAIRS = 4  # of the microbatch, that are compared: the first, the last, some between
_ALLOWED = 8  # times the error of plain rows in the same dtype
# Of a token's nats the least that this is taken for. In float32 nothing says it, and it
# is some roundings in each layer of logits of tens of nats.
_LEAST = 2.0**-18


class _Form(NamedTuple):
    """Pairs in some form, and what scores them."""

    model: Decoder
    options: StepOptions
    batch: Batch  # of one microbatch or more
    # Of products of float32, which by default may have the digits of bfloat16.
    precision: str | None = None


class _First(NamedTuple):
    """The first microbatch, and the pairs of it that are compared."""

    pairs: PairTokens  # of the data
    batch: Batch
    members: Int64[np.ndarray, " compared"]  # which of the data's pairs
    places: Int64[np.ndarray, " compared"]  # and which of the microbatch's


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What a form gives, and the plain one; of the chosen and of the rejected."""

    found: Float[np.ndarray, "compared 2"]  # nats
    plain: Float[np.ndarray, "compared 2"]
    explained: Float[np.ndarray, "compared 2"]  # what rounding explains

    @property
    def parts(self) -> Float[np.ndarray, "compared 2"]:
        """Of what rounding explains; infinite where something is not finite."""
        parts = np.abs(self.found - self.plain) / self.explained
        return np.where(np.isfinite(parts), parts, np.inf)


def check_form(run: Prepared, model: Decoder) -> None:
    """Compare log-probabilities; nothing where the run's form is the plain one.

    Raises:
        InputError: they differ by more than rounding explains, of which sequence.
    """
    rows, devices = _rows(run), _devices(run.mesh)
    if not rows and not devices:
        return
    began, plain = time.perf_counter(), plain_model(model)
    where = _where(plain.mesh, run.mesh)
    if not rows and plain.mesh == run.mesh:
        logger.info(
            "start check: the model on %s is not compared with one device, which has "
            "no room for it or is another process's",
            devices,
        )
        return
    first = _first(run)
    if first is None:
        logger.info("start check: a stream's first rows have no pair to compare")
        return
    difference = compare(run, model, plain, first)
    if not np.isfinite(difference.plain).all():
        return  # the model is not finite, which the first step says better
    if difference.parts.max() > 1:
        raise _refusal(run, model, first, difference, where)
    logger.info(
        "start check: %s what a row for each sequence does %s (%d pairs; off by %.2g "
        "of what rounding explains; it took %.1f s)",
        " ".join(x for x in (rows or "rows", devices and f"on {devices}", "give") if x),
        where,
        len(first.members),
        difference.parts.max(),
        time.perf_counter() - began,
    )


def _rows(run: Prepared) -> str:
    """What is not plain about rows, or nothing."""
    arrangement = run.arguments.arrangement
    words = ["packed rows"] * arrangement.packing
    words += ["shared beginnings"] * arrangement.share_prompt
    return " with ".join(words)


def _devices(mesh: Mesh) -> str:
    """What they are spread over, or nothing."""
    return mesh_words(dict(mesh.shape)) if mesh.size > 1 else ""


def _where(plain: Mesh, mesh: Mesh) -> str:
    if plain.size < mesh.size:
        return "on one device"
    return "on the same devices" if mesh.size > 1 else "here"


def _first(run: Prepared) -> _First | None:
    """A stream is not read again for it: its first rows have been read already."""
    plan = run.plan
    if isinstance(run.train, PairStream):
        assert isinstance(plan, StreamPlan)
        _, pairs = run.train.head
        if not len(pairs):
            return None
        members = np.arange(plan.pairs_per_batch)
        members[len(pairs) :] = -1
        layout = plan.layout_of(pairs)
    else:
        assert isinstance(plan, BatchPlan)
        pairs, layout = run.train, plan.layout
        members = plan.order.epoch(0)[0]
    batch, _ = layout.build(members, plan.shapes)
    microbatch = jax.tree.map(lambda x: x[:1], without_values(batch))
    real = np.flatnonzero(members[: len(members) // plan.grid[0]] >= 0)
    places = real[np.unique(np.linspace(0, len(real) - 1, _PAIRS).astype(int))]
    return _First(pairs, microbatch, members[places], places)


def compare(run: Prepared, model: Decoder, plain: Decoder, first: _First) -> Difference:
    """The run's form and the plain one, of the same weights."""
    options = step_options(run.arguments)
    forms = [_Form(model, options, first.batch)]
    options = replace(options, scoring=plain_scoring(options.scoring))
    alone = plain_batch(first.pairs, first.members, plain.mesh)
    forms.append(_Form(plain, options, alone))
    # What plain rows are off by is known of a dtype that is not the most exact one.
    float32 = model.dtype == jnp.float32
    if not float32 or model.mesh.devices.flat[0].platform != "cpu":
        exact = computing_in(plain, "float32")
        # For 16 bits not the highest, which a TPU's compiler has twice as long for.
        precision = "highest" if float32 else "high"
        forms.append(_Form(exact, options, alone, precision))
    found, *others = _scored(forms)
    others = [x[: len(first.members)] for x in others]
    tokens = first.pairs.num_scored.reshape(-1, 2)[first.members]
    return Difference(
        found=found[first.places],
        plain=others[0],
        explained=_explained(others[0], others[-1], tokens, model.dtype),
    )


def _refusal(
    run: Prepared, model: Decoder, first: _First, difference: Difference, where: str
) -> InputError:
    """In one line what is wrong; of rows and devices that which is, where it shows."""
    rows, devices = _rows(run), _devices(run.mesh)
    if rows and devices:
        # As the run has it, but for the rows.
        options = step_options(run.arguments)
        scoring = replace(options.scoring, arrangement=PADDED)
        batch = plain_batch(first.pairs, first.members, run.mesh)
        (found,) = _scored([_Form(model, replace(options, scoring=scoring), batch)])
        alone = replace(difference, found=found[: len(first.members)])
        if alone.parts.max() > 1:
            difference, rows = alone, ""
        else:
            devices = ""
    worst = difference.parts
    pair, side = np.unravel_index(worst.argmax(), worst.shape)
    what = rows or f"the devices ({devices})"
    names = [x for x in ("packing", "share_prompt") if getattr(run.arguments, x)]
    otherwise = f"without {' and '.join(names)}" if rows else "on a mesh of other sizes"
    return InputError(
        f"{what} change more than rounding does: the log-probability of the "
        f"{('chosen', 'rejected')[side]} of row {first.pairs.rows[first.members[pair]]}"
        f" (from 0) is {difference.found[pair, side]:.6g} nats, and "
        f"{difference.plain[pair, side]:.6g} in a row of its own {where}, of which "
        f"rounding explains {difference.explained[pair, side]:.2g}; train {otherwise},"
        " and please report it with the configuration (start_check=false trains anyway)"
    )


def _explained(
    plain: Float[np.ndarray, "compared 2"],
    exact: Float[np.ndarray, "compared 2"],
    tokens: Int64[np.ndarray, "compared 2"],
    dtype: Any,
) -> Float[np.ndarray, "compared 2"]:
    """What rounding explains of sums over so many tokens.

    Errors of tokens have no sign in common: those of a sum grow as the root of their
    number. That of a token is plain JAX's own, and at least a rounding of its nats. The
    sums themselves are in float32.
    """
    tokens = np.maximum(tokens, 1)
    nats = np.abs(plain)
    own = np.sqrt(np.mean((plain - exact) ** 2 / tokens) * tokens)
    least = max(float(jnp.finfo(dtype).eps) / 2, _LEAST) * (nats / tokens + 1)
    sums = float(jnp.finfo(jnp.float32).eps) * (nats + tokens)
    return _ALLOWED * (np.maximum(own, least * np.sqrt(tokens)) + sums)


def _scored(forms: list[_Form]) -> list[Float[np.ndarray, "compared 2"]]:
    """Of each the log-probabilities of its pairs, compiled all at once."""
    found = []
    for steps, form in zip(
        compile_all([_request(x) for x in forms]), forms, strict=True
    ):
        with enough_memory():
            batch = put_batch(form.batch, form.model.mesh)
            values = jax.device_get(steps(nnx.state(form.model), batch))
        found.append(np.asarray(values).swapaxes(1, 2).reshape(-1, 2))
    return found


def _request(form: _Form) -> Request:
    model, scored = form.model, form.batch.scored
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        nnx.state(model),
    )
    microbatches, _, sequences = scored.counts.shape
    grid = microbatches, size_of(BATCH, model.mesh), sequences // 2
    batch = abstract_batch(
        form.batch.shape, grid, model.mesh, arrangement=form.options.scoring.arrangement
    )
    step: Any = make_scoring_step(model, form.options)
    if form.precision is not None:
        step = _Precise(step, form.precision)
    return Request(step, {form.batch.shape: (operands, batch)})


@dataclass(frozen=True)
class _Precise:
    """A step whose products of float32 have this precision."""

    step: Any
    precision: str

    def lower(self, *arguments: Any) -> Any:
        """As the step's own."""
        with jax.default_matmul_precision(self.precision):
            return self.step.lower(*arguments)
