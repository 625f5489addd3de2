"""What a run tells while it goes on, and who may listen."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of metrics: of training since the last such line, or of an evaluation.

    `metrics` have the names under which they are written: an evaluation's begin with
    `eval_`, and with the name of its set where sets are named.
    """

    kind: Literal["train", "eval"]
    prefix: str  # of the metrics' names; "" for training
    step: int  # optimizer steps done
    metrics: Mapping[str, float]

    def metric(self, name: str) -> float:
        """A metric by its name without the prefix."""
        return self.metrics[self.prefix + name]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is written to a held-out prompt."""

    prompt: str
    text: str  # the policy's answer
    reference: str | None  # the reference's; None: there is none to ask
    set_name: str = ""  # of the evaluation set, where sets have names


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that is done."""

    number: int  # counted from 1
    metrics: Mapping[str, float]  # of this step alone
    tokens_per_second: float  # since the last line of metrics


class Listener:
    """Does nothing; a listener overrides what it wants to hear."""

    def started(self, total_steps: int, done: int) -> None:
        """Before the next step; `done` of all were done already."""

    def stepped(self, step: Step) -> None:
        """A step is done; the next one runs already, and has used its state up."""

    def recorded(self, record: Record) -> None:
        """There is a line of metrics."""

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """There are answers to the held-out prompts, after so many steps."""

    def ended(self, error: BaseException | None) -> None:
        """The run is over: what ended it, or None."""


class Listeners(Listener):
    """Several, told in turn."""

    def __init__(self, listeners: Iterable[Listener]):
        self._all = tuple(listeners)

    def started(self, total_steps: int, done: int) -> None:
        """Tell everyone."""
        for listener in self._all:
            listener.started(total_steps, done)

    def stepped(self, step: Step) -> None:
        """Tell everyone."""
        for listener in self._all:
            listener.stepped(step)

    def recorded(self, record: Record) -> None:
        """Tell everyone."""
        for listener in self._all:
            listener.recorded(record)

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """Tell everyone."""
        for listener in self._all:
            listener.generated(step, generations)

    def ended(self, error: BaseException | None) -> None:
        """Tell everyone, also where one of them raises."""
        with contextlib.ExitStack() as stack:
            for listener in reversed(self._all):
                stack.callback(listener.ended, error)


@contextlib.contextmanager
def telling(listener: Listener, total_steps: int, done: int) -> Iterator[None]:
    """Tells a listener of a run's beginning and end; a run's own error comes first."""
    listener.started(total_steps, done)
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(InputError, OSError):
            listener.ended(error)
        raise
    listener.ended(None)
