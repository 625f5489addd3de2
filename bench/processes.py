"""Processes of our own: how they are started, what they answer, why they died."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import rows

MARK = "answer: "  # in front of what a process says to the one that started it
KEPT_LINES = 400  # of what a process prints, in which its last words are looked for
DEVICE = """
import jax
print(jax.devices()[0].platform, jax.devices()[0].device_kind, sep="|")
"""
Changes = Mapping[str, str | None]  # of the environment; None: not set there


class ProcessError(RuntimeError):
    """A process that failed; the message is its last words, one line."""


def environment(changes: Changes) -> dict[str, str]:
    """This process's, changed."""
    changed = {**os.environ, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def command(module: str, words: Sequence[str], python: str = "") -> list[str]:
    """What runs one of our modules, by this Python or another one."""
    return [python or sys.executable, "-m", module, *words]


def run(
    words: Sequence[str], changes: Changes, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in the root of the checkout and keep what it prints.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    return subprocess.run(
        words,
        cwd=rows.ROOT,
        env=environment(changes),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer(value: Any) -> None:
    """Say something to the process that started this one."""
    print(MARK + json.dumps(value), flush=True)


def answers(text: str) -> list[Any]:
    """What was said, of all that was printed."""
    lines = [line for line in text.splitlines() if line.startswith(MARK)]
    return [json.loads(line.removeprefix(MARK)) for line in lines]


def ask(module: str, words: Sequence[str], changes: Changes, python: str = "") -> Any:
    """The last answer of a module that runs in an environment of its own.

    Raises:
        ProcessError: it failed, or ended without an answer.
    """
    done = run(command(module, words, python), changes)
    found = answers(done.stdout)
    if done.returncode or not found:
        raise ProcessError(last_words(done.stderr))
    return found[-1]


def ask_as_it_goes(
    module: str, words: Sequence[str], changes: Changes
) -> Iterator[Any]:
    """Every answer of a module, as it comes.

    Raises:
        ProcessError: after the last answer, where the process failed.
    """
    heard: list[str] = []
    process = subprocess.Popen(
        command(module, words),
        cwd=rows.ROOT,
        env=environment(changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            yield from answers(line)
            heard.append(line)
            del heard[:-KEPT_LINES]
    if process.returncode:
        raise ProcessError(last_words("".join(heard)))


def last_words(text: str) -> str:
    """The line of a process's output that looks most like the reason of its death.

    The last one that names an error at the line's start, as a traceback ends; else the
    last one that names one at all; else the last one.
    """
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    naming = [x for x in lines if "Error" in x or "error:" in x or "EXHAUSTED" in x]
    ending = [x for x in naming if not x[0].isspace()]
    return (ending or naming or lines or ["nothing was printed"])[-1].strip()[:500]


def first_device(changes: Changes, timeout: float) -> tuple[str, str]:
    """Platform and name of JAX's first device, by a process that frees it again.

    Both are empty where there is none, or no answer in time.
    """
    try:
        done = run([sys.executable, "-c", DEVICE], changes, timeout)
    except subprocess.TimeoutExpired:
        return "", ""
    platform, _, kind = done.stdout.strip().rpartition("\n")[2].partition("|")
    return (platform, kind) if done.returncode == 0 else ("", "")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time; the next one's turn comes also if this one dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end(process: subprocess.Popen) -> None:
    """End a process that leads a session, and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
