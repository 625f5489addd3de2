"""The two steps that `train_step.py` compares, each run in a process of its own."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.tokenization import PairTokens
from engine.models import Decoder, DecoderConfig, init_model, parse_hf_config
from engine.objective.interface import LossOptions, PairLogps
from engine.objective.losses import LOSSES
from engine.parallel.batch import Batch, put_batch
from engine.parallel.sharding import BATCH, SEQUENCE, make_mesh, param_specs
from engine.training.metrics import means
from engine.training.optimizer import Optimizer, make_optimizer
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.schedules import learning_rate_schedule
from engine.training.step import (
    StepOut,
    TrainState,
    init_state,
    make_train_step,
    split_model,
    update,
)

STEPS = 1000  # of the schedule
OURS, PLAIN, PLAIN_OPTAX = "dpo_kernels", "plain JAX, log_softmax", "plain JAX, optax"
ARGUMENTS = DPOConfig(
    total_batch_size=8,
    learning_rate=1e-4,
    weight_decay=0.01,
    max_grad_norm=1.0,
)
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of one comparison."""

    vocab: int
    layers: int = 4
    hidden: int = 256
    pairs: int = 8
    prompt: int = 125  # tokens, the same in every sequence
    completion: int = 125
    dtype: str = "float32"  # of the products; parameters are float32

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.completion

    def config(self) -> DecoderConfig:
        """A Llama with the proportions of the 8B one."""
        return parse_hf_config(
            {
                "model_type": "llama",
                "vocab_size": self.vocab,
                "hidden_size": self.hidden,
                "intermediate_size": 7 * self.hidden // 2,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.hidden // 64,
                "num_key_value_heads": self.hidden // 128,
                "max_position_embeddings": self.length,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
            }
        )

    def tokens(self) -> PairTokens:
        """Random ids."""
        sequences = 2 * self.pairs
        size = sequences * self.length
        rng = np.random.default_rng(0)
        return PairTokens(
            tokens=rng.integers(0, self.vocab, size).astype(np.int32),
            scored=np.tile(np.arange(self.length) >= self.prompt, sequences),
            offsets=np.arange(0, size + 1, self.length),
            completion_start=np.full(sequences, self.prompt, np.int32),
            rows=np.arange(self.pairs),
            weights=np.ones(self.pairs, np.float32),
        )

    def batch(self) -> Batch:
        """All pairs, as the trainer lays them out."""
        order = Order(num_pairs=self.pairs, pairs_per_batch=self.pairs)
        plan = BatchPlan(order, Layout(self.tokens(), self.pairs, 1, 1))
        return next(plan.batches())[0]

    def head_rows(self, name: str) -> int:
        """Rows of hidden states that are multiplied by the head."""
        if name == OURS:
            return 2 * self.pairs * self.completion
        return 2 * self.pairs * (self.length - 1)

    def flops(self, name: str) -> int:
        """Of the head's products, see `train_step`, and of the layers' weights."""
        head = (10 if name == OURS else 8) * self.head_rows(name)
        layers = [p for p in self.config().parameters().values() if p.stacked]
        weights = self.layers * sum(int(np.prod(p.shape)) for p in layers)
        # Reference 2, policy 2, recomputed 2, backward 4.
        decoder = 10 * 2 * self.pairs * self.length * weights
        return head * self.hidden * self.vocab + decoder


