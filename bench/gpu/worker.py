"""The inside of a section's process: what it tells the one that started it.

    python -m bench.gpu.worker SETTINGS

A line of JSON for each event, in a file that both know: what is being tried, a row, a
task that is done. A section that dies is started again without what it died of.
"""

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.device.subject import Subject
from bench.gpu import sizes

BEAT_S = 10.0
SECTIONS = {
    "correctness": "bench.gpu.correctness",
    "truth": "bench.gpu.truth",
    "speed": "bench.gpu.speed",
    "peers": "bench.gpu.peers_torch",
    "step": "bench.gpu.step",
    "sanitizer": "bench.gpu.sanitizer",
    "sweep": "bench.gpu.sweep",
    "sweep_peers": "bench.gpu.sweep_torch",
}


@dataclass(kw_only=True)
class Settings:
    """What a section's process is told; travels as JSON."""

    section: str
    events: str  # a file to append to
    work: str  # a directory that the sections share
    rehearse: bool
    deadline: float  # seconds since the epoch
    settled: list[str] = field(default_factory=list)  # subjects that have their row
    done: list[str] = field(default_factory=list)  # tasks


class Pulse:
    """Signs of life as long as something slow goes on that cannot speak for itself.

    `begin` and `end` may be called from any thread; or `with pulse:` around it.
    """

    def __init__(self, beat: Callable[[], None], every_s: float = BEAT_S):
        """`beat` is called every so many seconds, in a thread."""
        self._beat, self._every_s = beat, every_s
        self._lock, self._going_on, self._thread = threading.Lock(), 0, None

    def begin(self) -> None:
        """One more thing goes on."""
        with self._lock:
            self._going_on += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def end(self) -> None:
        """One thing less."""
        with self._lock:
            self._going_on -= 1

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.end()

    def _run(self) -> None:
        while True:
            time.sleep(self._every_s)
            if self._going_on:
                self._beat()


class Context:
    """What a section does its talking with."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.plan = sizes.REHEARSAL if settings.rehearse else sizes.REAL
        self.work = Path(settings.work)
        self.rehearse = settings.rehearse
        self._settled, self._done = set(settings.settled), set(settings.done)
        self.pulse = Pulse(lambda: self._tell("beat", None))

    def tasks(self, names: Iterable[str]) -> Iterable[str]:
        """Those still to do while time is left; each is done when the next begins."""
        for name in names:
            if name in self._done:
                continue
            if self.seconds_left() <= 0:
                self._tell("late", name)
                continue
            yield name
            self._tell("done", name)

    def is_done(self, task: str) -> bool:
        """Whether an earlier process of this section has done it."""
        return task in self._done

    def seconds_left(self) -> float:
        """Until this section should have ended."""
        return self.settings.deadline - time.time()

    def wanted(self, subject: Subject) -> bool:
        """Whether it still needs its row."""
        return subject.key not in self._settled

    def trying(self, subject: Subject) -> None:
        """From here on a death is this one's."""
        self._tell("trying", asdict(subject))

    def row(self, subject: Subject, **fields: Any) -> None:
        """Hand over a result, or with `error` why there is none."""
        self._settled.add(subject.key)
        self._tell("row", asdict(subject) | fields)

    def _tell(self, kind: str, value: Any) -> None:
        with open(self.settings.events, "a") as events:
            events.write(json.dumps({kind: value}) + "\n")


def leave(code: int) -> None:
    """At once: threads may still be compiling what there is no time for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def die(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As `sys.excepthook`: say why, and leave."""
    traceback.print_exception(kind, error, trace)
    leave(1)


def main() -> None:
    """Run one section."""
    sys.excepthook = die
    settings = Settings(**json.loads(sys.argv[1]))
    name = settings.section  # or a module's, for tests
    section = importlib.import_module(SECTIONS.get(name, name))
    section.run(Context(settings))
    leave(0)


if __name__ == "__main__":
    main()
