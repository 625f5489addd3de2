"""The backend for TPUs (v5e, v5p, v6e, 7x): kernels in Pallas."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.devices import Device, pretended
from dpo_kernels.op.interface import Kept, LogitOptions, Partials
from dpo_kernels.op.job import Gradients, Job
from dpo_kernels.op.loops import make_varying, valid_rows, varying_alike, varying_axes
from dpo_kernels.op.tiling import Problem, problem_of
from dpo_kernels.pallas_tpu import backward_tiling as tpu_backward_tiling
from dpo_kernels.pallas_tpu import tiling as tpu_tiling

f32 = jnp.float32
fused_dlogits = True
dlogits = None  # what `backward` is for


@contextlib.contextmanager
def interpreted(
    kind: str = "TPU v6e", cores: int = 1, **options: Any
) -> Iterator[None]:
    """Run the kernels in Pallas's interpreter, on any machine; slow, for tests.

    Args:
        kind: of the imagined device: its vector memory decides the blocks.
        cores: that share the device.
        options: of `jax.experimental.pallas.tpu.InterpretParams`.
    """
    from jax._src import tpu_info  # JAX has no public way to imagine a TPU
    from jax.experimental.pallas import tpu as pltpu

    device = Device(platform="tpu", kind=kind, num_cores=cores)
    version = tpu_info.chip_version_from_device_kind(kind)
    assert version is not None, f"no TPU is called {kind}"
    imagined = functools.partial(pltpu.get_tpu_info_for_chip, version, cores)
    tpu_info.registry[jax.local_devices()[0].device_kind] = imagined
    params = pltpu.InterpretParams(
        num_cores_or_threads=cores,
        # Arrays end with a whole register, as they do in a TPU's memory.
        buffer_bounds="padded",
        **options,
    )
    with pretended(device), pltpu.force_tpu_interpret_mode(params):
        yield


def unsupported(problem: Problem) -> str | None:
    """See `Backend.unsupported`."""
    if problem.device.platform != "tpu":
        return f"needs a TPU; this is {problem.device}"
    if tpu_tiling.core_of(problem.device) is None:
        return f"needs a TPU v5e, v5p, v6e or 7x; this is {problem.device}"
    if problem.dtype != jnp.bfloat16:
        return f"needs bfloat16 inputs; these are {problem.dtype}"
    if problem.D % 128:
        return f"needs a hidden size that 128 divides; this is D={problem.D}"
    if problem.T == 0 or problem.V == 0:
        return None
    ample = replace(problem, workspace_bytes=2**60)
    tiles = tpu_tiling.forward_tile(ample), tpu_backward_tiling.backward_tile(ample)
    if None in tiles:
        return f"needs rows that fit into vector memory; these have D={problem.D}"
    return None


def forward_partials(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " V"] | None,
    num_valid: Int[Array, ""] | None,
    *,
    options: LogitOptions,
    workspace_bytes: int,
    keep_v: int,
) -> tuple[Partials, Kept | None]:
    """See `Backend.forward_partials`; a block is every 128th entry, in place of a run.

    Takes no workspace, and keeps nothing.
    """
    from dpo_kernels.pallas_tpu import forward as pallas_tpu_forward

    del workspace_bytes
    assert keep_v == 0, "the tile keeps nothing on a TPU"
    T, V = hidden.shape[0], head.shape[0]
    names = pallas_tpu_forward.state_names(options)
    tile = tpu_tiling.forward_tile(
        problem_of(hidden, head, num_valid, 0), states=len(names)
    )
    assert tile is not None, "`unsupported` looked for one"
    states = pallas_tpu_forward.forward(
        *varying_alike(hidden, head, targets, bias, valid_rows(num_valid, T)),
        options=options,
        tile=tile,
    )
    # A block of `Partials` is a lane of a core.
    lanes = jnp.swapaxes(states, 2, 3).reshape(len(names), -1, T)
    found = dict(zip(names, lanes, strict=True))
    if "mean_logit" in options.stats:
        exists_v = jnp.ones((V,), bool) if bias is None else bias != -jnp.inf
        share_v = tile.blocks_of_core(V) * tile.block_v
        padded = jnp.pad(exists_v, (0, tile.cores * share_v - V))
        count = padded.reshape(tile.cores, -1, states.shape[3]).sum(axis=1)
        count = jnp.broadcast_to(count.reshape(-1, 1), lanes.shape[1:])
        found["num_logits"] = make_varying(count.astype(f32), varying_axes(lanes))
    return Partials(**found), None


def backward(job: Job) -> Gradients:
    """See `Backend.backward`: all gradients in one kernel."""
    from dpo_kernels.pallas_tpu import backward as pallas_tpu_backward
    from dpo_kernels.pallas_tpu import dlogits as pallas_tpu_dlogits

    x, rows, options, wanted = job.inputs, job.rows, job.options, job.wanted
    problem = problem_of(x.hidden, x.head, x.num_valid, job.workspace_bytes)
    tile = tpu_backward_tiling.backward_tile(problem)
    if tile is None:
        raise ValueError(
            f"workspace_bytes={job.workspace_bytes} is too small for the gradients of "
            f"{problem.T} rows; give at least "
            f"{tpu_backward_tiling.least_workspace(problem)}"
        )
    want_bias = x.bias is not None and wanted.bias is not None
    T = x.hidden.shape[0]
    valid = valid_rows(x.num_valid, T)
    exists_t = jnp.arange(T, dtype=jnp.int32) < valid
    packed = pallas_tpu_dlogits.pack_rows(
        jnp.where(exists_t, rows.shift, jnp.inf),
        jnp.where(exists_t, rows.p_coef, 0),
        jnp.where(exists_t, rows.target_grad, 0),
        x.targets,
    )
    dhidden, dhead, dbias = pallas_tpu_backward.gradients(
        *varying_alike(x.hidden, x.head, x.bias, packed, valid),
        options=options,
        wanted=(wanted.hidden is not None, wanted.head is not None, want_bias),
        tile=tile,
    )
    if dhidden is not None:
        dhidden = job.scale.of_product(dhidden.sum(axis=0))
    if dhead is not None:
        dhead = job.scale.of_product(dhead).astype(dhead.dtype)
    if dbias is not None and x.bias is not None:
        dbias = job.scale.of_sum(dbias).astype(x.bias.dtype)
    return Gradients(dhidden, dhead, dbias)