class Candidate:
    """A compiled step, its state, and what it is given each time."""

    def __init__(self, step: Any, state: TrainState, *inputs: Any):
        """Compiles."""
        self._inputs = inputs
        start = time.perf_counter()
        self._step = step.lower(state, *inputs).compile()
        self.compile_seconds = time.perf_counter() - start
        self._state = state

    @property
    def temporaries(self) -> int:
        """Bytes, by the compiler's account."""
        return self._step.memory_analysis().temp_size_in_bytes

    def __call__(self) -> dict[str, Any]:
        """Wall and processor seconds of a step, and its metrics."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._state, metrics = self._step(self._state, *self._inputs)
        jax.block_until_ready((self._state, metrics))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall, "cpu": cpu, "metrics": _on_host(jax.device_get(metrics))}


def _on_host(metrics: StepOut | dict[str, Array]) -> dict[str, float]:
    """The metrics that both sides have, from what their steps return."""
    if isinstance(metrics, StepOut):
        found = means(metrics.sums) | {"grad_norm": float(metrics.grad_norm)}
    else:
        found = {name: float(x) for name, x in metrics.items()}
    return {name: found[name] for name in METRICS}


def make_candidate(name: str, workload: Workload) -> Candidate:
    """One side, from the same parameters, reference and tokens as the other."""
    config, mesh = workload.config(), make_mesh(1, 1, 1, jax.devices()[:1])
    model = init_model(config, mesh=mesh, dtype=workload.dtype)
    # Another one than the policy: with equal ones every reward would be 0.
    reference = init_model(config, mesh=mesh, dtype=workload.dtype, seed=1)
    frozen_model = make_reference(model, reference, ARGUMENTS)
    optimizer = make_optimizer(ARGUMENTS, config, mesh, total_steps=STEPS)
    state, batch = init_state(model, optimizer), workload.batch()
    if name == OURS:
        schedule, options = (
            learning_rate_schedule(ARGUMENTS, STEPS),
            step_options(ARGUMENTS),
        )
        step = make_train_step(model, frozen_model, optimizer, schedule, options)
        return Candidate(
            step,
            state,
            split_model(model)[2],
            frozen_model.operands,
            put_batch(batch, mesh),
            jax.tree.map(jnp.float32, loss_options(ARGUMENTS)),
        )
    ref_params = frozen_model.operands
    tokens_RS = jnp.asarray(batch.rows.tokens[0, :, : workload.length])
    mask = np.arange(1, workload.length) >= workload.prompt
    mask_RS = jnp.tile(mask.astype(np.float32), (2 * workload.pairs, 1))
    step = make_plain_step(model, optimizer, PICK[name])
    return Candidate(step, state, ref_params, tokens_RS, mask_RS)


def _log_softmax(logits_RSV: Array, targets_RS: Array) -> Array:
    logprobs_RSV = jax.nn.log_softmax(logits_RSV, axis=-1)
    return jnp.take_along_axis(logprobs_RSV, targets_RS[:, :, None], axis=-1)[:, :, 0]


def _optax(logits_RSV: Array, targets_RS: Array) -> Array:
    return -optax.softmax_cross_entropy_with_integer_labels(logits_RSV, targets_RS)


PICK = {PLAIN: _log_softmax, PLAIN_OPTAX: _optax}


def make_plain_step(model: Decoder, optimizer: Optimizer, pick: Callable) -> Callable:
    """The usual trainer: (state, reference, tokens, mask) -> (state, metrics)."""
    graphdef = nnx.split(model, nnx.Param)[0]
    options = LossOptions(beta=ARGUMENTS.beta)
    decode = jax.shard_map(
        lambda params, tokens: nnx.merge(graphdef, params)(tokens),
        mesh=model.mesh,
        in_specs=(param_specs(model.config, model.mesh), P(BATCH)),
        out_specs=P(BATCH, SEQUENCE),
    )

    def logps(
        params: nnx.State, tokens: Int[Array, "R S"], mask: Float[Array, "R S-1"]
    ) -> tuple[Array, Array]:
        hidden_RSD = decode(params, tokens)[:, :-1]
        head = nnx.merge(graphdef, params).head_weight()
        logits_RSV = jnp.einsum("RSD,VD->RSV", hidden_RSD, head)
        logprob_RS = pick(logits_RSV, tokens[:, 1:])
        chosen, rejected = jnp.split((logprob_RS * mask).sum(axis=1), 2)
        return chosen, rejected

    def loss(params, ref_params, tokens, mask):
        policy, ref = logps(params, tokens, mask), logps(ref_params, tokens, mask)
        ref = jax.lax.stop_gradient(ref)
        lengths = jnp.split(mask.sum(axis=1), 2)
        pairs = PairLogps(
            chosen=policy[0],
            rejected=policy[1],
            ref_chosen=ref[0],
            ref_rejected=ref[1],
            chosen_length=lengths[0],
            rejected_length=lengths[1],
            weights=jnp.ones_like(lengths[0]),
            whole_chosen=policy[0],
            mean_chosen_length=jnp.full_like(lengths[0], lengths[0].mean()),
            likelihood=jnp.ones_like(lengths[0]),
        )
        rewards = {
            "rewards/chosen": options.beta * (policy[0] - ref[0]).mean(),
            "rewards/rejected": options.beta * (policy[1] - ref[1]).mean(),
        }
        return LOSSES["sigmoid"].function(pairs, options).per_pair.mean(), rewards

    def step(state: TrainState, ref_params, tokens, mask):
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), grads = value_and_grad(state.params, ref_params, tokens, mask)
        norm = optax.global_norm(grads)
        new_state = update(state, grads, norm, optimizer, step_options(ARGUMENTS))
        return new_state, metrics | {"loss": value, "grad_norm": norm}

    return jax.jit(step, donate_argnums=0)


def run_candidate(connection: Connection, name: str, workload: Workload) -> None:
    """A process's whole life: compile, a step whenever asked for, peak memory."""
    candidate = make_candidate(name, workload)
    connection.send(
        {
            "temp_bytes": candidate.temporaries,
            "compile_s": round(candidate.compile_seconds, 2),
        }
    )
    while connection.recv():
        connection.send(candidate())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send(peak * (1 if sys.platform == "darwin" else 1024))
