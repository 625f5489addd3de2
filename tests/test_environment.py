"""What conftest.py sets before JAX starts."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import environment


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("", (environment.DEVICES, environment.PATIENCE, *environment.QUICK)),
        ("--xla_cpu_max_isa=AVX2", (environment.DEVICES, environment.PATIENCE)),
        (f"{environment.DEVICES}=2 --xla_cpu_max_isa=AVX2", (environment.PATIENCE,)),
        (
            f"{environment.PATIENCE}=2 --xla_backend_extra_options=",
            (environment.DEVICES, "--xla_cpu_parallel_codegen_split_count"),
        ),
    ],
)
def test_flags_that_are_given_stay(given, added):
    flags = environment.xla_flags(given)
    assert flags.startswith(given)
    assert tuple(x.split("=")[0] for x in flags[len(given) :].split()) == added


def test_this_process_has_what_conftest_set():
    assert environment.DEVICES in os.environ["XLA_FLAGS"]
    assert len(jax.devices()) == int(
        os.environ["XLA_FLAGS"].partition(f"{environment.DEVICES}=")[2].split()[0]
    )
    assert Path(jax.config.jax_compilation_cache_dir or "").parent.name == "jax"


def program():
    """Each time another function, that compiles to the same program."""

    def of_a_damaged_program(x):
        return jnp.sin(x) + 3

    return jax.jit(of_a_damaged_program)


def test_a_damaged_program_is_compiled_again():
    """As a process that was killed, or another worker amid its writing, leaves it."""
    folder, pattern = jax.config.jax_compilation_cache_dir, "jit_of_a_damaged_program-*"
    for path in Path(folder).glob(pattern):  # of runs with other XLA_FLAGS
        path.unlink()
    x = jnp.arange(7.0)
    want = np.asarray(program()(x))
    (path,) = Path(folder).glob(pattern)
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) // 2])
        np.testing.assert_array_equal(program()(x), want)
    finally:
        path.write_bytes(whole)


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(("new", "old", "oldest")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    environment.trim(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]
    environment.trim(tmp_path / "absent")


def test_each_kind_of_processor_has_a_folder(monkeypatch, tmp_path):
    here = environment.compilation_cache(tmp_path)
    assert environment.compilation_cache(tmp_path) == here
    monkeypatch.setattr(environment, "processor", lambda: "another one")
    assert environment.compilation_cache(tmp_path) != here
