"""Clocks, power and temperature of the GPU, as nvidia-smi has them."""

import shutil
import subprocess

from bench.device.timing import MOST_ITERATIONS, Call, Wait, seconds_of

QUERY = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}


def clocks(call: Call | None = None, wait: Wait | None = None) -> dict[str, float]:
    """What nvidia-smi says while the device is busy with `call`; {} without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    out = None
    if call is not None and wait is not None:
        once = max(seconds_of(call, wait, 3), 1e-6)
        for _ in range(min(MOST_ITERATIONS, 1 + round(0.5 / once))):
            out = call()
    words = [
        *(program, f"--query-gpu={','.join(QUERY.values())}"),
        *("--format=csv,noheader,nounits", "--id=0"),
    ]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return {}
    finally:
        if wait is not None:
            wait(out)
    return parse_clocks(done.stdout)


def parse_clocks(text: str) -> dict[str, float]:
    """One line of nvidia-smi's answer; what it does not know is left out."""
    found = {}
    for name, word in zip(QUERY, text.split(","), strict=False):
        try:
            found[name] = float(word)
        except ValueError:  # [N/A]
            continue
    return found
