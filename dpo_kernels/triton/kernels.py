"""The kernels of the `triton` backend; loads Triton, so imported only to launch them.

A program computes one tile of logits [BLOCK_T, BLOCK_V] in float32 and reduces it, or
turns it into its gradient, before anything is stored. Constants are in capitals; what
an option switches off is not compiled.
"""

from typing import no_type_check

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(-3.0e38)  # below any difference of logits, and finite


@triton.jit
@no_type_check
def _block_of(pid, blocks_t, BLOCKS_V: tl.constexpr, GROUP_T: tl.constexpr):
    """The program's row block and vocabulary block.

    Programs that run at once form a rectangle, GROUP_T row blocks high: so they share
    their rows of hidden and head in the L2 cache.
    """
    first_t = pid // (GROUP_T * BLOCKS_V) * GROUP_T
    height = tl.minimum(blocks_t - first_t, GROUP_T)
    within = pid % (GROUP_T * BLOCKS_V)
    return first_t + within % height, within // height


@triton.jit
@no_type_check
def _matmul(
    hidden,
    head,
    start_t,
    start_v,
    T: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """hidden @ head.T of one tile; rows and columns past the end repeat the last."""
    rows = tl.minimum(tl.arange(0, BLOCK_T), T - 1 - start_t)
    cols = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - start_v)
    units = tl.arange(0, BLOCK_D)
    # T * D and V * D may pass 2**31. Within a tile 32 bits are enough, and cheaper.
    hidden_td = hidden + start_t.to(tl.int64) * D + (rows[:, None] * D + units[None, :])
    head_vd = head + start_v.to(tl.int64) * D + (cols[:, None] * D + units[None, :])
    acc_tv = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x_td = tl.load(hidden_td)
            w_vd = tl.load(head_vd)
        else:
            inside = units[None, :] < D - start_d
            x_td = tl.load(hidden_td, mask=inside, other=0.0)
            w_vd = tl.load(head_vd, mask=inside, other=0.0)
        acc_tv = tl.dot(x_td, tl.trans(w_vd), acc_tv, input_precision=PRECISION)
        hidden_td += BLOCK_D
        head_vd += BLOCK_D
    return acc_tv


