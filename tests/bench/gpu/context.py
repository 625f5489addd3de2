"""What the tests of `bench.gpu` share: a context without a process around it."""

import dataclasses
import json
import time

from bench.gpu import sizes
from bench.gpu.worker import Context, Settings

MAIN = sizes.REHEARSAL.main
TINY = dataclasses.replace(
    sizes.REHEARSAL, shapes=(MAIN,), small=(), sweep=sizes.REHEARSAL.sweep[:1]
)


def context_at(path, seconds=600.0, sizes=TINY):
    context = Context(
        Settings(
            section="test",
            events=str(path / "events"),
            work=str(path),
            rehearse=True,
            deadline=time.time() + seconds,
        )
    )
    context.plan = sizes
    return context


def events(path, kind):
    lines = (path / "events").read_text().splitlines()
    return [
        value for line in lines for k, value in json.loads(line).items() if k == kind
    ]
