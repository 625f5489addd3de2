"""Follows the scalar control flow of a kernel's schedule and times it.

What runs: the scalar unit's instructions, as the compiler scheduled them; vector and
matrix instructions only take their bundle's cycles. So loops, predicated regions,
transfers (`dma.*`) and waits for them happen as often as they would, and what decides
none of that needs no value.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bench.tpu import decode
from bench.tpu.blocks import Core, Run, after, blocks
from bench.tpu.bundles import Bundle, Instruction, Schedule, ScheduleError
from bench.tpu.scalar import (
    Read,
    Registers,
    Value,
    allocation,
    compute,
    operand,
    predicate,
)
from bench.tpu.transfers import Transfers

MAX_BUNDLES = 10**8  # scalar bundles to follow; beyond it the kernel is taken as stuck

Effect = Callable[[], None]
Move = tuple[str, Read | None, Read]  # register, predicate, new value


class Simulator:
    """One core's run of a kernel."""

    def __init__(
        self,
        schedule: Schedule,
        core: Core,
        *,
        number: int = 0,
        scalars: Mapping[int, Sequence[int]] | None = None,
    ):
        """`number`: the core's; `scalars`: a kernel's operand -> its int32 values."""
        self.schedule, self.core, self.number = schedule, core, number
        self.values = dict(scalars or {})
        self.registers: Registers = {}
        self.smem: dict[int, Value] = {}
        self.operands: dict[int, Sequence[int]] = {}  # by address
        self.transfers = Transfers(core.memory)
        self.time = 0.0
        self.run = Run()
        self.here = 0
        self.jump: int | None = None
        try:
            self._prepare()
        except (ScheduleError, IndexError, KeyError, ValueError) as error:
            raise self._error(str(error)) from error

    def _error(self, what: str) -> ScheduleError:
        return ScheduleError(f"{self.schedule.name}, bundle {self.here:#x}: {what}")

    # Preparation -------------------------------------------------------------------

    def _prepare(self) -> None:
        self.run.blocks = blocks(self.schedule, self.core)
        self.block_of = [b for b in self.run.blocks for _ in range(b.bundles)]
        live = decode.live(self.schedule)
        self.steps: list[tuple[int, list[Effect]]] = []
        # The cycle at which each bundle starts in a run from the first to the last.
        self.clock = [0]
        # The first step at or after each bundle.
        self.next_step: list[int] = []
        for i, bundle in enumerate(self.schedule.bundles):
            self.here = i
            self.next_step.append(len(self.steps))
            self.clock.append(self.clock[-1] + bundle.cycles)
            actions = self._actions(bundle, live)
            block = self.block_of[self.here]
            if block.floor and self.here == block.stop - 1:
                actions.append(partial(self._pass, block.floor))
            if actions:
                self.steps.append((self.here, actions))
        self.here = 0

    def _actions(self, bundle: Bundle, live: set[str]) -> list[Effect]:
        moves: list[Move] = []
        effects: list[Effect] = []
        for one in bundle.scalar:
            family = one.opcode.partition(".")[0]
            name, _, register = one.dest.partition("_")
            if decode.has_effect(one):
                effects.append(self._effect(one))
            elif name not in live or family == "int_to_ptr":
                pass  # int_to_ptr names what the register already holds
            elif family == "sphi":
                decode.check_phi(one, register)
            elif family == "sld":
                moves.append((register, *self._load(one)))
            elif family == "inlined_call_operand":
                moves.append((register, None, self._argument(one)))
            else:
                moves.append((register, *compute(one)))
        return [partial(self._act, moves, effects)] if moves or effects else []

    def _act(self, moves: list[Move], effects: list[Effect]) -> None:
        # All of a bundle reads before any of it writes.
        registers = self.registers
        new: list[tuple[str, Value]] = []
        for register, when, read in moves:
            taken = 1 if when is None else when(registers)
            if taken is None:
                new.append((register, None))
            elif taken:
                new.append((register, read(registers)))
        for effect in effects:
            effect()
        for register, value in new:
            registers[register] = value

    def _argument(self, one: Instruction) -> Read:
        """An operand of the kernel: its address, or its value where it is a scalar."""
        index, is_value = decode.argument(one)
        known = self.values.get(index, ())
        if is_value:
            return lambda _: known[0] if known else None
        base = (1 << 60) + allocation(index)
        self.smem |= {base + i: value for i, value in enumerate(known)}
        # As its address in vector memory is written, too.
        self.operands |= {base: known, base << 4: known}
        return lambda _: base

    def _load(self, one: Instruction) -> tuple[Read | None, Read]:
        address, rest = decode.place(one)
        when, _ = predicate(rest)
        if decode.is_core_id(one):
            return when, lambda _: self.number
        return when, lambda r: self.smem.get(a) if (a := address(r)) is not None else a

    # Instructions with effects -----------------------------------------------------

    def _effect(self, one: Instruction) -> Effect:
        family = one.opcode.partition(".")[0]
        if family == "sst":
            address, rest = decode.place(one)
            when, value = predicate(rest)
            return partial(self._store, when, address, operand(value))
        if family == "sbr":
            when, _ = predicate(one.rest)
            return partial(self._branch, when, decode.target(one, self.schedule))
        if one.opcode == "dma.done.wait":
            return partial(self._wait, *decode.flag(one))
        if family == "dma":
            return partial(self._start, decode.transfer(one))
        if family in ("vsyncadd", "vsyncpa"):
            change = self.transfers.add if family == "vsyncadd" else self.transfers.set
            return partial(self._sync, change, *decode.flag(one))
        raise ScheduleError(f"{one.opcode} is not modelled")

    def _pass(self, cycles: float) -> None:
        self.time += cycles

    def _known(self, read: Read, what: str) -> int:
        value = read(self.registers)
        if value is None:
            raise self._error(
                f"{what} is not known; it depends on data: say what the kernel's "
                "scalar operands hold"
            )
        return value

    def _taken(self, when: Read | None, what: str) -> bool:
        return when is None or bool(self._known(when, f"the predicate of {what}"))

    def _store(self, when: Read | None, address: Read, value: Read) -> None:
        taken = 1 if when is None else when(self.registers)
        if taken == 0:
            return
        at = self._known(address, "a store's address")
        self.smem[at] = None if taken is None else value(self.registers)

    def _branch(self, when: Read | None, target: int) -> None:
        if self._taken(when, "a branch"):
            self.jump = target

    def _sync(
        self,
        change: Callable[[int, int], None],
        when: Read | None,
        flag: Read,
        amount: Read,
    ) -> None:
        if self._taken(when, "a flag's count"):
            change(self._known(flag, "a flag"), self._known(amount, "a flag's count"))

    def _start(self, one: decode.Transfer) -> None:
        if self._taken(one.when, "a transfer"):
            granules = self._known(one.size, "a transfer's size")
            flag = self._known(one.flag, "a transfer's flag")
            self.transfers.start(self.time, granules, flag, one.source, one.target)
            if one.target == "smem":
                self._copy_scalars(one)

    def _copy_scalars(self, one: decode.Transfer) -> None:
        source = one.source_address(self.registers)
        target = one.target_address(self.registers)
        if source is not None and target is not None:
            known = self.operands.get(source, ())
            self.smem |= {target + i: value for i, value in enumerate(known)}

    def _wait(self, when: Read | None, flag: Read, amount: Read) -> None:
        if not self._taken(when, "a wait"):
            return
        name, needed = self._known(flag, "a flag"), self._known(amount, "a wait")
        try:
            until = self.transfers.wait(self.time, name, needed)
        except ScheduleError as error:
            raise self._error(str(error)) from None
        self.run.wait += until - self.time
        self.block_of[self.here].wait += until - self.time
        self.time = until

    # The run -----------------------------------------------------------------------

    def simulate(self) -> Run:
        """Run to the end.

        Raises:
            ScheduleError: control flow that depends on what is not known, a wait that
                nothing ends, a transfer that nobody waited for, no end.
        """
        size = len(self.schedule.bundles)
        passes: Counter[tuple[int, int]] = Counter()
        start = here = 0
        jump_at, target = size + 1, 0
        for _ in range(MAX_BUNDLES):
            n = self.next_step[here] if here < size else len(self.steps)
            step = self.steps[n][0] if n < len(self.steps) else size
            stop = min(step, jump_at, size)
            self.time += self.clock[stop] - self.clock[here]
            if stop == jump_at:
                passes[start, stop] += 1
                self._jump(stop, target)
                start = here = target
                jump_at = size + 1
                continue
            self.here = here = stop
            if here == size:
                passes[start, size] += 1
                return self._finish(passes)
            for action in self.steps[n][1]:
                action()
            if self.jump is not None:
                if jump_at <= size:
                    raise self._error("a branch right after a branch")
                jump_at, target = after(self.schedule, self.core, here), self.jump
                self.jump = None
            self.time += self.clock[here + 1] - self.clock[here]
            here += 1
        raise self._error("the kernel does not end")

    def _jump(self, origin: int, target: int) -> None:
        if origin - target >= self.core.far:
            self.time += self.core.jump_cycles
            self.run.jumps += self.core.jump_cycles

    def _finish(self, passes: Counter[tuple[int, int]]) -> Run:
        try:
            self.transfers.check()
        except ScheduleError as error:
            raise self._error(f"{error}: the flow was not followed right") from None
        run, moved = self.run, self.transfers
        for block in run.blocks:
            inside = (n for (a, b), n in passes.items() if a <= block.start < b)
            block.visits = sum(inside)
        run.cycles, run.transfers = self.time, moved.number
        run.read_bytes, run.written_bytes = moved.read_bytes, moved.written_bytes
        return run
