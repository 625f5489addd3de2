"""The arithmetic of a step on each device, by part: that of its matrix products.

Counted in the traced program (the jaxpr), where a loop's length is written beside it:
a product counts as often as it runs. What is done for the backward pass a second time
(`remat`) is told apart. XLA may still leave out what nobody needs.

Attention goes over tiles of keys up to the queries' own: (n + 1) / 2 of n in the mean,
which is the most that a row has; windows, and sequences that share a row, hide more. So
it is on each of the devices that the queries of a row are spread over.

The head's products are in kernels and in loops that skip padding, which say nothing of
their length; they are counted by the formula 2 T D V for each of: the reference's
logits, the policy's, these recomputed, and the gradients of hidden and head. T is the
capacity for scored tokens, so this is the most that a batch of that shape takes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

import dpo_kernels
from engine.objective.references import Cached, NoReference
from engine.parallel.sharding import FSDP, SEQUENCE, VOCAB, padded_vocab, size_of
from engine.planning.steps import Step

_HEAD = str(Path(dpo_kernels.__file__).parent)
_ENGINE = Path(__file__).parents[1]
_REFERENCES = str(_ENGINE / "objective" / "references.py")
PROJECTIONS, ATTENTION, HEAD, OTHER = "projections", "attention", "head", "other"
_PARTS = {
    str(_ENGINE / "models" / "attention"): ATTENTION,
    str(_ENGINE / "models" / "linear.py"): PROJECTIONS,
}
REFERENCE, FORWARD, RECOMPUTED, BACKWARD = (
    "reference",
    "forward",
    "recomputed",
    "backward",
)
PHASES = (REFERENCE, FORWARD, RECOMPUTED, BACKWARD)
# JAX's calls of cuDNN's attention, and the products of each.
_BY_CUDNN = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}


@dataclass
class Work:
    """FLOPs on each device."""

    # By part and by phase of the step.
    flops: dict[tuple[str, str], int] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)  # kernels that do not say theirs
    sequence: int = 1  # devices that the queries of a row are spread over

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.flops.values())

    def add(self, part: str, phase: str, flops: int) -> None:
        """Count some."""
        if flops:
            self.flops[part, phase] = self.flops.get((part, phase), 0) + flops

    def of_part(self, part: str) -> int:
        """Those of one part."""
        return sum(n for (name, _), n in self.flops.items() if name == part)

    def of_phase(self, phase: str) -> int:
        """Those of one phase."""
        return sum(n for (_, name), n in self.flops.items() if name == phase)


def work_of(step: Step) -> Work:
    """What a step computes."""
    work = Work(sequence=step.run.mesh.shape[SEQUENCE])
    jaxpr = step.request.step.trace(*step.operands).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    _count(used, 1, 1, "", work)
    head = 2 * _head_size(step)
    reference, arguments = step.reference, step.run.arguments
    if not isinstance(reference, Cached | NoReference):
        work.add(HEAD, REFERENCE, head)
    twice = arguments.loss.whole_batch and arguments.gradient_accumulation_steps > 1
    work.add(HEAD, FORWARD, head)
    work.add(HEAD, RECOMPUTED, head * (1 + twice))
    work.add(HEAD, BACKWARD, head * (1 if step.model.adapter is not None else 2))
    return work


def _head_size(step: Step) -> int:
    """T D V of a device's share of the vocabulary, of all microbatches."""
    mesh = step.run.mesh
    vocab = padded_vocab(step.model, mesh) // size_of(VOCAB, mesh)
    rows = step.run.plan.grid[0] * mesh.shape[FSDP] * step.shape[1]
    return rows * step.model.hidden_size * vocab


