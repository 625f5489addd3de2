"""Processes that benchmarks start: what they answer, why they died, taking turns."""

import subprocess
import sys
import time

import pytest

from bench import processes, rows

ECHO = """
import sys
from bench import processes
for word in sys.argv[1:]:
    if word == "die":
        print("warming up\\nValueError: no room\\n\\nAdvice", file=sys.stderr)
        sys.exit(3)
    if word == "crash":
        sys.exit(4)
    print("noise")
    processes.answer({"said": word})
"""


@pytest.fixture
def echo(monkeypatch):
    """As the command of any module: a script that says every word that it is given."""
    monkeypatch.setattr(
        processes,
        "command",
        lambda _, words, *rest: [sys.executable, "-c", ECHO, *words],
    )


def test_the_last_answer_counts_whatever_else_is_printed(echo):
    assert processes.ask("any", ["a", "b"], {}) == {"said": "b"}
    assert list(processes.ask_as_it_goes("any", ["a", "b"], {})) == [
        {"said": "a"},
        {"said": "b"},
    ]


def test_a_death_is_an_error_of_one_line_after_the_answers_before_it(echo):
    with pytest.raises(processes.ProcessError, match=r"^ValueError: no room$"):
        processes.ask("any", ["a", "die"], {})
    coming = processes.ask_as_it_goes("any", ["a", "die"], {})
    assert next(coming) == {"said": "a"}
    with pytest.raises(processes.ProcessError, match=r"^ValueError: no room$"):
        next(coming)


def test_a_process_without_a_word_is_an_error_too(echo):
    for words in ([], ["crash"]):
        with pytest.raises(processes.ProcessError, match="nothing was printed"):
            processes.ask("any", words, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Traceback:\n  File x\n    raise Error\nOSError: gone\n\nAdvice",
            "OSError: gone",
        ),
        ("start\n  an error: inside\nlast", "an error: inside"),
        ("start\nF0000 check failed\n", "F0000 check failed"),
        ("INTERNAL: RESOURCE_EXHAUSTED\nlast", "INTERNAL: RESOURCE_EXHAUSTED"),
        ("\n", "nothing was printed"),
    ],
)
def test_last_words_are_the_reason(text, said):
    assert processes.last_words(text) == said


def test_what_is_none_is_not_set_there(monkeypatch):
    monkeypatch.setenv("BENCH_A", "a")
    monkeypatch.setenv("BENCH_B", "b")
    found = processes.environment({"BENCH_A": None, "BENCH_C": "c"})
    assert "BENCH_A" not in found
    assert (found["BENCH_B"], found["BENCH_C"]) == ("b", "c")


def test_no_device_where_jax_cannot_start_or_takes_too_long(monkeypatch):
    monkeypatch.setattr(processes, "DEVICE", "print('x\\ncpu|a cpu'); print(end='')")
    assert processes.first_device({}, 60.0) == ("cpu", "a cpu")
    monkeypatch.setattr(processes, "DEVICE", "print('cpu|a cpu'); raise SystemExit(1)")
    assert processes.first_device({}, 60.0) == ("", "")
    monkeypatch.setattr(processes, "DEVICE", "import time; time.sleep(60)")
    assert processes.first_device({}, 0.2) == ("", "")


def test_who_dies_lets_go_of_the_lock(tmp_path):
    """The next one's turn comes, though nobody has said that it is over."""
    lock = tmp_path / "lock"
    holding = (
        "import sys, time; from pathlib import Path; from bench import processes\n"
        "with processes.alone(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding, str(lock)],
        cwd=rows.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        other.kill()
        start = time.monotonic()
        with processes.alone(lock):
            assert time.monotonic() - start < 30
