"""What the tests set before JAX starts: devices, and where programs are kept."""

import hashlib
import platform
from pathlib import Path

DEVICES = "--xla_force_host_platform_device_count"
# XLA ends a process in which a CPU device has waited 40 s for another: on a machine
# with other work to do, that is no deadlock.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
CACHE_BYTES = 2**30
# A run with this flag (`make test-isa`) is of few tests, compiled as users compile. All
# tests are compiled without LLVM's optimisations, and each fusion without a pipeline of
# MLIR's passes of its own: that takes a third of the time, and rounds in other ways.
OLDER = "--xla_cpu_max_isa"
QUICK = {
    "--xla_backend_extra_options": "xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count": "1",  # each worker has a core
}


def xla_flags(given: str) -> str:
    """The flags that were given, and ours where they say nothing of it."""
    ours = {DEVICES: "8", PATIENCE: "600"} | ({} if OLDER in given else QUICK)
    added = [f"{flag}={value}" for flag, value in ours.items() if flag not in given]
    return " ".join([*given.split(), *added])


def processor() -> str:
    """What XLA compiles for on this machine: the processor and its instruction sets."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    first = info.read_text().partition("\n\n")[0].splitlines()
    # Clock rates and the like differ from one reading to the next.
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features")
    return "\n".join(line for line in first if line.startswith(names))


def compilation_cache(root: Path) -> Path:
    """Where compiled programs are kept between runs, and shared by pytest's workers.

    JAX finds a program by its text, its options (`--xla_cpu_max_isa` among them) and
    the compiler's version, so what is found is what would have been compiled. Only the
    processor is not in its key: where machines share a checkout, each kind of them has
    a folder.
    """
    name = hashlib.sha256(processor().encode()).hexdigest()[:16]
    return root / ".pytest_cache" / "jax" / name


def trim(folder: Path, limit: int = CACHE_BYTES) -> None:
    """Delete the oldest programs, so that at most `limit` bytes stay."""
    left = limit
    files = [(path.stat(), path) for path in folder.glob("*") if path.is_file()]
    for stat, path in sorted(files, key=lambda one: one[0].st_mtime_ns, reverse=True):
        left -= stat.st_size
        if left < 0:
            path.unlink(missing_ok=True)
