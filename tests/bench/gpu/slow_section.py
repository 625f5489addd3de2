"""A section of `bench.gpu` whose compilation takes longer than a hang may."""

import time

from bench.device.subject import Subject
from bench.gpu.worker import Context, Pulse


def run(context: Context) -> None:
    context.pulse = Pulse(lambda: context._tell("beat", None), every_s=0.1)
    one = Subject(op="test", implementation="compiles", T=1, D=1, V=1)
    if context.wanted(one):
        context.trying(one)
        with context.pulse:
            time.sleep(3.0)
        context.row(one, seconds=1.0)
