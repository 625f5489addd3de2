"""Command lines of any kind end in a command, or in one line and exit code 2."""

import importlib
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cli import main
from tests.engine.fuzzing import TEXT, examples

RUN = """\
config:
  model: {name_or_path: m}
  mixture: {informs: [{data_files: pairs.jsonl}]}
actions: [validate, train]
"""
WORK = ("train", "validate", "precompute", "inspect", "evaluate")
COMMANDS = (*WORK, "show", "run", "export", "report", "verify")
WORDS = (
    "run.yaml none.yaml . out --config --config=run.yaml --help --version --merge "
    "--model --dtype --output --rows --rows=0,x --num --num=3 --eval --train --plots "
    "--no-plots -h - -- = a=b =b a= "
    "trainer.beta=0.2 trainer.beta= trainer..beta=1 config.trainer.beta=1 model=1 "
    "mixture.informs.0.split=test mixture.informs.9.split=x mixture.informs.-1=x "
    "actions=[train] actions=[] actions=x trainer={} trainer.tools=[{a:[1]}]"
).split()
ARGUMENTS = st.builds(
    lambda command, words: [*command, *words],
    st.lists(st.sampled_from(COMMANDS), min_size=1, max_size=1) | st.just([]),
    st.lists(st.sampled_from(WORDS) | TEXT, max_size=5),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a run file; the work itself is only written down."""
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        with open("run.yaml", "w") as file:
            file.write(RUN)
        for name in WORK:
            command = types.ModuleType(f"engine.commands.{name}")
            vars(command)["main"] = lambda *given, name=name: done.append(name)
            patch.setitem(sys.modules, command.__name__, command)
        verify = types.ModuleType("dpo_kernels.verify")
        vars(verify)["main"] = lambda argv: 0
        patch.setitem(sys.modules, "dpo_kernels.verify", verify)
        for name in ("show", "export", "report"):  # imports are no part of an example
            importlib.import_module(f"engine.commands.{name}")
        yield done


@given(ARGUMENTS)
@examples(50)
def test_fuzz_arguments(done, capsys, words):
    done.clear()
    try:
        code = main(words)
    except SystemExit as error:  # of --help and --version
        code = error.code
        assert code == 0
    printed = capsys.readouterr()
    if code:
        assert code == 2 and done == [] and printed.out == ""
        assert printed.err.startswith("dpo: error: ") and printed.err.count("\n") == 1
        assert printed.err.removesuffix("\n").isprintable()
