"""XLA_FLAGS, which XLA ends the process over: what is wrong with them, in one line."""

import os
import re
import subprocess
import sys

from engine.errors import InputError

# What asks for nothing else is not tried out.
_KNOWN = {
    "--xla_force_host_platform_device_count",
    "--xla_cpu_collective_call_terminate_timeout_seconds",
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
