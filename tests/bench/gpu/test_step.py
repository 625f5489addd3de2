"""The step of `bench.gpu`: its processes never try out products at the same time."""

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from multiprocessing.connection import Connection

import pytest

from bench.gpu import step
from tests.bench.gpu.context import context_at, events

WORKLOAD = step.REHEARSAL


class Threads:
    """As a context of `multiprocessing`: threads, so that what they do can be seen."""

    Pipe = staticmethod(multiprocessing.Pipe)

    class Process:
        """A process that cannot be killed."""

        def __init__(self, target, args, daemon):
            # A process has its own copy of the connection, which outlives ours.
            theirs = Connection(os.dup(args[0].fileno()))

            def run():
                with contextlib.suppress(EOFError):
                    target(theirs, *args[1:])

            self.start = threading.Thread(target=run, daemon=daemon).start

        def kill(self):
            """Nothing."""


class Candidate:
    """A step that takes no time."""

    temporaries, compile_seconds = 5, 1.0

    def __init__(self, name, log):
        self._name, self._log = name, log

    def __call__(self):
        self._log.put(("step", self._name))
        return {"wall": 0.5, "metrics": {"loss": 0.5}}


@pytest.fixture
def log(monkeypatch):
    """What each side does, in the order of doing it."""
    log: queue.Queue = queue.Queue()

    def make(name, workload):
        log.put(("begin", name))
        time.sleep(0.05)
        log.put(("end", name))
        return Candidate(name, log)

    monkeypatch.setattr(step.step_candidates, "make_candidate", make)
    monkeypatch.setattr(step, "start_heads", lambda *_: [])
    monkeypatch.setattr(step, "head_seconds", lambda *_: 0.25)
    monkeypatch.setattr(step.multiprocessing, "get_context", lambda _: Threads)
    return log


def test_sides_compile_one_at_a_time_and_run_when_all_are_compiled(tmp_path, log):
    step.compare(context_at(tmp_path), WORKLOAD)
    done = list(log.queue)
    compiling, running = done[:6], done[6:]
    for begin, end in zip(compiling[::2], compiling[1::2], strict=True):
        assert (begin[0], end[0], begin[1]) == ("begin", "end", end[1])
    assert {kind for kind, _ in running} == {"step"}
    rounds = context_at(tmp_path).plan.rounds
    assert [name for _, name in running] == list(step.SIDES) * (1 + rounds)
    found = {row["implementation"]: row for row in events(tmp_path, "row")}
    assert list(found) == list(step.SIDES)
    assert all(row["head_share"] == 0.5 for row in found.values())
    assert [row["loss"] for row in found.values()] == [0.5, 0.5, 0.5]