def _inside(params: Any) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters."""
    for leaf in jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    ):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf


def _count(jaxpr: Jaxpr, times: int, around: int, within: str, work: Work) -> None:
    """Add an (inner) program's products.

    Args:
        around: the length of the innermost loop that it is in.
        within: the names of what it is in, with `REFERENCE` where the reference is.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        where = f"{within}/{equation.source_info.name_stack}"
        if _REFERENCES in _files(equation):  # what is traced inside does not say so
            where = f"{where}/{REFERENCE}"
        if name == "dot_general":
            part = _part(equation)
            if part != HEAD:
                work.add(part, _phase(where), times * _product(equation))
        elif name == "cond":
            branches = []
            for branch in _inside(equation.params):
                found = Work(sequence=work.sequence)
                _count(branch, times, around, where, found)
                branches.append(found)
            largest = max(branches, key=lambda x: x.total)
            for (part, phase), flops in largest.flops.items():
                work.add(part, phase, flops)
            work.uncounted |= largest.uncounted
        elif name in ("pallas_call", "core_map"):
            if _part(equation) != HEAD:
                _count_kernel(equation, times, where, work)
        elif name == "mpmd_map":  # a kernel for GPUs, of the head if not of attention
            if _part(equation) == ATTENTION:
                _count_fused(equation, times, where, work)
        elif name in _BY_CUDNN:
            _count_attention(equation, times * _BY_CUDNN[name], where, work)
        else:
            total, length = times, around
            if name == "scan":
                length = equation.params["length"]
                total = times * length
            elif name == "while":
                length = 1
                if _part(equation) == ATTENTION:
                    total = times * (around * work.sequence + 1) // 2
            for one in _inside(equation.params):
                _count(one, total, length, where, work)


def _count_kernel(equation: Any, times: int, where: str, work: Work) -> None:
    """Add a kernel's products: those that it states, or of attention what is in it.

    That of a block is in it as often as its grid has steps, of which causality leaves
    (n + 1) / 2 of the n along the last axis.
    """
    part, phase = _part(equation), _phase(where)
    estimate = equation.params.get("cost_estimate")
    grid = getattr(equation.params.get("grid_mapping"), "grid", ())
    if estimate is not None:
        work.add(part, phase, times * int(estimate.flops))
    elif part == ATTENTION and grid and all(isinstance(x, int) for x in grid):
        block = Work()
        _count(equation.params["jaxpr"], 1, 1, where, block)
        steps = math.prod(grid[:-1]) * (grid[-1] + 1) // 2
        work.add(part, phase, times * steps * block.total)
    else:
        work.uncounted.add(str(equation.params.get("name", equation.primitive.name)))


def _count_fused(equation: Any, times: int, where: str, work: Work) -> None:
    """Add what one of tokamax's kernels multiplies, of the keys up to each query.

    That of the softmax multiplies twice. The others are given the results' gradient
    besides, and make scores and their gradients anew: for those of queries, or of keys
    and values.
    """
    shapes = [x.aval.shape for x in equation.invars]
    products = 2
    if shapes[3:4] == shapes[:1]:
        products = 2 + len(equation.outvars)
    _count_attention(equation, times * products, where, work)


def _count_attention(equation: Any, times: int, where: str, work: Work) -> None:
    """Add products of [rows, length, heads, size], with the keys up to each query."""
    rows, length, heads, size = equation.invars[0].aval.shape
    # Spread rows have pieces from both ends on each device: half of the keys, too.
    pairs = rows * heads * length * (equation.invars[1].aval.shape[1] + 1) // 2
    work.add(ATTENTION, _phase(where), times * 2 * pairs * size)


def _product(equation: Any) -> int:
    """2 m n k, and as often as there are batches of it."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, (out,) = equation.invars[0].aval.shape, equation.outvars
    depth = math.prod(left[axis] for axis in contracted)
    return 2 * depth * math.prod(out.aval.shape)


def _files(equation: Any) -> list[str]:
    """Where in the source it was written, the innermost first."""
    traceback = equation.source_info.traceback
    return [frame.file_name for frame in traceback.frames] if traceback else []


def _part(equation: Any) -> str:
    files = _files(equation)
    if any(file.startswith(_HEAD) for file in files):
        return HEAD
    for file in files:
        for start, part in _PARTS.items():
            if file.startswith(start):
                return part
    return OTHER


def _phase(where: str) -> str:
    if REFERENCE in where.split("/"):
        return REFERENCE
    if "rematted_computation" in where:
        return RECOMPUTED
    return BACKWARD if "transpose(" in where else FORWARD
