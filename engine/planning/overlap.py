"""Which exchanges between devices a compiled program runs beside computation.

A scheduled program lists its instructions in the order in which they begin. Of an
exchange that begins at one of them and ends at another, what is listed between them
runs meanwhile: the exchange is in a stream of its own on NVIDIA's GPUs, and on a TPU on
a SparseCore. On TPU v5e, which has none, libtpu writes an exchange into the fusions of
products instead, a chain of them. All else waits for an exchange to end.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property

from engine.planning.hlo import CALLED, Computation, Executed, Instruction, Program

CHAIN = re.compile(r'chain_id="?(\w+)')
_ASYNC = ("call-start", "async-start")  # of a computation
_KERNELS = re.compile(
    r'custom_call_target="(?:tpu_custom_call|mosaic|triton|__cublas|__cudnn)'
)


@dataclass
class Overlap:
    """What runs beside what in one program."""

    program: Program
    _computing: dict[str, bool] = field(default_factory=dict)  # of fusions' insides

    def covers(self, ran: Executed) -> bool:
        """Whether a product, a kernel or a loop runs while an exchange does."""
        one = ran.instruction
        if ran.fused:
            return CHAIN.search(one.attributes) is not None
        if one.opcode.endswith("-start"):
            return self._covered(ran.within, one)
        return self._beside.get(ran.within.name, False)

    @cached_property
    def _beside(self) -> dict[str, bool]:
        """Of each computation that others may run beside, whether one does."""
        return {
            name: self._covered(within, one)
            for within in self.program.computations.values()
            for one in within.instructions.values()
            if one.opcode in _ASYNC
            for _, name in CALLED.findall(one.attributes)
        }

    def _covered(self, within: Computation, start: Instruction) -> bool:
        """Whether anything computes between an exchange's beginning and its end."""
        first = last = start
        while not last.opcode.endswith("-done"):
            users = within.users[last.name]
            ends = [x for x in users if x.opcode.endswith(("-update", "-done"))]
            if not ends:
                return False
            last = ends[0]
            if last.opcode.endswith("-update"):  # given what to send, it begins
                first = last
        begin, end = within.places[first.name], within.places[last.name]
        between = list(within.instructions.values())[begin + 1 : end]
        return any(map(self._computes, between))

    def _computes(self, one: Instruction) -> bool:
        if one.opcode in ("dot", "convolution", "while", "conditional"):
            return True
        if one.opcode == "custom-call":
            return _KERNELS.search(one.attributes) is not None
        if one.opcode != "fusion":
            return False
        name = dict(CALLED.findall(one.attributes))["calls"]
        if name not in self._computing:
            inside = self.program.computations[name].instructions.values()
            self._computing[name] = any(map(self._computes, inside))
        return self._computing[name]