@triton.jit
@no_type_check
def _tanh(x):
    """Within 2e-7 of tanh(x), relatively.

    1 - 2 / (exp(2x) + 1) cancels near 0; there a polynomial takes over, fitted to the
    smallest relative error on |x| <= 0.6.
    """
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(size * (2 * _LOG2E)) + 1.0)
    square = x * x
    series = -5.895171780139208e-03 * square + 2.079598419368267e-02
    series = series * square + -5.37838339805603e-02
    series = series * square + 1.3331924378871918e-01
    series = series * square + -3.3333298563957214e-01
    near = x + x * (square * series)
    return tl.where(size < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
@no_type_check
def _logits(
    acc_tv,
    bias,
    start_v,
    V: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """z = cap(scale * acc + bias), and which columns exist: bias -inf takes one away.

    Where MASKED, z is -inf in columns that do not exist.
    """
    cols = start_v + tl.arange(0, acc_tv.shape[1])
    exists_v = cols < V
    z_tv = acc_tv
    if SCALE != 1.0:
        z_tv = z_tv * SCALE
    if HAS_BIAS:
        bias_v = tl.load(bias + cols, mask=exists_v, other=_NEGATIVE_INFINITY)
        bias_v = bias_v.to(tl.float32)
        exists_v = bias_v != _NEGATIVE_INFINITY
        z_tv += bias_v[None, :]
    if SOFTCAP is not None:
        z_tv = SOFTCAP * _tanh(z_tv * (1 / SOFTCAP))
    if MASKED:
        # After the cap: capped, a masked -inf would be a finite -softcap.
        z_tv = tl.where(exists_v[None, :], z_tv, _NEGATIVE_INFINITY)
    return z_tv, exists_v


@triton.jit
@no_type_check
def _cap_slope(z_tv, SOFTCAP: tl.constexpr):
    """The derivative of the soft-cap, from the capped logit: 1 - tanh**2; 0 at -inf."""
    ratio = tl.maximum(z_tv * (1 / SOFTCAP), -1.0)
    return 1.0 - ratio * ratio


@triton.jit
@no_type_check
def partials_kernel(
    hidden,
    head,
    targets,
    bias,
    num_valid,
    partials,
    kept,
    T: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    KEEP_V: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr,
    ENTROPY: tl.constexpr,
    COLLISION: tl.constexpr,
    MEAN_LOGIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """Partials of one block, [slots, blocks, T], and exponentials to keep [T, KEEP_V].

    The slots are the fields of `Partials`, in order, without those not asked for.
    """
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    blocks_t = (T + BLOCK_T - 1) // BLOCK_T
    if HAS_NUM_VALID:
        valid = tl.minimum(tl.load(num_valid), T)
        blocks_t = (valid + BLOCK_T - 1) // BLOCK_T
        # The grid has a program for each tile of all T rows. As many as there are
        # tiles with a valid row take one each; the others return here.
        if pid >= blocks_t * BLOCKS_V:
            return
    block_t, block_v = _block_of(pid, blocks_t, BLOCKS_V, GROUP_T)
    start_t, start_v = block_t * BLOCK_T, block_v * BLOCK_V
    acc_tv = _matmul(
        hidden, head, start_t, start_v, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION
    )
    MASKED: tl.constexpr = HAS_BIAS or V % BLOCK_V != 0
    z_tv, exists_v = _logits(acc_tv, bias, start_v, V, SCALE, SOFTCAP, HAS_BIAS, MASKED)
    rows = start_t + tl.arange(0, BLOCK_T)
    inside = rows < T
    slot = partials + block_v.to(tl.int64) * T + rows
    SLOT: tl.constexpr = BLOCKS_V * T
    if MEAN_LOGIT:
        if MASKED:
            sum_t = tl.sum(tl.where(z_tv == _NEGATIVE_INFINITY, 0.0, z_tv), axis=1)
        else:
            sum_t = tl.sum(z_tv, axis=1)
        count_t = tl.zeros_like(sum_t) + tl.sum(exists_v.to(tl.float32), axis=0)
    max_t = tl.max(z_tv, axis=1)
    # Few blocks hold the target of one of their rows: the others skip the search.
    local_t = tl.load(targets + rows, mask=inside, other=-1) - start_v
    target_t = tl.full((BLOCK_T,), _NEGATIVE_INFINITY, tl.float32)
    if tl.max(((local_t >= 0) & (local_t < BLOCK_V)).to(tl.int32), axis=0) > 0:
        hit_tv = tl.arange(0, BLOCK_V)[None, :] == local_t[:, None]
        target_t = tl.max(tl.where(hit_tv, z_tv, _NEGATIVE_INFINITY), axis=1)
    # A block whose entries are all masked: -inf - -inf would be NaN.
    shift_t = tl.where(max_t == _NEGATIVE_INFINITY, 0.0, max_t)
    # The difference first, which is exact near the maximum. The cheaper multiply-add
    # z * log2e - shift * log2e is wrong by the rounding of shift * log2e.
    diff_tv = z_tv - shift_t[:, None]
    e_tv = tl.exp2(diff_tv * _LOG2E)
    if KEEP_V > 0:
        kept_tv = e_tv
        if SOFTCAP is not None:
            kept_tv = e_tv * _cap_slope(z_tv, SOFTCAP)
        if KEPT_SCALE != 1.0:
            kept_tv = kept_tv * KEPT_SCALE
        kept_tv = kept_tv.to(kept.dtype.element_ty)
    exp_t = tl.sum(e_tv, axis=1)
    # Stores come after: between two sums they would keep both z and e in registers.
    if ENTROPY:
        # exp is 0 where z is -inf, and 0 * -inf would be NaN.
        finite_tv = tl.maximum(diff_tv, _LOWEST) if MASKED else diff_tv
        exp_diff_t = tl.sum(e_tv * finite_tv, axis=1)
    if COLLISION:
        exp2_t = tl.sum(e_tv * e_tv, axis=1)
    tl.store(slot, max_t, inside)
    tl.store(slot + SLOT, exp_t, inside)
    tl.store(slot + 2 * SLOT, target_t, inside)
    if ENTROPY:
        tl.store(slot + 3 * SLOT, exp_diff_t, inside)
    if COLLISION:
        tl.store(slot + (3 + ENTROPY) * SLOT, exp2_t, inside)
    if MEAN_LOGIT:
        tl.store(slot + (3 + ENTROPY + COLLISION) * SLOT, sum_t, inside)
        tl.store(slot + (4 + ENTROPY + COLLISION) * SLOT, count_t, inside)
    if KEEP_V > 0:
        if SOFTCAP is None:
            if start_v < KEEP_V:
                _store_tile(kept, kept_tv, start_t, start_v, T, KEEP_V)
        else:
            # Under a branch the compiler computes kept_tv there: z and e spill.
            _store_tile(kept, kept_tv, start_t, start_v, T, KEEP_V)


@triton.jit
@no_type_check
def _store_tile(to, x_tv, start_t, start_v, T: tl.constexpr, V: tl.constexpr):
    """Write what lies inside [T, V], rounded to the type of `to`."""
    rows, cols = tl.arange(0, x_tv.shape[0]), tl.arange(0, x_tv.shape[1])
    to_tv = to + (start_t.to(tl.int64) * V + start_v)
    to_tv += rows[:, None] * V + cols[None, :]
    x_tv = x_tv.to(to.dtype.element_ty)
    inside = (rows[:, None] < T - start_t) & (cols[None, :] < V - start_v)
    tl.store(to_tv, x_tv, mask=inside)


@triton.jit
@no_type_check
def dlogits_kernel(
    hidden,
    head,
    targets,
    bias,
    shift,
    p_coef,
    target_grad,
    dlogits,
    T: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """One tile of dlogits [T, V]."""
    BLOCKS_V: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    blocks_t = (T + BLOCK_T - 1) // BLOCK_T
    block_t, block_v = _block_of(tl.program_id(0), blocks_t, BLOCKS_V, GROUP_T)
    start_t, start_v = block_t * BLOCK_T, block_v * BLOCK_V
    acc_tv = _matmul(
        hidden, head, start_t, start_v, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION
    )
    # Columns past the end are not stored, so only the bias masks.
    z_tv, _ = _logits(acc_tv, bias, start_v, V, SCALE, SOFTCAP, HAS_BIAS, HAS_BIAS)
    rows = start_t + tl.arange(0, BLOCK_T)
    inside = rows < T
    shift_t = tl.load(shift + rows, mask=inside, other=float("inf"))
    p_coef_t = tl.load(p_coef + rows, mask=inside, other=0.0)
    target_grad_t = tl.load(target_grad + rows, mask=inside, other=0.0)
    local_t = tl.load(targets + rows, mask=inside, other=-1) - start_v
    e_tv = tl.exp2((z_tv - shift_t[:, None]) * _LOG2E)
    hit_tv = tl.arange(0, BLOCK_V)[None, :] == local_t[:, None]
    dx_tv = tl.where(hit_tv, target_grad_t[:, None], p_coef_t[:, None] * e_tv)
    if SOFTCAP is not None:
        dx_tv = dx_tv * _cap_slope(z_tv, SOFTCAP)
    elif HAS_BIAS:
        # Not even a target gets a gradient there; the cap's slope is 0 anyway.
        dx_tv = tl.where(z_tv == _NEGATIVE_INFINITY, 0.0, dx_tv)
    _store_tile(dlogits, dx_tv, start_t, start_v, T, V)
