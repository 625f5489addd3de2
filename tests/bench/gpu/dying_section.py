"""A section of `bench.gpu` that dies, hangs and raises; what is left must get rows."""

import os
import time

from bench.device.subject import Subject
from bench.gpu.worker import Context


def subject(name):
    return Subject(op="test", implementation=name, T=1, D=1, V=1)


def run(context: Context) -> None:
    for task in context.tasks(["first", "second"]):
        for name in ("good", "raises", "dies", "hangs", "last"):
            one = subject(f"{task} {name}")
            if not context.wanted(one):
                continue
            context.trying(one)
            if name == "raises":
                raise ValueError("no such thing")
            if name == "dies":
                os.abort()
            if name == "hangs" and task == "second":
                time.sleep(60)
            context.row(one, seconds=1.0, flops=2 * 10**12, peak_tflops=4.0)
