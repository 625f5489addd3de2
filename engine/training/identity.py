"""What a run is: its configuration and what it started from, and how two differ."""

import dataclasses
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from engine.config.dpo import DPOConfig
from engine.data.pairs import PairTokens
from engine.errors import InputError
from engine.parallel.host_memory import on_device
from engine.parallel.sharding import whole

logger = logging.getLogger(__name__)

# What may be changed between two parts of a run: it says what is reported and saved, or
# by which way the same numbers are computed. (A section stands for all of it.)
_HARMLESS = (
    "actions",
    "eval_mixture",
    "mixture.cache_dir",
    "model.mlp_tile",
    "model.remat",
    "sharding",
    "trainer.attention",
    "trainer.early_stopping_patience",
    "trainer.early_stopping_threshold",
    "trainer.eval_batch_size",
    "trainer.eval_on_start",
    "trainer.eval_steps",
    "trainer.generation_max_new_tokens",
    "trainer.generation_num_prompts",
    "trainer.generation_temperature",
    "trainer.implementation",
    "trainer.load_best_model_at_end",
    "trainer.log_steps",
    "trainer.model_name",
    "trainer.max_skipped_steps",
    "trainer.offload_ref_model",
    "trainer.on_nonfinite",
    "trainer.overlap_collectives",
    "trainer.packing",
    "trainer.progress_bar",
    "trainer.resume",
    "trainer.save_directory",
    "trainer.save_dtype",
    "trainer.save_interval_minutes",
    "trainer.save_steps",
    "trainer.save_total_limit",
    "trainer.share_prompt",
    "trainer.start_check",
    "trainer.use_tensorboard",
    "trainer.use_wandb",
    "trainer.workspace_bytes",
)
_LENGTH = ("trainer.num_train_epochs", "trainer.max_training_steps")
_LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A configuration's values by their dotted keys, as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, list | tuple):
        value = {str(i): x for i, x in enumerate(value)}
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, Any] = {}
    for key, one in value.items():
        found |= flat(one, f"{name}.{key}" if name else str(key))
    return found


def check_same_run(
    then: Mapping[str, Any], now: Mapping[str, Any], arguments: DPOConfig, where: str
) -> list[str]:
    """The changes that do no harm, in words; refuses to go on with another kind of run.

    Raises:
        InputError: with the first key that does harm, and both values.
    """
    # An option that the program had not yet was as it is by default.
    then = {**_defaults_of_new(then, arguments), **then}
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    changes = {
        key: f"{key} was {_shown(then, key)} and is {_shown(now, key)}" for key in keys
    }
    harmless = _HARMLESS + (_LENGTH if _any_length(arguments) else ())
    harmful = [key for key in keys if not _is_within(key, harmless)]
    if harmful:
        for key in keys if len(keys) > 1 else ():  # the error has room for one
            note = "" if key in harmful else ", which does no harm"
            logger.error("%s: %s%s", where, changes[key], note)
        others = f" (and {len(harmful) - 1} more)" if len(harmful) > 1 else ""
        raise InputError(
            f"{where}: {changes[harmful[0]]}{others}; a run goes on as it began: set "
            "it back, or give another save_directory"
        )
    return list(changes.values())


def _defaults_of_new(then: Mapping[str, Any], arguments: DPOConfig) -> dict[str, Any]:
    """Of the options of which a whole configuration of a run says nothing."""
    fields = {f"trainer.{f.name}": f.default for f in dataclasses.fields(arguments)}
    assert dataclasses.MISSING not in fields.values()
    said = {".".join(key.split(".")[:2]) for key in then}
    return {key: x for key, x in fields.items() if key not in said}


def _is_within(key: str, sections: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in sections)


def _any_length(arguments: DPOConfig) -> bool:
    """Whether a step is the same in a run of more steps."""
    kind = arguments.lr_scheduler_type
    return kind in _LENGTHLESS and not arguments.warmup_ratio


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not given"


def checksum_of_pairs(pairs: PairTokens) -> str:
    """Of what a run trains on."""
    value = 0
    arrays = [pairs.tokens, pairs.offsets, pairs.scored, pairs.weights]
    if pairs.ref_logps is not None:  # where these come from is the reference
        arrays.append(pairs.ref_logps)
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return f"{len(pairs)} pairs, checksum {value:08x}"


def checksum_of_arrays(tree: Any) -> str:
    """Of arrays on the devices: the same however they are sharded or padded with 0."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return "none"
    sums = jax.device_get(jax.jit(_sums, out_shardings=whole(leaves[0]))(leaves))
    return f"{zlib.crc32(np.asarray(sums, np.uint32).tobytes()):08x}"


def _sums(leaves: list[Array]) -> UInt32[Array, " n"]:
    return jnp.stack([_sum(x) for x in leaves])


def _sum(x: Array) -> UInt32[Array, ""]:
    """Of an array's bits, each times an odd number that its place says; modulo 2^32.

    Sums of whole numbers are the same in any order.
    """
    x = on_device(x)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(0x9E3779B1) + index
    return (bits * (place * jnp.uint32(2) + jnp.uint32(1))).sum(dtype=jnp.uint32)
