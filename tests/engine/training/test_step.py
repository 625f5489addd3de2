"""The step over meshes, accumulation and precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan
from engine.data.tokenization import PairTokens
from engine.models import Decoder, init_model, parse_hf_config
from engine.objective.references import make_reference, sync_reference
from engine.parallel.sharding import make_mesh
from engine.training.optimizer import learning_rate_schedule, make_optimizer
from engine.training.preparation import step_options
from engine.training.step import init_state, make_eval_step, make_train_step, put_batch

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
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def make_pairs(count: int, seed: int = 0) -> PairTokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 23, 2 * count)
    # Some completions are all but one token, some a single one.
    starts = np.array([rng.integers(1, n) for n in lengths], np.int32)
    return PairTokens(
        tokens=rng.integers(0, 201, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        score_start=starts,
        rows=np.arange(count),
        dropped=0,
    )


def model_on(sizes: tuple[int, int, int], seed: int = 0, **kwargs) -> Decoder:
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    kwargs = {"dtype": "float32"} | kwargs
    return init_model(CONFIG, mesh=mesh, seed=seed, **kwargs)


def run(sizes, *, pairs=None, steps=3, seeds=(0, 1), model_options=None, **settings):
    """Sums of each step, and the final parameters as the host sees them."""
    config = DPOConfig(
        **({"total_batch_size": 16, "learning_rate": 1e-2, "beta": 0.2} | settings)
    )
    model = model_on(sizes, seeds[0], **(model_options or {}))
    given = None
    if len(seeds) > 1:
        given = model_on(sizes, seeds[1], **(model_options or {}))
    reference = make_reference(
        model,
        given,
        reference_free=config.reference_free,
        synced=config.sync_ref_model,
    )
    plan = BatchPlan(
        make_pairs(16 * steps) if pairs is None else pairs,
        pairs_per_batch=config.total_batch_size,
        accumulation=config.gradient_accumulation_steps,
        shards=sizes[0] * sizes[1],
    )
    optimizer = make_optimizer(config, model.config, steps)
    step = make_train_step(model, reference, optimizer, step_options(config))
    state = init_state(model, optimizer)
    ref_params = None if reference is None else nnx.state(reference, nnx.Param)
    seen = []
    for batch, _ in plan.batches(0):
        state, sums = step(state, ref_params, put_batch(batch, model.mesh))
        seen.append({name: float(x) for name, x in sums.items()})
    return seen, jax.tree.map(np.asarray, jax.device_get(state.params))


@pytest.fixture(scope="module")
def one_device():
    return run((1, 1, 1))


def assert_same(got, want, rtol=2e-5):
    """To float32 rounding: of three steps, of which Adam's first divides g by |g|."""
    for line, wanted in zip(got[0], want[0], strict=True):
        for name, value in wanted.items():
            np.testing.assert_allclose(
                line[name], value, rtol=rtol, atol=1e-5, err_msg=name
            )
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        kept = tuple(slice(0, min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
        np.testing.assert_allclose(a[kept], b[kept], rtol=1e-3, atol=2e-4)


@pytest.mark.numerics
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_meshes_agree(sizes, one_device):
    assert_same(run(sizes), one_device)


def test_the_comparison_would_notice(one_device):
    """Another beta, and pairs in another order, are outside the tolerance."""
    with pytest.raises(AssertionError):
        assert_same(run((1, 1, 1), beta=0.201), one_device)


def test_accumulation_equals_the_whole_batch(one_device):
    assert_same(run((1, 1, 1), gradient_accumulation_steps=4), one_device)
    assert_same(run((2, 2, 2), gradient_accumulation_steps=2), one_device)


def test_filler_pairs_weigh_nothing():
    """Sixteen places for three pairs, alone and over eight devices."""
    pairs = make_pairs(3)
    want = run((1, 1, 1), pairs=pairs, steps=1, total_batch_size=3)
    assert_same(run((1, 1, 1), pairs=pairs, steps=1), want)
    assert_same(run((2, 4, 1), pairs=pairs, steps=1), want)


@pytest.mark.numerics
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_margins_start_at_exactly_zero_in_bfloat16(sizes, remat):
    """The policy's forward and the reference's are the same bits, though one is under
    autodiff and the other is not."""
    options = {"dtype": "bfloat16", "remat": remat}
    seen, _ = run(sizes, steps=1, seeds=(0,), model_options=options)
    assert seen[0]["chosen_rewards"] == seen[0]["rejected_rewards"] == 0
    assert seen[0]["loss"] == pytest.approx(16 * np.log(2), rel=1e-6)


def test_no_reference_scores_as_zeros():
    seen, _ = run((1, 1, 1), steps=1, seeds=(0,), reference_free=True)
    rewards = 0.2 * seen[0]["chosen_logps"]
    assert seen[0]["chosen_rewards"] == pytest.approx(rewards, rel=1e-6)


def test_evaluation_gives_the_sums_of_the_training_step():
    config = DPOConfig(total_batch_size=16, beta=0.2)
    model, other = model_on((2, 2, 2)), model_on((2, 2, 2), seed=1)
    plan = BatchPlan(make_pairs(16), pairs_per_batch=16, shards=4)
    batch = put_batch(plan.batch(0, 0)[0], model.mesh)
    reference = make_reference(model, other)
    evaluate = make_eval_step(model, reference, step_options(config))
    params, ref_params = (nnx.state(m, nnx.Param) for m in (model, other))
    sums = evaluate(params, ref_params, batch)
    trained = run((2, 2, 2), pairs=make_pairs(16), steps=1)[0][0]
    for name, value in sums.items():
        np.testing.assert_allclose(value, trained[name], rtol=1e-5, atol=1e-5)


def test_clipping_bounds_the_update():
    """Plain Adam does not see a scale of g, but its epsilon does: here it dominates."""

    def at(max_grad_norm, learning_rate):
        return run(
            (1, 1, 1),
            steps=1,
            adam_epsilon=1.0,
            max_grad_norm=max_grad_norm,
            learning_rate=learning_rate,
        )

    free, clipped, start = at(None, 1.0), at(1e-3, 1.0), at(1e-3, 0.0)
    norm = free[0][0]["grad_norm"]
    assert norm > 0.1 and clipped[0][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)

    def change(params):
        moved = jax.tree.map(lambda a, b: np.square(a - b).sum(), params, start[1])
        return np.sqrt(sum(jax.tree.leaves(moved)))

    # The first update is g / (|g| + 1), about g for a small g.
    assert change(clipped[1]) == pytest.approx(1e-3, rel=0.01)
    assert change(free[1]) > 0.05


def test_the_reference_follows_the_policy():
    policy, reference = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    mixed = sync_reference(reference, policy, alpha=0.25)
    np.testing.assert_array_equal(mixed["w"], np.full(3, 0.25))


@pytest.mark.parametrize(
    "kind, want",
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_schedules(kind, want):
    config = DPOConfig(learning_rate=2.0, lr_scheduler_type=kind, warmup_steps=2)
    schedule = learning_rate_schedule(config, 6)
    got = [float(schedule(step)) for step in range(6)]
    np.testing.assert_allclose(got, 2 * np.array(want), rtol=1e-6)
