"""Runs of the command line that get SIGKILL at random moments, and one that does not.

    python -m tests.engine.training.killed_runs RUN.yaml KILLS SEED

writes whole/ and killed/ in the working directory, and prints how many kills met a run
that had saved something. Processes are forked from one that has imported everything,
and started nothing.
"""

import gc
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from orbax.checkpoint import v1  # noqa: F401

import engine.commands.train  # noqa: F401
from engine.cli import main


def start(words: Sequence[str]) -> int:
    child = os.fork()
    if child:
        return child
    os._exit(main(["train", *words]))


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def num_lines() -> int:
    path = Path("killed/metrics.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def killed(path: str, kills: int, seed: int) -> int:
    """A run that is killed so many times, and then left alone; see above."""
    chance, met = random.Random(seed), 0
    words = [path, "trainer.save_directory=killed"]
    for _ in range(kills):
        child = start(words)
        enough = num_lines() + chance.randint(2, 5)  # it does a few steps again, first
        deadline = time.monotonic() + 120
        while num_lines() < enough and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)  # a zombie, where it has ended: no error
        assert end(child) == -signal.SIGKILL, "too few steps for so many kills"
        met += bool(list(Path("killed").glob("checkpoints/step-*")))
    assert end(start(words)) == 0
    return met


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, in each process: no garbage to look for
    run_file, number, seed = sys.argv[1:]
    assert end(start([run_file, "trainer.save_directory=whole"])) == 0
    print(killed(run_file, int(number), int(seed)))
