"""The command line: what it calls, what it prints, and its exit codes."""

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import engine
from engine.cli import main
from engine.commands import xla_flags
from engine.errors import InputError, Interrupted
from engine.training.evaluation import NotFinite

ROOT = Path(__file__).parents[2]
RUN = """\
config:
  model: {name_or_path: m}
  mixture: {informs: [{data_files: pairs.jsonl}]}
actions: [validate, train]
"""


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the work itself, and lists what was asked of it."""
    calls = []
    for name in ("train", "validate"):
        command = types.ModuleType(f"engine.commands.{name}")
        vars(command)["main"] = lambda run, name=name: calls.append(
            (name, run.trainer.beta)
        )
        monkeypatch.setitem(sys.modules, command.__name__, command)
    return calls


def test_train_and_validate(run_file, calls):
    assert main(["train", run_file, "trainer.beta=0.2"]) == 0
    assert main(["validate", run_file]) == 0
    assert calls == [("train", 0.2), ("validate", 0.1)]


@pytest.mark.parametrize(
    "words", [["run"], ["run", "--config"], ["--config"]], ids=" ".join
)
def test_run_does_the_actions_in_order(run_file, calls, words):
    assert main([*words, run_file, "trainer.beta=0.3"]) == 0
    assert calls == [("validate", 0.3), ("train", 0.3)]


def test_config_with_an_equals_sign(run_file, calls):
    assert main([f"--config={run_file}"]) == 0
    assert len(calls) == 2


def test_verify_reads_its_own_arguments(monkeypatch):
    verify = types.ModuleType("dpo_kernels.verify")
    vars(verify)["main"] = lambda argv: len(argv)
    monkeypatch.setitem(sys.modules, "dpo_kernels.verify", verify)
    assert main(["verify", "--quick", "x", "y"]) == 3


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "no run file; write `dpo train run.yaml`"),
        (["train", "--bad", "x"], "unrecognized arguments: --bad"),
        (["train", "none.yaml"], "none.yaml: there is no such file"),
        (["train", "{run}", "trainer.bta=1"], "did you mean 'trainer.beta'?"),
        (["run", "{run}", "actions=[]"], "no actions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run_file, capsys, argv, expected):
    assert main([word.format(run=run_file) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dpo: error: ") and err.count("\n") == 1
    assert expected in err


def test_bad_input_found_while_running(run_file, calls, capsys, monkeypatch):
    def refuse(run):
        raise InputError("pairs.jsonl: row 3: no column\n'chosen'")

    monkeypatch.setattr(sys.modules["engine.commands.train"], "main", refuse)
    assert main(["train", run_file]) == 2
    expected = "dpo: error: pairs.jsonl: row 3: no column 'chosen'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (NotFinite("step 2: nan"), 3, "dpo: error: step 2: nan\n"),
        (Interrupted(15, "stopped after step 2"), 143, "dpo: stopped after step 2\n"),
        (Interrupted(2, "stopped after step 2"), 130, "dpo: stopped after step 2\n"),
    ],
)
def test_how_a_run_may_end(run_file, calls, capsys, monkeypatch, error, code, said):
    def end(run):
        raise error

    monkeypatch.setattr(sys.modules["engine.commands.train"], "main", end)
    assert main(["train", run_file]) == code
    assert capsys.readouterr().err == said


def test_interrupt_is_one_line_and_exit_code_130(run_file, calls, capsys, monkeypatch):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["engine.commands.train"], "main", interrupt)
    assert main(["train", run_file]) == 130
    assert capsys.readouterr().err == "dpo: interrupted\n"


def test_our_own_mistakes_keep_their_traceback(run_file, calls, monkeypatch):
    def fail(run):
        raise ValueError("not the user's fault")

    monkeypatch.setattr(sys.modules["engine.commands.train"], "main", fail)
    with pytest.raises(ValueError, match="not the user's fault"):
        main(["train", run_file])


def test_help_and_version(capsys):
    assert main([]) == 0
    assert "dpo train run.yaml" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dpo {engine.__version__}\n"


def test_module_runs_and_help_imports_no_jax():
    script = (
        "import runpy, sys; sys.argv = ['dpo', '--help']\n"
        "try: runpy.run_module('engine', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'jax', 'numpy', 'yaml', 'datasets', 'transformers'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: dpo")


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python -m engine` says in a shell, where `dpo` stands for it."""
    return subprocess.run(
        ["bash", "-c", f'dpo() {{ "{sys.executable}" -m engine "$@"; }}; {command}'],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_output_that_nobody_reads_or_that_is_full():
    """Not a word where the reader has gone, as in Unix tools; one for a full disk."""
    done = shell("dpo --help | true; exit ${PIPESTATUS[0]}")
    # (A help of a few lines may fit the pipe before its end closes.)
    assert done.returncode in (0, 141) and done.stderr == ""
    done = shell("dpo --version > /dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 2
    assert done.stderr.startswith("dpo: error: the output cannot be written: ")
    assert done.stderr.count("\n") == 1
    assert shell("dpo --version >&-").returncode == 0


@pytest.mark.parametrize("code, expected", [(errno.EPIPE, 141), (errno.ENOSPC, 2)])
def test_output_that_fails_at_once(run_file, calls, monkeypatch, capfd, code, expected):
    """As it does where it is not buffered."""

    def fail(run):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sys.modules["engine.commands.train"], "main", fail)
    monkeypatch.setattr("engine.cli._discard_output", lambda: None)
    assert main(["train", run_file]) == expected
    assert capfd.readouterr().err.count("\n") == (expected == 2)


@pytest.mark.parametrize(
    "variable, value, expected",
    [
        ("JAX_NUM_CPU_DEVICES", "abc", "jax_num_cpu_devices"),
        ("JAX_ENABLE_X64", "maybe", "'maybe'"),
    ],
)
def test_an_environment_that_jax_cannot_read(run_file, variable, value, expected):
    done = shell(f"dpo train {run_file}", **{variable: value})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("dpo: error: JAX cannot be imported: ")
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "added"),
    [
        ("XLA_FLAGS", "--xla_force_host_platform_device_count=8", True),
        ("JAX_NUM_CPU_DEVICES", "8", True),
        ("XLA_FLAGS", "--xla_cpu_max_isa=AVX2", False),
    ],
)
def test_several_cpu_devices_may_wait_for_each_other(
    monkeypatch, variable, value, added
):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    xla_flags.let_cpu_devices_wait()
    flags = os.environ.get("XLA_FLAGS", "")
    assert (xla_flags._PATIENCE in flags) == added
    assert variable != "XLA_FLAGS" or flags.startswith(value)
    monkeypatch.setenv("XLA_FLAGS", f"{value} {xla_flags._PATIENCE}=7")
    xla_flags.let_cpu_devices_wait()  # the user's own stays
    assert flags.count(xla_flags._PATIENCE) == added
    assert os.environ["XLA_FLAGS"].endswith("=7")


def test_a_working_directory_that_is_gone(run_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["validate", run_file]) == 2
    said = capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert said.startswith("dpo: error: the working directory cannot be used: ")


def test_package_exports():
    assert engine.InputError is InputError
    for name in engine.__all__:
        assert hasattr(engine, name)
    with pytest.raises(AttributeError, match="no attribute 'DPOTrianer'"):
        _ = engine.DPOTrianer  # pyright: ignore[reportAttributeAccessIssue]
