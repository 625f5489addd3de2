"""XLA_FLAGS, which XLA ends the process over: what is wrong with them, in one line."""

import os
import re
import subprocess
import sys

from engine.errors import InputError

_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
# What asks for nothing else is not tried out.
_KNOWN = {
    "--xla_force_host_platform_device_count",
    _PATIENCE,
}
# XLA reads its flags when somebody asks for their values.
_READ = (
    "from jaxlib import xla_client\n"
    "xla_client.CompileOptions().executable_build_options.debug_options"
)
_SAID = re.compile(r"^[EF]\d{4} .*?\] (.*)$", re.MULTILINE)


def check(flags: str) -> None:
    """Refuse flags that XLA does not read.

    It ends a process whose flags it does not know, so another one reads them, which
    takes a quarter of a second.

    Raises:
        InputError: XLA's complaint.
    """
    names = {flag.split("=")[0] for flag in flags.split()}
    if names <= _KNOWN:
        return
    done = subprocess.run(
        [sys.executable, "-c", _READ],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode and "parse_flags_from_env" in done.stderr:
        found = _SAID.search(done.stderr)
        reason = found[1].strip() if found else "they cannot be read"
        raise InputError(
            f"XLA_FLAGS={flags!r} cannot be used: {reason.rstrip('.')}; correct the "
            "environment variable, or unset it"
        )


def let_cpu_devices_wait():
    """Where there are to be several: they share the cores, and work in turns.

    XLA takes one that has waited 40 s for the others for stuck, and ends the process.
    It reads the flag from the environment alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    several = "--xla_force_host_platform_device_count" in flags
    if (several or "JAX_NUM_CPU_DEVICES" in os.environ) and _PATIENCE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}=3600".lstrip()
