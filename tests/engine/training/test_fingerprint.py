"""What values of the reference are kept under: hashes of weights and of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from engine.objective.scoring import ScoringOptions
from engine.parallel.sharding import make_mesh
from engine.training.fingerprint import fingerprint
from engine.training.precompute import reference_key, tokens_key
from tests.engine.tiny_models import one_device, tiny_config, tiny_model
from tests.engine.training.runs import make_trainer


def test_a_fingerprint_is_of_the_weights_alone():
    config = tiny_config("qwen3")
    plain = fingerprint(tiny_model(config, one_device()))
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    assert fingerprint(tiny_model(config, mesh)) == plain  # whose vocabulary is padded
    # Stored in more digits than are computed with.
    half = tiny_model(config, one_device(), dtype="bfloat16")
    stored = fingerprint(half)
    assert stored != plain
    cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(half))
    nnx.update(half, cast)
    assert fingerprint(half) == stored

    model = tiny_model(config, one_device())
    q = model.layers["q"]
    q.set_value(q[...].at[1, 2, 3].add(1e-6))
    changed = fingerprint(model)
    assert changed != plain
    q.set_value(tiny_model(config, one_device()).layers["q"][...][::-1])  # same numbers
    assert fingerprint(model) not in (plain, changed)


def test_keys_are_of_all_that_changes_a_value(tmp_path):
    model = tiny_model(tiny_config("qwen3"), one_device())
    key = reference_key(model, ScoringOptions())
    # How the op runs is no part of it.
    assert reference_key(model, ScoringOptions(implementation="xla")) == key
    assert reference_key(model, ScoringOptions(ld_alpha=0.5)) != key
    other = dataclasses.replace(model.config, rms_eps=1e-4)
    model.config = other
    assert reference_key(model, ScoringOptions()) != key

    pairs = make_trainer(tmp_path, evaluate=False).run.sets[""][0]
    key = tokens_key(pairs)
    assert tokens_key(dataclasses.replace(pairs, rows=pairs.rows + 5)) == key
    tokens, scored = pairs.tokens.copy(), pairs.scored.copy()
    tokens[-1] += 1
    scored[-1] = not scored[-1]
    assert tokens_key(dataclasses.replace(pairs, tokens=tokens)) != key
    assert tokens_key(dataclasses.replace(pairs, scored=scored)) != key
