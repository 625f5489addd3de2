"""Runs of a small model's step on any mesh, which share what they compile."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.tokenization import PairTokens, ragged_arange
from engine.models import Decoder, init_model, parse_hf_config
from engine.parallel.batch import put_batch
from engine.training.metrics import means
from engine.training.optimizer import make_optimizer
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.schedules import learning_rate_schedule
from engine.training.step import (
    init_state,
    make_train_step,
    split_model,
)
from tests.engine.tiny_models import mesh_of
from tests.engine.training.collective_order import unordered

# An odd vocabulary, padded on every mesh; one kv head for every four devices' heads.
CONFIG = parse_hf_config(
    {
        "model_type": "gemma2",
        "vocab_size": 201,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "initializer_range": 0.3,
    }
)
BETA = 0.2
# Sequences of at most 24 tokens, 256 of a shard's scored: any 16 pairs fit, so runs
# share programs.
LONGEST, SCORED = 24, 256
EPS = float(np.finfo(np.float32).eps)


def make_pairs(count: int, seed: int = 0) -> PairTokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 23, 2 * count)
    # Some completions are all but one token, some a single one.
    starts = np.array([rng.integers(1, n) for n in lengths], np.int32)
    return PairTokens(
        tokens=rng.integers(0, 201, lengths.sum()).astype(np.int32),
        scored=ragged_arange(0 * lengths, lengths) >= np.repeat(starts, lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        completion_start=starts,
        rows=np.arange(count),
        weights=np.ones(count, np.float32),
    )


def prompted_pairs(count: int, seed: int = 0) -> PairTokens:
    """Pairs with a prompt of 1 to 10 tokens, and some whose answers begin alike."""
    rng = np.random.default_rng(seed)
    sequences, scored, starts = [], [], []
    for _ in range(count):
        prompt = rng.integers(0, 201, rng.integers(1, 11))
        alike = rng.integers(0, 201, rng.integers(0, 3))
        for _ in range(2):
            answer = rng.integers(0, 201, rng.integers(1, 11))
            answer = np.concatenate([alike, answer])
            marks = rng.random(len(answer)) < 0.8
            marks[rng.integers(len(answer))] = True
            sequences.append(np.concatenate([prompt, answer]))
            scored.append(np.concatenate([np.zeros(len(prompt), bool), marks]))
            starts.append(len(prompt))
    return PairTokens(
        tokens=np.concatenate(sequences).astype(np.int32),
        scored=np.concatenate(scored),
        offsets=np.concatenate([[0], np.cumsum([len(x) for x in sequences])]),
        completion_start=np.array(starts, np.int32),
        rows=np.arange(count),
        weights=rng.uniform(0.5, 2, count).astype(np.float32),
    )


def model_on(sizes: tuple[int, ...], seed: int = 0, **kwargs) -> Decoder:
    given: dict[str, Any] = {"dtype": "float32"} | kwargs
    return init_model(CONFIG, mesh=mesh_of(sizes), seed=seed, **given)


class Ran(NamedTuple):
    lines: list[dict[str, float]]  # the metrics of each step
    pairs: int  # of a step
    params: dict  # the final ones, as the host sees them


def plan_of(pairs, config, sizes) -> BatchPlan:
    """Batches of one shape, whatever the pairs are."""
    size, accumulation = config.total_batch_size, config.gradient_accumulation_steps
    plan = BatchPlan(
        Order(num_pairs=len(pairs), pairs_per_batch=size),
        Layout(
            pairs,
            size,
            accumulation,
            sizes[0] * sizes[1],
            arrangement=config.arrangement,
        ),
    )
    of_shard = plan.grid[2]
    in_a_row = 2 * of_shard // config.arrangement.rows(of_shard)
    plan.shapes = ((in_a_row * LONGEST, SCORED),)
    return plan


def numbers_of(config: DPOConfig):
    return jax.tree.map(jnp.float32, loss_options(config))


@functools.cache
def compiled(sizes, seeds, model_options, settings, steps):
    """The compiled step and what it is called with, shared by runs of other numbers.

    Its collectives are in order (`engine.parallel.collectives.after`).

    Both are made from scratch for a call, since a run uses its arrays up.
    """
    config = DPOConfig(**dict(settings))

    def make():
        model = model_on(sizes, seeds[0], **dict(model_options))
        given = None
        if len(seeds) > 1:
            given = model_on(sizes, seeds[1], **dict(model_options))
        return model, make_reference(model, given, config)

    model, reference = make()
    optimizer = make_optimizer(config, model.config, model.mesh, steps)
    schedule = learning_rate_schedule(config, steps)
    jit: Any = make_train_step(
        model, reference, optimizer, schedule, step_options(config)
    )

    @functools.cache
    def executable():
        """Of all steps: what each gives is of the shapes and shardings that it took."""
        model, reference = make()
        state, frozen = init_state(model, optimizer), split_model(model)[2]
        batch, _ = next(plan_of(make_pairs(1), config, sizes).batches())
        arguments = reference.operands, put_batch(batch, model.mesh), numbers_of(config)
        found = jit.lower(state, frozen, *arguments).compile()
        assert model.mesh.size == 1 or not unordered(found.as_text())
        return found

    return config, executable, optimizer, make


def run(
    sizes,
    *,
    pairs=None,
    steps=3,  # of the schedule, which is compiled in
    batches=None,  # after which to stop; None: of all pairs
    seeds=(0, 1),
    beta=BETA,
    model_options=None,
    **more,
) -> Ran:
    settings = {"total_batch_size": 16, "learning_rate": 1e-2, "beta": BETA} | more
    config, executable, optimizer, make = compiled(
        sizes,
        seeds,
        tuple((model_options or {}).items()),
        tuple(settings.items()),
        steps,
    )
    model, reference = make()
    pairs = make_pairs(16 * steps) if pairs is None else pairs
    plan = plan_of(pairs, config, sizes)
    state, frozen = init_state(model, optimizer), split_model(model)[2]
    numbers = numbers_of(dataclasses.replace(config, beta=beta))
    lines, weights = [], []
    for batch, _ in itertools.islice(plan.batches(), batches):
        state, out = executable()(
            state, frozen, reference.operands, put_batch(batch, model.mesh), numbers
        )
        assert out.finite
        lines.append(means(out.sums) | {"grad_norm": float(out.grad_norm)})
        weights.append(int(out.sums.weights["pairs"]))
    params = jax.tree.map(np.asarray, jax.device_get(state.params))
    return Ran(lines, weights[-1], params)


def sum_error(line: dict[str, float]) -> float:
    """How far a mean log-probability of a sequence may be off, in nats.

    Each is a sum over tokens, in an order that depends on the mesh and the compiler:
    some units in the last place of the sum.
    """
    return 4 * EPS * max(abs(line["logps/chosen"]), abs(line["logps/rejected"]))


def assert_same(got: Ran, want: Ran, rtol=2e-5):
    """To float32 rounding: of three steps, of which Adam's first divides g by |g|.

    Rewards and margins are differences of sums of log-probabilities, and are as good as
    those sums: their bound is made of the sums, not of the difference.
    """
    for line, wanted in zip(got.lines, want.lines, strict=True):
        difference = 4 * BETA * sum_error(wanted)
        for name, value in wanted.items():
            atol = difference if name.startswith("rewards/") else 1e-6
            if (
                name.startswith("log_ratio/") or name == "centre"
            ):  # of sums, in nats a token
                atol = sum_error(wanted)
            np.testing.assert_allclose(
                line[name], value, rtol=rtol, atol=atol, err_msg=name
            )
    leaves = jax.tree.leaves(got.params), jax.tree.leaves(want.params)
    for a, b in zip(*leaves, strict=True):
        kept = tuple(slice(0, min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
        np.testing.assert_allclose(a[kept], b[kept], rtol=1e-3, atol=2e-4)
