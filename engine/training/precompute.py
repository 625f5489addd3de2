"""The reference's log-probabilities of every pair, scored before the first step."""

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int64
from tqdm.auto import tqdm

from engine.data.batches import BatchPlan, prefetch
from engine.data.logps_cache import Belongs, StoredLogps
from engine.data.pair_tokens import PairTokens
from engine.data.shapes import Shape
from engine.errors import InputError
from engine.models import Decoder
from engine.objective.scoring import (
    ScoringOptions,
    group_tokens,
    score_completions,
)
from engine.parallel import processes
from engine.parallel.batch import Batch, abstract_batch, batch_specs, put_batch
from engine.parallel.collectives import after
from engine.parallel.sharding import DATA, param_specs, place
from engine.training.compilation import Compiled, Request, compile_all, enough_memory
from engine.training.compiler_options import compiler_options
from engine.training.fingerprint import fingerprint
from engine.training.prepare import Prepared, step_options
from engine.training.step import StepOptions

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]  # A, N and P of a batch

_AHEAD = 2  # batches that the device is given before the first one's values are fetched


class Part(NamedTuple):
    """A data set of a run that is to be scored."""

    name: str  # of the option that gave it
    pairs: PairTokens
    plan: BatchPlan
    stored: StoredLogps
    # The pairs of each batch that has one whose values are not known.
    batches: Int64[np.ndarray, "batches pairs"]
    shapes: tuple[Shape, ...]


def with_reference_values(
    run: Prepared, policy: Decoder, given: Decoder | None
) -> Prepared:
    """The run, its pairs with the reference's log-probabilities where it wants them.

    What the data does not bring and the disk does not hold is scored here, in the
    batches of training's first epoch. Then `given` is freed: its arrays are deleted,
    but for those that are the policy's too. None: the policy as it is now, of which no
    copy is made.

    Raises:
        InputError: a log-probability that is not finite.
    """
    if not run.reads_values:
        return run
    decoder = policy if given is None else given
    options = step_options(run.arguments)
    values = {}
    sets = {key: x for key, x in run.sets.items() if x[0].ref_logps is None}
    if sets:
        began = time.perf_counter()
        reference = reference_key(decoder, options.scoring)
        parts = {
            key: _part(key, pairs, plan, reference)
            for key, (pairs, plan) in sets.items()
        }
        num_batches = sum(len(part.batches) for part in parts.values())
        if num_batches:
            _score(run, decoder, options, parts.values(), num_batches)
            seconds = time.perf_counter() - began
            logger.info("scored the reference in %.1f s", seconds)
        values = {key: part.stored.values for key, part in parts.items()}
    if given is not None:
        free(given, policy)
    return run.with_ref_logps(values)


def free(decoder: Decoder, policy: Decoder) -> None:
    """Delete the arrays of a model, but for those that are also the policy's."""
    kept = {id(x) for x in jax.tree.leaves(nnx.state(policy))}
    for x in jax.tree.leaves(nnx.state(decoder)):
        if id(x) not in kept:
            x.delete()


