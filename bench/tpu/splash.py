"""Splash attention's kernels as programs for `bench.tpu.schedule`.

    python -m bench.tpu.schedule --program splash-forward --program splash-dkv \
        --tpu v6e --T 8192 --D 4096 --V 1 [--option q=512,1024] [--option kv=1024]

What is called is the engine's call of each kernel, for every kv head and its group of
query heads; with `--option whole=1` all of its `attend`, which transposes what comes in
and goes out. T counts the tokens of a row, D = N H; V is not looked at. Further
options: q, kv and compute (blocks; the engine's own unless given), K, H, window,
softcap, layout (`seq`: queries, keys and values with tokens in the lanes; else `head`).

Which blocks a kernel skips is in two of its operands. They follow from the mask, and
are given to the simulator as they lie in scalar memory (`packed`), so that it skips
what a TPU would. FLOPs count pairs of a query and a key that it sees, and no others: a
pair takes 2H in each of the kernel's matrix products.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.tpu.programs import Program, ProgramError

PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "fused": 5}
ENGINES = ("forward", "dq", "dkv")  # the kernels that the engine calls
DATA_NEXT, BLOCK_MASK = 0, 1  # operands of the kernels
_LANES, _SUBLANES = 128, 4


def packed(array: np.ndarray) -> list[int]:
    """int8 [1, rows, columns] as the int32 words that a kernel reads in scalar memory.

    A word holds one column of four rows; 128 columns of words lie together.

    Raises:
        ProgramError: another dtype or shape, which lies there otherwise.
    """
    if array.dtype != np.int8 or array.shape[0] != 1 or array.shape[2] > _LANES:
        raise ProgramError(f"no layout is known of {array.dtype}{list(array.shape)}")
    _, rows, columns = array.shape
    whole = np.zeros((-(-rows // _SUBLANES), _SUBLANES, _LANES), np.uint8)
    whole.reshape(-1, _LANES)[:rows, :columns] = array[0].view(np.uint8)
    words = whole.transpose(0, 2, 1).reshape(-1).view("<i4")
    return words.tolist()


def pairs(length: int, reach: int) -> int:
    """Pairs of a query and a key that it sees."""
    return length * reach - reach * (reach - 1) // 2


def sizes(which: str, length: int, reach: int, options: dict[str, Any]) -> Any:
    """The engine's blocks, with those of one kernel replaced."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )

    from engine.models.attention import splash

    layout = str(options.pop("layout", "head"))
    if layout not in ("head", "seq"):
        raise ProgramError(f"layout={layout!r} is neither head nor seq")
    names = {"q": "block_q", "kv": "block_kv", "compute": "block_kv_compute"}
    if which in ("dkv", "fused"):
        names = {k: v.replace("_compute", "_dkv_compute") for k, v in names.items()}
        names |= {"q": "block_q_dkv", "kv": "block_kv_dkv"}
    if which == "dq":
        names = {"q": "block_q_dq", "kv": "block_kv_dq"}
    given: dict[str, Any] = {
        v: int(options.pop(k)) for k, v in names.items() if k in options
    }
    own = splash.block_sizes(length, length, reach)
    fused = which == "fused"
    for name, dkv in (("block_q_dq", "block_q_dkv"), ("block_kv_dq", "block_kv_dkv")):
        given[name] = None if fused else given.get(name, getattr(own, dkv))
    given["use_fused_bwd_kernel"] = fused
    if layout == "seq":
        minor = kernels.QKVLayout.SEQ_MINOR
        given |= {f"{x}_layout": minor for x in "qkv"}
    return dataclasses.replace(own, **given)


def _by_jax(
    length: int, reach: int, group: int, softcap: float | None, sizes: Any
) -> tuple[Any, Any]:
    """A call with JAX's own mask, and what its kernel of all gradients goes over.

    In the engine that kernel has one block of keys, and so it makes no others.
    """
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as infos,
    )

    shape = (length, length)
    one: Any = masks.CausalMask(shape)
    if reach < length:
        one = masks.LocalMask(shape, window_size=(reach - 1, 0), offset=0)
    mask = masks.MultiHeadMask([one] * group)

    def attend(*arrays: Any) -> Any:
        return kernels.make_splash_mqa_single_device(
            mask=mask, block_sizes=sizes, attn_logits_soft_cap=softcap
        )(*arrays)

    blocks = sizes.block_q_dkv, sizes.block_kv_dkv
    grid = {"head_shards": 1, "q_seq_shards": 1, "shrink_grid": False}
    info, _ = infos.process_mask_dkv(mask, blocks, **grid)
    return jax.vmap(jax.vmap(attend)), info


