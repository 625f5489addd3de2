"""What a backend must offer, and the job that the backward gives one.

A backend is one module with the members of `Backend`. Everything else, the loop
over vocabulary chunks, the merge of partials, the collectives and the vjp, is shared
and lives in `token_logprobs.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op import tiling
from dpo_kernels.op.interface import Kept, LogitOptions, Partials
from dpo_kernels.op.kept import KeptRows
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.scale import GradientScale


@runtime_checkable
class Dlogits(Protocol):
    """What the shared backward asks a backend for: a tile of the logits' gradient."""

    def __call__(
        self,
        hidden: Float[Array, "T D"],
        head: Float[Array, "chunk D"],
        targets: Int[Array, " T"],
        bias: Float[Array, " chunk"] | None,
        shift: Float[Array, " T"],
        p_coef: Float[Array, " T"],
        target_grad: Float[Array, " T"],
        *,
        options: LogitOptions,
    ) -> Float[Array, "T chunk"]:
        """The gradient of the pre-activation x = scale * hidden @ head.T + bias.

        dx = cap'(x) * (target_grad where v == target else p_coef * exp(z - shift)),
        cast to the dtype of `hidden`. All three gradients are made of what is returned.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """The work on one device's slice of the vocabulary.

    `targets` are ids relative to the slice: an id outside [0, V) is another slice's.
    `num_valid` None means every row; else rows at and after it may hold anything.
    An entry whose bias is -inf does not exist: it has no probability, no gradient, and
    no part in the mean logit, whatever the soft-cap.
    """

    # Neither direction holds a tile of logits, or of the head, in the workspace.
    fused_dlogits: bool
    # For the shared backward, which a backend without a `backward` of its own has. That
    # gives d hidden as this device's share.
    dlogits: Dlogits | None
    backward: "Callable[[Job], Gradients] | None"

    def unsupported(self, problem: tiling.Problem) -> str | None:
        """Why it cannot do this, as `needs ..., this is ...`; None if it can."""
        ...

    def forward_partials(
        self,
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
        """Reduce every row over every block of the vocabulary.

        Also keep the exponentials of the first `keep_v` entries; None where that is 0.
        """
        ...


class Gradients(NamedTuple):
    """Of the three differentiable inputs; None where not wanted."""

    hidden: Array | None
    head: Array | None
    bias: Array | None


class Wanted(NamedTuple):
    """Which gradients to compute: () for one that is, None for one that is not.

    As tree structure it stays static, also where it is saved among the residuals.
    """

    hidden: tuple[()] | None
    head: tuple[()] | None
    bias: tuple[()] | None


class RowCoefficients(NamedTuple):
    """What the gradient of a logit needs of its row: see `Dlogits`."""

    shift: Float[Array, " T"]  # the row's maximum; inf where it has no gradient
    p_coef: Float[Array, " T"]  # off the target, times exp(z - shift); has 1 / sum_exp
    target_grad: Float[Array, " T"]  # at the target


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of the op, `targets` relative to this device's slice."""

    hidden: Float[Array, "T D"]
    head: Float[Array, "V D"]
    bias: Float[Array, " V"] | None
    targets: Int[Array, " T"]
    num_valid: Int[Array, ""] | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be computed, from what, by what and in which pieces."""

    backend: Backend
    options: LogitOptions
    inputs: Inputs
    rows: RowCoefficients
    scale: GradientScale  # that the coefficients have in them
    kept: KeptRows | None
    wanted: Wanted
    shared_tile: tiling.BackwardTile | None  # None: the backend has its own backward
    workspace_bytes: int

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Typed as varying over the manual mesh axes that the gradients vary over."""
        return make_varying(jnp.zeros(shape, dtype), self.axes)

    @property
    def tile(self) -> tiling.BackwardTile:
        """The shared backward's."""
        assert self.shared_tile is not None, "the backend has its own backward"
        return self.shared_tile

    @property
    def axes(self) -> frozenset[str]:
        """The manual mesh axes over which the gradients vary."""
        x = self.inputs
        xs = (x.hidden, x.head, x.bias, x.targets, x.num_valid)
        return varying_axes(*xs, *self.rows)
