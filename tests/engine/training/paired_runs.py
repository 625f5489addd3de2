"""Runs of the command line in two processes of two CPU devices, disturbed and not.

    python -m tests.engine.training.paired_runs RUN.yaml

trains in the working directory: into differ/ (the two are not given the same), then
into pair/: a process gets SIGKILL; in the next run one gets SIGTERM; the last one is
left alone. What that begins with is copied to stopped/. It prints, as JSON, for each
run exit codes, what each process said, and the seconds until all had ended. Processes
are forked from one that has imported everything, and started nothing.
"""

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from orbax.checkpoint import v1  # noqa: F401

import engine.commands.train  # noqa: F401
from engine.cli import main

METRICS = Path("pair/metrics.jsonl")
_LONGEST = 240.0  # seconds that a run may take to come so far


class Disturbance(NamedTuple):
    """A signal to one of the processes, when so many lines of metrics are written."""

    place: int
    signal: signal.Signals
    lines: int


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(name: str, place: int, port: int, words: Sequence[str]) -> int:
    child = os.fork()
    if child:
        return child
    out = os.open(f"{name}-{place}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = f"--coordinator 127.0.0.1:{port} --num-processes 2 --process-id {place}"
    # As a script ends: what Python does at its exit is a part of it.
    sys.exit(main(["train", *words, *options.split()]))


def num_lines() -> int:
    return METRICS.read_text().count("\n") if METRICS.exists() else 0


def pair(
    name: str,
    words: Sequence[str],
    disturbed: Disturbance | None = None,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """A run in two processes; `only`: what the second one alone is given."""
    port = free_port()
    children = [start(name, 0, port, words), start(name, 1, port, [*words, *only])]
    if disturbed is not None:
        deadline = time.monotonic() + _LONGEST
        while num_lines() < disturbed.lines and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(children[disturbed.place], disturbed.signal)
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(x, 0)[1]) for x in children]
    seconds = time.monotonic() - began
    said = [Path(f"{name}-{place}.log").read_text() for place in range(2)]
    return {"codes": codes, "said": said, "seconds": seconds, "lines": num_lines()}


def all_runs(run_file: str) -> dict[str, Any]:
    words = [run_file, "trainer.save_directory=pair"]
    differ = [run_file, "trainer.save_directory=differ"]
    runs = {"differ": pair("differ", differ, only=["trainer.beta=0.2"])}
    for name, disturbed in (
        ("killed", Disturbance(1, signal.SIGKILL, 4)),
        ("stopped", Disturbance(1, signal.SIGTERM, 5)),
    ):
        runs[name] = pair(name, words, disturbed)
    shutil.copytree("pair", "stopped")
    runs["left alone"] = pair("left alone", words)
    return runs


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, in each process: no garbage to look for
    print(json.dumps(all_runs(sys.argv[1])))
