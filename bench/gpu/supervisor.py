"""Sections in processes of their own, with an end to each; rows as they come.

A section that dies or says nothing for too long is started again: what it was trying
gets a row that says so, what has a row and what is done is left out.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.device.subject import Subject
from bench.gpu.worker import Settings

GRACE_S = 5.0  # after its deadline a section may finish what it is at
LAST_WORDS = 40  # lines of a log that may hold the reason of a death
MOST_DEATHS = 12  # of one section
TORCH = ("peers", "sweep_peers")
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")  # what was asked for; rows have it


@dataclass(kw_only=True)
class Run:
    """What all sections of one run share."""

    work: Path
    rehearse: bool
    torch_python: str
    hang_s: float
    device: str = ""  # for rows of which nobody said where they ran
    take: Callable[[rows.Row], None]  # called with each row
    log: Callable[[str], None] = print

    def environment(self, section: str) -> dict[str, str]:
        """The GPU, or the CPU in a rehearsal; memory only as it is needed.

        A product that XLA has tried out in a section is not tried again when that is
        started anew. Other sections do not rely on it: those that check results run
        kernels beside the trials, which then choose by times that mean nothing.
        """
        flags = XLA_FLAGS
        cache = self.work / f"autotuned-{section}"
        cache.mkdir(exist_ok=True)
        if not self.rehearse:
            flags += f" --xla_gpu_per_fusion_autotune_cache_dir={cache}"
        return {
            "JAX_PLATFORMS": "cpu" if self.rehearse else "cuda",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_FLAGS": flags.strip(),
            "TRANSFORMERS_VERBOSITY": "error",
            "PYTHONUNBUFFERED": "1",
        }


@dataclass(kw_only=True)
class Section:
    """One section while it runs, through all of its processes."""

    run: Run
    name: str
    deadline: float
    settled: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)
    late: list[str] = field(default_factory=list)
    trying: dict[str, Any] | None = None
    deaths: int = 0
    achieved: int = 0  # rows and tasks at the last death
    read: int = 0  # bytes of the events

    @property
    def events(self) -> Path:
        """Where the process writes."""
        return self.run.work / f"{self.name}.events"

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.run.work / f"{self.name}.log"

    def settings(self) -> Settings:
        """What a process that does what is left to do is told."""
        return Settings(
            section=self.name,
            events=str(self.events),
            work=str(self.run.work),
            rehearse=self.run.rehearse,
            deadline=self.deadline,
            settled=sorted(self.settled),
            done=sorted(self.done),
        )

    def start(self) -> subprocess.Popen:
        """The next process."""
        words = [json.dumps(asdict(self.settings()))]
        python = self.run.torch_python if self.name in TORCH else sys.executable
        with self.log.open("ab") as log:
            return subprocess.Popen(
                processes.command("bench.gpu.worker", words, python),
                cwd=rows.ROOT,
                env=processes.environment(self.run.environment(self.name)),
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ended with whatever it has started.
                start_new_session=True,
            )

    def listen(self) -> bool:
        """Take in new events; whether there were any."""
        if not self.events.exists():
            return False
        with self.events.open() as events:
            events.seek(self.read)
            text = events.read()
        whole = text[: text.rfind("\n") + 1]
        self.read += len(whole.encode())
        for line in whole.splitlines():
            (kind, value), *_ = json.loads(line).items()
            self.hear(kind, value)
        return bool(whole)

    def hear(self, kind: str, value: Any) -> None:
        """One event."""
        if kind == "trying":
            self.trying = value
        elif kind == "row":
            self.give(value)
        elif kind == "done":
            self.done.add(value)
            self.trying = None
        elif kind == "late":
            self.late.append(value)

    def give(self, value: dict[str, Any]) -> None:
        """Make it a row of results."""
        names = Subject.__dataclass_fields__
        subject = Subject(**{name: value[name] for name in names})
        self.settled.add(subject.key)
        if self.trying is not None and Subject(**self.trying) == subject:
            self.trying = None
        rest: dict[str, Any] = {"device": self.run.device}
        if XLA_FLAGS:
            rest["xla_flags"] = XLA_FLAGS
        rest |= {name: x for name, x in value.items() if name not in names}
        named: dict[str, Any] = {name: value[name] for name in names}
        found = rows.row(**named, **rest, section=self.name)
        self.run.take(found | {"rehearsal": True} if self.run.rehearse else found)

    def died(self, reason: str) -> bool:
        """Blame what was being tried; whether the rest is worth another start."""
        self.deaths += 1
        self.run.log(f"  {self.name}: {reason}")
        blamed, self.trying = self.trying, None
        achieved = len(self.settled) + len(self.done)
        progress, self.achieved = achieved > self.achieved, achieved + 1
        self.give((blamed or asdict(nobody(self.name))) | {"error": reason})
        return (blamed is not None or progress) and self.deaths < MOST_DEATHS

    def last_words(self) -> str:
        """Of the process that died; above them are those of the ones before it."""
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_WORDS:]
        return processes.last_words("\n".join(lines))


def nobody(section: str) -> Subject:
    """For a death that no candidate is to blame for."""
    return Subject(op=section, implementation="", T=0, D=0, V=0, dtype="")


def run_section(run: Run, name: str, seconds: float) -> list[str]:
    """Run one section to its end; the tasks that it had no time for."""
    start = time.time()
    section = Section(run=run, name=name, deadline=start + seconds)
    again = True
    while again and time.time() < section.deadline:
        again = run_process(section)
    took = time.time() - start
    late = f"; no time for {', '.join(section.late)}" if section.late else ""
    run.log(f"  {name}: {took:.0f} s{late}")
    return section.late


def run_process(section: Section) -> bool:
    """Run one process of it; whether another one is needed."""
    process, heard = section.start(), time.time()
    try:
        while process.poll() is None:
            if section.listen():
                heard = time.time()
            if time.time() > section.deadline + GRACE_S:
                section.listen()
                was = section.trying
                if was is not None:
                    section.give(was | {"unfinished": "no time was left"})
                section.late.append("what it was at")
                return False
            if time.time() - heard > section.run.hang_s:
                return section.died(f"hung for {section.run.hang_s:.0f} s")
            time.sleep(0.05)
    finally:
        processes.end(process)
        section.listen()
    if process.returncode == 0:
        return False
    return section.died(f"exit {process.returncode}: {section.last_words()}")