def half(
    forward: bool,
    attend: Callable[..., Any],
    arrays: tuple[Any, ...],
    wanted: slice = slice(None),
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What training runs of attention at a time, and the shapes that it is called with.

    Either what it gives, and what the backward needs; or the wanted gradients of that.
    """
    import jax

    def pullback(*arrays: Any) -> Any:
        return jax.vjp(attend, *arrays)

    def run(*arrays: Any) -> Any:
        out, back = pullback(*arrays)
        return out, jax.tree.leaves(back)

    if forward:
        return run, arrays
    out, back = jax.eval_shape(pullback, *arrays)
    leaves, tree = jax.tree.flatten(back)

    def gradients(leaves: Sequence[Any], dout: Any) -> Any:
        # The kernel of what is not wanted is dropped.
        return jax.tree.unflatten(tree, leaves)(dout)[wanted]

    return gradients, (tuple(leaves), out)


def _program(
    which: str, T: int, D: int, dtype: str, options: dict[str, Any]
) -> Program:
    import jax

    from engine.models.attention import splash

    K, H = int(options.pop("K", 8)), int(options.pop("H", 128))
    reach = min(int(options.pop("window", T)), T)
    softcap = float(options.pop("softcap", 0)) or None
    group = D // H // K
    if group * K * H != D:
        raise ProgramError(f"D={D} is not a number of query heads of K={K} times H={H}")
    blocks = sizes(which, T, reach, options)
    whole = int(options.pop("whole", 0))
    rows = splash.Rows.of(length=T, keys=T, starts=(0,), runs=1, reach=reach)
    kernel: Any = splash.Kernel(
        rows=rows,
        window=reach if reach < T else None,
        softcap=softcap,
        sizes=blocks,
    )
    if which == "fused" and blocks.block_kv_dkv < T:
        kernel, info = _by_jax(T, reach, group, softcap, blocks)
    else:
        found = kernel.mask_infos(rows.queries())
        info = found[ENGINES.index("dkv" if which == "fused" else which)]
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    query, key = array((1, K, group, T, H)), array((1, K, T, H))
    if whole:
        query, key = array((1, T, K * group, H)), array((1, T, K, H))

    def attend(*arrays: Any) -> Any:
        if not whole:
            return kernel(*arrays)
        static: dict[str, Any] = {"scale": H**-0.5, "softcap": softcap, "sizes": blocks}
        return splash.attend(*arrays, window=reach, **static)

    wanted = {"dq": slice(0, 1), "dkv": slice(1, 3)}.get(which, slice(0, 3))
    function, arguments = half(which == "forward", attend, (query, key, key), wanted)
    words = {DATA_NEXT: info.data_next, BLOCK_MASK: info.block_mask}
    assert info.mask_next is None  # causality and windows are computed in the kernel
    return Program(
        function=function,
        arguments=arguments,
        flops=2 * H * PRODUCTS[which] * group * K * pairs(T, reach),
        scalars={k: packed(np.asarray(v)) for k, v in words.items()},
        notes={
            "blocks": {
                k: v for k, v in dataclasses.asdict(blocks).items() if "bl" in k
            },
            "grid_blocks": int(np.asarray(info.block_mask).size),
            "blocks_run": int(np.count_nonzero(np.asarray(info.block_mask))),
        },
    )


def forward(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """What attention gives, and the logarithms of its sums."""
    del generation, V
    return _program("forward", T, D, dtype, options)


def dq(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """The gradient by queries."""
    del generation, V
    return _program("dq", T, D, dtype, options)


def dkv(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """The gradients by keys and values."""
    del generation, V
    return _program("dkv", T, D, dtype, options)


def fused(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """All gradients: one kernel, with a part of dq for each block of keys."""
    del generation, V
    return _program("fused", T, D, dtype, options)
