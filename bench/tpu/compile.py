"""Compiles programs for TPUs that are not here and keeps the final schedules.

`compile_elsewhere` runs this module in a process of its own, because the compiler reads
its options once, and with another Python where a program needs other packages.
"""

import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import processes
from bench.tpu.chips import CHIPS
from bench.tpu.programs import Program, ProgramError, build
from bench.tpu.trips import estimated_cycles, trips


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to compile; all of it can be written as JSON."""

    program: str
    generation: str
    T: int
    D: int
    V: int
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Dump:
    """Texts that the compiler leaves for one operation."""

    bundles: str
    cycles_utilization: str = ""
    bundles_utilization: str = ""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's schedules and its account of memory."""

    schedules: dict[str, Dump]  # of each operation
    facts: dict[str, Any]  # see `_facts`


def compile_elsewhere(job: Job, python: str = sys.executable) -> Compiled:
    """Compile in a process of its own.

    Raises:
        ProgramError: the program cannot be built or compiled; the message is one line.
    """
    with tempfile.TemporaryDirectory(prefix="tpu-schedule-") as folder:
        dump = Path(folder) / "llo"
        changes = {
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
            # Other processes may compile at the same time; there is no TPU to share.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles|static-per-bundle",
        }
        words = [json.dumps(asdict(job))]
        try:
            facts = processes.ask("bench.tpu.compile", words, changes, python)
        except processes.ProcessError as error:
            own = f"{ProgramError.__module__}.{ProgramError.__name__}: "
            raise ProgramError(str(error).removeprefix(own)) from error
        schedules = _read(dump)
    return Compiled(schedules=schedules, facts=facts)


_FILES = {
    "final_bundles": "bundles",
    "pre-delay_hlo-static-per-bundle-utilization": "cycles_utilization",
    "final_hlo-static-per-bundle-utilization": "bundles_utilization",
}


def _read(folder: Path) -> dict[str, Dump]:
    """The operations' texts by name."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*.txt")):
        name = re.match(r"\d+-(.*)-\d+-(.*)\.txt$", path.name)
        if name and name[2] in _FILES:
            found.setdefault(name[1], {})[_FILES[name[2]]] = path.read_text()
    return {name: Dump(**texts) for name, texts in found.items() if "bundles" in texts}


def _facts(job: Job, program: Program, compiled: Any) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        libtpu = ""
    return {
        "flops": program.flops,
        "scalars": {str(k): list(v) for k, v in program.scalars.items()},
        "notes": dict(program.notes),
        "trips": trips(text, program.unknown_loop_runs),
        "estimated_cycles": estimated_cycles(text),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "jax": version("jax"),
        "compiler": f"libtpu {libtpu}",
    }


def compile_here(job: Job) -> dict[str, Any]:
    """Compile for the job's TPU in this process; its environment holds the options."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    chip = CHIPS[job.generation]
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=chip.topology
    ).devices
    cores = getattr(devices[0], "num_cores", chip.cores)
    if cores != chip.cores:
        raise ProgramError(f"{job.generation}: a device has {cores} cores, not {chip}")
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("one",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        shape = (job.T, job.D, job.V)
        program = build(job.program, job.generation, shape, job.dtype, job.options)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            tuple(program.arguments),
        )
        compiled = jax.jit(program.function).lower(*arguments).compile()
    return _facts(job, program, compiled)


if __name__ == "__main__":
    processes.answer(compile_here(Job(**json.loads(sys.argv[1]))))