def tokens_key(pairs: PairTokens) -> str:
    """A hash of the tokens, and of which are scored; not of rows' numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for field in dataclasses.fields(pairs):
        value = getattr(pairs, field.name)
        if isinstance(value, np.ndarray) and field.name not in _NOT_SCORED:
            digest.update(f"{field.name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value).view(np.uint8))
    return digest.hexdigest()


_NOT_SCORED = ("rows", "weights", "cut", "ref_logps")


_ROUNDING = ("implementation", "workspace_bytes", "arrangement", "attention")


def reference_key(decoder: Decoder, scoring: ScoringOptions) -> str:
    """A hash of all of the reference and of the scoring that changes a value.

    The weights count as what is computed with them, wherever they come from. How the op
    and attention are run, mesh and batches change rounding alone, and are left out;
    every other option of scoring is in.
    """
    counts = {
        field.name: getattr(scoring, field.name)
        for field in dataclasses.fields(scoring)
        if field.name not in _ROUNDING
    }
    config = decoder.config
    if config.adapter is not None:
        # Where it came from, and what it does in training alone.
        own = dataclasses.replace(config.adapter, dropout=0.0, base=None, dtype=None)
        config = dataclasses.replace(config, adapter=own)
    digest = hashlib.blake2b(digest_size=16)
    facts = config, decoder.dtype.name, sorted(counts.items())
    digest.update(repr(facts).encode())
    digest.update(fingerprint(decoder))
    return digest.hexdigest()


def _part(key: str, pairs: PairTokens, plan: BatchPlan, reference: str) -> Part:
    """What is known of a data set, and what has to be scored."""
    name = f"{key}dataset" if key else "train_dataset"
    stored = StoredLogps(Belongs(tokens_key(pairs), reference), len(pairs))
    missing = stored.missing
    members = dataclasses.replace(plan.order, drop_last=False).epoch(0)
    batches = members[(missing[members] & (members >= 0)).any(axis=1)]
    shapes = plan.shapes
    if len(batches) and not all(
        any(s >= longest and t >= most for s, t in shapes)
        for longest, most in zip(*plan.layout.needs(batches), strict=True)
    ):
        shapes = tuple(dict.fromkeys((*shapes, plan.layout.largest())))
    unknown, total = int(missing.sum()), len(pairs)
    if not unknown:
        logger.info(
            "%s: read the reference's log-probabilities of %d pairs from %s",
            name,
            total,
            stored.folder,
        )
    else:
        why = ""
        if unknown < total:
            why = f"; the other {total - unknown} are known from a run before"
        elif stored.has_others:
            why = "; what is kept of these pairs is of other weights, dtype or scoring"
        logger.info(
            "%s: %d of %d pairs are scored under the reference%s; kept in %s",
            name,
            unknown,
            total,
            why,
            stored.folder,
        )
    return Part(name, pairs, plan, stored, batches, shapes)


def make_scoring_step(decoder: Decoder, options: StepOptions):
    """The jitted scoring: (the decoder's arrays, batch) -> [A, 2, pairs of it]."""
    graphdef, scoring = nnx.graphdef(decoder), options.scoring

    def score(operands: Any, batch: Batch) -> Array:
        model = nnx.merge(graphdef, operands)

        def logps(microbatch: Batch) -> Array:
            group = group_tokens(microbatch)
            microbatch = after(microbatch, group, decoder.mesh)
            found = score_completions(model, microbatch, group, scoring)
            return jnp.stack([found.chosen, found.rejected])

        return lax.map(logps, batch)

    sharded = jax.shard_map(
        score,
        mesh=decoder.mesh,
        in_specs=(
            param_specs(decoder.config, decoder.mesh),
            batch_specs(arrangement=scoring.arrangement),
        ),
        out_specs=P(None, None, DATA),
    )
    whole = place(P(), decoder.mesh)  # for every process to read
    told = compiler_options(decoder.mesh, overlap=options.overlap_collectives)
    return jax.jit(sharded, out_shardings=whole, compiler_options=told)


def _score(
    run: Prepared,
    decoder: Decoder,
    options: StepOptions,
    parts: Iterable[Part],
    num_batches: int,
) -> None:
    """Every batch of every part; what is done stays on disk, whatever comes then."""
    step, params = make_scoring_step(decoder, options), nnx.state(decoder)
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    shapes: dict[Grid, dict[Shape, tuple[Any, ...]]] = {}
    for part in parts:
        grid = part.plan.layout.grid
        for shape in part.shapes if len(part.batches) else ():
            batch = abstract_batch(
                shape, grid, run.mesh, arrangement=options.scoring.arrangement
            )
            arguments = operands, batch
            shapes.setdefault(grid, {})[shape] = arguments
    compiled = compile_all([Request(step, arguments) for arguments in shapes.values()])
    programs = dict(zip(shapes, compiled, strict=True))
    bar = tqdm(
        total=num_batches,
        desc="reference",
        unit="batch",
        disable=None if run.arguments.progress_bar and processes.is_first() else True,
    )
    with bar, enough_memory():
        for part in parts:
            try:
                _score_part(run, part, programs, params, bar)
            finally:
                part.stored.flush()
            part.stored.finish()


def _score_part(
    run: Prepared,
    part: Part,
    programs: dict[Grid, Compiled],
    operands: Any,
    bar: tqdm,
) -> None:
    program = programs.get(part.plan.layout.grid)
    waiting: deque[tuple[np.ndarray, Array]] = deque()

    def fetch() -> None:
        members, found = waiting.popleft()
        values = np.asarray(jax.device_get(found)).swapaxes(1, 2).reshape(-1, 2)
        real = members >= 0
        _check_finite(part, members[real], values[real])
        part.stored.add(members[real], values[real])
        bar.update(1)

    with contextlib.closing(prefetch(_built(part))) as batches:
        for members, batch in batches:
            assert program is not None
            found = program(operands, put_batch(batch, run.mesh))
            waiting.append((members, found))
            if len(waiting) > _AHEAD:
                fetch()
    while waiting:
        fetch()


def _built(part: Part) -> Iterator[tuple[np.ndarray, Batch]]:
    for members in part.batches:
        yield members, part.plan.layout.build(members, part.shapes)[0]


def _check_finite(part: Part, pairs: np.ndarray, values: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        place, side = bad[0].tolist()
        raise InputError(
            f"{part.name}, row {int(part.pairs.rows[pairs[place]])} (counting from 0): "
            f"the reference's log-probability of {('chosen', 'rejected')[side]} is "
            f"{values[place, side]}; give another reference_model"
        )
