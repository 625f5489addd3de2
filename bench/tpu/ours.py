"""Our kernels as programs for `bench.tpu.schedule`: the public op, forward or backward.

`--option valid=N` says how many of the T rows are not padding: all, unless it is given.
The compiled program is the same; only what the kernel's scalar operand holds differs.
"""

import dataclasses
from typing import Any

from bench.tpu.programs import Program, ProgramError

IMPLEMENTATION = "pallas_tpu"
VALID_ROWS = 0  # the kernels' operand that holds the number of valid rows


def _options(T: int, options: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many rows are valid, and the op's static arguments."""
    valid = int(options.pop("valid", T))
    if not 0 <= valid <= T:
        raise ProgramError(f"valid={valid} is not in [0, T={T}]")
    static: dict[str, Any] = {
        name: float(options.pop(name))
        for name in ("softcap", "scale")
        if name in options
    }
    static["stats"] = tuple(x for x in str(options.pop("stats", "")).split("+") if x)
    return valid, static


def _arrays(T: int, D: int, V: int, dtype: str) -> tuple[Any, ...]:
    """Of hidden, head, targets and num_valid."""
    import jax
    import jax.numpy as jnp

    array = jax.ShapeDtypeStruct
    integers = array((T,), jnp.int32), array((), jnp.int32)
    return array((T, D), dtype), array((V, D), dtype), *integers


def _config(which: str, call: Any, *arrays: Any) -> dict[str, Any]:
    """The blocks that the op chooses for the device being compiled for."""
    import jax

    from dpo_kernels.pallas_tpu import backward_tiling as tpu_backward_tiling
    from dpo_kernels.pallas_tpu import tiling as tpu_tiling

    name, found = f"{which}_tile", [None]
    module = tpu_tiling if which == "forward" else tpu_backward_tiling
    choose = getattr(module, name)

    def record(*given: Any, **options: Any) -> Any:
        found.append(choose(*given, **options))
        return found[-1]

    setattr(module, name, record)
    try:
        jax.eval_shape(call, *arrays)
    finally:
        setattr(module, name, choose)
    tile: Any = found[-1]
    return dataclasses.asdict(tile)


def forward(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """The op without gradients. Options: valid, softcap, scale, stats (joined by +).

    Raises:
        ProgramError: `valid` that is no number of rows.
    """
    from dpo_kernels import token_logprobs

    valid, static = _options(T, options)
    arrays = _arrays(T, D, V, dtype)

    def run(hidden, head, targets, num_valid):
        return token_logprobs(
            hidden,
            head,
            targets,
            num_valid=num_valid,
            implementation=IMPLEMENTATION,
            **static,
        )

    return Program(
        function=run,
        arguments=arrays,
        flops=2 * valid * D * V,
        scalars={VALID_ROWS: [valid]},
        notes={"config": _config("forward", run, *arrays), "valid": valid},
    )


def backward(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """What the op's vjp does after the forward; options as `forward`.

    Raises:
        ProgramError: `valid` that is no number of rows.
    """
    import jax
    import jax.numpy as jnp

    from dpo_kernels import token_logprobs

    valid, static = _options(T, options)
    arrays = _arrays(T, D, V, dtype)
    dlogprob = jax.ShapeDtypeStruct((T,), jnp.float32)

    def pullback(hidden, head, targets, num_valid):
        def logprob(hidden, head):
            return token_logprobs(
                hidden,
                head,
                targets,
                num_valid=num_valid,
                implementation=IMPLEMENTATION,
                **static,
            ).logprob

        return jax.vjp(logprob, hidden, head)[1]

    # What the forward leaves for the backward comes in from outside.
    leaves, tree = jax.tree.flatten(jax.eval_shape(pullback, *arrays))

    def run(leaves, dlogprob):
        return jax.tree.unflatten(tree, leaves)(dlogprob)

    return Program(
        function=run,
        arguments=(tuple(leaves), dlogprob),
        flops=6 * valid * D * V,
        scalars={VALID_ROWS: [valid]},
        notes={"config": _config("backward", run, leaves, dlogprob), "valid": valid},
    )
