"""Programs to compile for a TPU: what `bench.tpu.schedule` can be pointed at.

A program is a function (generation, T, D, V, dtype, options) -> Program. To time a
kernel of one's own, write such a function anywhere and name it: `--program
path/to/file.py:name` or `--program package.module:name`. `options` holds what `--option
name=value` says; a program takes out of it what it knows, and what is left is an error.
"""

import dataclasses
import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ProgramError(Exception):
    """A program that cannot be built; one line says why."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to lower, and what the schedule alone does not tell."""

    function: Callable[..., Any]
    arguments: Sequence[Any]  # jax.ShapeDtypeStruct, without sharding
    # Useful FLOP of one call; None: those of the matrix instructions that run.
    flops: int | None = None
    # Operand of the Pallas kernel (by number) -> the int32 values it holds, where they
    # decide what runs: a number of valid rows, offsets.
    scalars: Mapping[int, Sequence[int]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)  # kept in the row
    # How often a call runs what is in a loop of XLA's whose length is in the data;
    # None: nobody knows.
    unknown_loop_runs: int | None = None


Build = Callable[[str, int, int, int, str, dict[str, Any]], Program]


def build(
    name: str,
    generation: str,
    shape: tuple[int, int, int],
    dtype: str,
    options: dict[str, Any],
) -> Program:
    """The program called `name` at shape (T, D, V).

    Raises:
        ProgramError: no such program, or options that it does not take.
    """
    left = dict(options)
    program = _find(name)(generation, *shape, dtype, left)
    if isinstance(program, tuple):
        program = Program(function=program[0], arguments=program[1])
    if left:
        raise ProgramError(f"{name} takes no option {', '.join(map(repr, left))}")
    return program


def _find(name: str) -> Build:
    place, colon, attribute = PROGRAMS.get(name, name).rpartition(":")
    if not colon:
        known = ", ".join(PROGRAMS)
        raise ProgramError(f"no program {name!r}; one of {known}, or file.py:function")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ProgramError(f"no file {place}")
        spec = importlib.util.spec_from_file_location("tpu_program", place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not hasattr(module, attribute):
        raise ProgramError(f"{place} has no {attribute}")
    return getattr(module, attribute)


# tokamax: autotuning data in its package hold device times at given configurations ----

TOKAMAX_DEVICES = {"v6e": "tpu_v6_lite", "v5p": "tpu_v5", "7x": "tpu7x"}
_OP = "linear_softmax_cross_entropy_loss"


def tokamax_times(generation: str, backward: bool) -> dict[tuple, dict[str, Any]]:
    """(T, D, V) -> config and times in ms, bfloat16 with reduction "mean".

    Empty where the package has no data for the generation.
    """
    import tokamax  # pyright: ignore[reportMissingImports]

    device = TOKAMAX_DEVICES.get(generation, generation)
    name = f"pallas_mosaic_tpu_{_OP}{'_vjp' if backward else ''}.json"
    (package,) = tokamax.__path__
    path = Path(package) / "data" / "autotuning" / device / name
    found = {}
    for key, value in (json.loads(path.read_text()) if path.exists() else {}).items():
        call = json.loads(key)
        if not (
            call["x"].startswith("bf16")
            and call["w"].startswith("bf16")
            and call["reduction"] == "mean"
            and not call["return_residuals"]
        ):
            continue
        T, D = json.loads(call["x"].removeprefix("bf16"))
        V = json.loads(call["w"].removeprefix("bf16"))[1]
        ((config, result),) = value.items()
        found[T, D, V] = {
            "config": json.loads(config),
            "times_ms": result["evaluation_times_ms"],
        }
    return found


def _tokamax_config(
    generation: str, shape: tuple, backward: bool, kernel: Any, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Block sizes, from the options, the package's data, or its heuristics; notes."""
    names = ("b_block_size", "h_block_size", "v_block_size", "buffer_count")
    given = {name: options.pop(name) for name in names if name in options}
    published = tokamax_times(generation, backward).get(shape)
    if published:
        config, source = published["config"], "published for this shape"
    else:
        # The heuristics ask the devices of the mesh that is being traced.
        make = (
            kernel.get_heuristic_bwd_config
            if backward
            else (kernel.get_heuristic_fwd_config)
        )
        config = dataclasses.asdict(make(*shape, dtype="bfloat16"))
        source = "the package's heuristics"
    if given:
        source = "given"
    config = {**config, **given}
    count = config["buffer_count"]
    config["buffer_count"] = tuple(count) if isinstance(count, list) else count
    notes: dict[str, Any] = {"config": config, "config_source": source}
    if published and not given:
        notes["published_ms"] = statistics.median(published["times_ms"])
    return config, notes


def tokamax_forward(
    generation: str,
    T: int,
    D: int,
    V: int,
    dtype: str,
    options: dict[str, Any],
    backward: bool = False,
) -> Program:
    """tokamax's Pallas kernel, at the best configuration that its package holds."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops import (  # pyright: ignore[reportMissingImports]
        linear_softmax_cross_entropy_loss as package,
    )

    kernel = importlib.import_module(f"{package.__name__}.pallas_mosaic_tpu_kernel")

    config, notes = _tokamax_config(generation, (T, D, V), backward, kernel, options)
    array = jax.ShapeDtypeStruct
    x, w = array((T, D), dtype), array((D, V), dtype)
    labels = array((T,), jnp.int32)
    if backward:

        def run_backward(dout, lse, x, labels, w):
            f = kernel.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu
            return f(dout, lse, x, labels, w, reduction="mean", **config)

        scalar, lse = array((), jnp.float32), array((T,), jnp.float32)
        arguments = (scalar, lse, x, labels, w)
        return Program(
            function=run_backward, arguments=arguments, flops=6 * T * D * V, notes=notes
        )
    blocks = {k: v for k, v in config.items() if k != "buffer_count"}

    def run(x, labels, w):
        f = kernel.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu
        return f(x, labels, w, reduction="mean", **blocks)

    return Program(
        function=run, arguments=(x, labels, w), flops=2 * T * D * V, notes=notes
    )


def tokamax_backward(*arguments: Any) -> Program:
    """As `tokamax_forward`, its vjp: recomputes the logits, then both gradients."""
    return tokamax_forward(*arguments, backward=True)


# Loaded when they are asked for: tokamax may be installed for another Python only.
PROGRAMS = {
    "forward": "bench.tpu.ours:forward",
    "backward": "bench.tpu.ours:backward",
    "splash-forward": "bench.tpu.splash:forward",
    "splash-dq": "bench.tpu.splash:dq",
    "splash-dkv": "bench.tpu.splash:dkv",
    "splash-fused": "bench.tpu.splash:fused",
    "tiles-forward": "bench.tpu.tiles:forward",
    "tiles-backward": "bench.tpu.tiles:backward",
    "tokamax": "bench.tpu.programs:tokamax_forward",
    "tokamax-backward": "bench.tpu.programs:tokamax_backward",
}
