"""The processes of a run among themselves, beside what devices exchange.

Over lines that go through process 0: what must be agreed on the host (`gather`), and
how each ends. A process that ends otherwise than the others says so or, where it was
killed, its line does: then all end within seconds, with words that name it, where they
would wait in a collective operation for ever.
"""

import contextlib
import os
import sys
import threading
from typing import Any

from engine.errors import InputError
from engine.parallel.meeting import Line, Place

GRACE = 10.0  # seconds to come to the same end by oneself, or to finish a checkpoint
_ALIVE = 10.0  # seconds between two signs of life
_SILENCE = 120.0  # without any, the machine is lost
_AGAIN = (
    "nothing that was saved is damaged: start all processes again with the same "
    "command, and the run goes on from its newest checkpoint"
)


class ProcessGone(InputError):
    """Another process of the run has ended."""

    exit_code = 4


class Peers:
    """All processes of a run.

    Args:
        lines: what `meet` returns.
    """

    def __init__(self, place: Place, lines: dict[int, Line], grace: float = GRACE):
        self.place = place
        self._lines = lines
        self._grace = grace
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._given: dict[str, dict[int, Any]] = {}
        self._gathered: dict[str, list[Any]] = {}
        self._notes: dict[str, str] = {}
        self._ended: set[int] = set()  # who has said so
        self._leaving = threading.Event()
        self.failure: ProcessGone | None = None
        for process, line in lines.items():
            threading.Thread(
                target=self._listen, args=(process, line), daemon=True
            ).start()
        threading.Thread(target=self._live, daemon=True).start()

    def gather(self, label: str, value: Any) -> list[Any]:
        """What every process gives under that label, which is used once; in order.

        Raises:
            ProcessGone: another process has ended.
        """
        self._say({"label": label, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: label in self._gathered or self.failure)
            if label in self._gathered:
                return self._gathered.pop(label)
        assert self.failure is not None
        raise self.failure

    def note(self, label: str, words: str) -> None:
        """Let all know something, without waiting for them."""
        self._say({"note": label, "words": words})

    def noted(self, label: str) -> str | None:
        """What some process has let all know."""
        return self._notes.get(label)

    def leave(self, code: int, words: str) -> ProcessGone | None:
        """Tell the others of the end, and wait for theirs; of one that did not come.

        Args:
            code: 0 where all come to the same end, and then they may take their time;
                else of an error, which the others may be waiting with.
        """
        self._leaving.set()
        self._say({"code": code, "words": words})
        others = set(range(self.place.processes)) - {self.place.process}
        if self.place.process != 0:
            others = {0}
        seconds = self._grace + 2 if code or self.failure else None
        with self._changed:
            self._changed.wait_for(lambda: others <= self._ended, seconds)
        return self.failure

    def expect_failure(self, seconds: float) -> ProcessGone | None:
        """The end of another process, if it is known, or will be so soon."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None, seconds)
        return self.failure

    def _say(self, message: dict[str, Any]) -> None:
        message["process"] = self.place.process
        if self.place.process == 0:
            self._heard(message)
            return
        with self._sending, contextlib.suppress(OSError):  # `_listen` sees its end
            self._lines[0].send(message)

    def _tell_all(self, message: dict[str, Any]) -> None:
        """To everyone but process 0, which says it."""
        with self._sending:
            for line in self._lines.values():
                with contextlib.suppress(OSError):
                    line.send(message)

    def _live(self) -> None:
        while not self._leaving.wait(_ALIVE):
            self._tell_all({"alive": True})

    def _listen(self, process: int, line: Line) -> None:
        why = f"has sent no sign of life for {_SILENCE:g} s: its machine is lost"
        try:
            while True:
                self._heard(line.receive(_SILENCE))
        except TimeoutError:
            pass
        except (OSError, ValueError):
            why = "has gone without a word: killed, or out of memory"
        with self._changed:
            known = process in self._ended
            self._ended.add(process)
            self._changed.notify_all()
        if known:
            return
        at = f" ({self.place.address})" if process == 0 else ""
        words = (
            f"process {process} of {self.place.processes}{at} {why}; see its own "
            f"output; {_AGAIN}"
        )
        if self.place.process == 0:
            self._tell_all({"gone": words})
        self._fail(words, ProcessGone.exit_code, at_once=process == 0)

    def _heard(self, message: dict[str, Any]) -> None:
        first = self.place.process == 0
        if "label" in message and first:
            self._collect(message["label"], message["process"], message["value"])
        elif "label" in message:
            self._has_gathered(message["label"], message["values"])
        elif "note" in message:
            self._notes[message["note"]] = message["words"]
            if first:
                self._tell_all(message)
        elif "gone" in message:
            self._fail(message["gone"], ProcessGone.exit_code)
        elif "code" in message:
            self._has_ended(message)
            if first:
                self._tell_all(message)

    def _collect(self, label: str, process: int, value: Any) -> None:
        with self._changed:
            given = self._given.setdefault(label, {})
            given[process] = value
            if len(given) < self.place.processes:
                return
            del self._given[label]
        values = [given[number] for number in range(self.place.processes)]
        self._tell_all({"label": label, "values": values})
        self._has_gathered(label, values)

    def _has_gathered(self, label: str, values: list[Any]) -> None:
        with self._changed:
            self._gathered[label] = values
            self._changed.notify_all()

    def _has_ended(self, message: dict[str, Any]) -> None:
        process, code = message["process"], message["code"]
        with self._changed:
            self._ended.add(process)
            self._changed.notify_all()
        if code and process != self.place.process:
            words = f"process {process} of {self.place.processes} has ended: "
            self._fail(words + message["words"], code)

    def _fail(self, words: str, code: int, at_once: bool = False) -> None:
        error = ProcessGone(words)
        error.exit_code = code
        with self._changed:
            if self.failure is not None:
                return
            self.failure = error
            self._changed.notify_all()
        if not self._leaving.is_set():
            threading.Thread(target=self._give_up, args=(at_once,), daemon=True).start()

    def _give_up(self, at_once: bool) -> None:
        """End the process, should it not come to an end by itself.

        At once where process 0 is gone: nothing can be finished without it, and JAX
        is about to end the process in its own way.
        """
        assert self.failure is not None
        if self._leaving.wait(0.0 if at_once else self._grace):
            return
        sys.stderr.write(f"dpo: error: {self.place}: {self.failure}\n")
        sys.stderr.flush()
        os._exit(self.failure.exit_code)
