"""The command line: `dpo train`, `precompute`, `validate`, `export`, ..."""

import argparse
import contextlib
import errno
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from engine import __version__
from engine.commands import (
    evaluate_options,
    inspect_options,
    plan_options,
    process_options,
    xla_flags,
)
from engine.errors import InputError, Interrupted, one_line, stage
from engine.parallel.launch import Launch
from engine.planning.targets import apply_environment

_DESCRIPTION = """\
Preference-tune (DPO) language models in JAX, on CPU, GPU and TPU.

A run file is YAML: `config:` with model, lora, reference_model, mixture, eval_mixture,
sharding and trainer, and `actions:`, a list of train, precompute and validate. Every
option can be changed from the command line by its dotted name without `config.`:

  dpo train run.yaml trainer.beta=0.2 mixture.informs.0.split='train[:50%]'

`dpo --config run.yaml` is short for `dpo run run.yaml`.
"""
_COMMANDS = {
    "train": "train on the run file's pairs, evaluate, and save the model",
    "precompute": "score every pair under the reference, and keep that for training",
    "validate": "check the run file, its model and its data; train nothing",
    "show": "print every option as it will be, and where it comes from",
    "evaluate": "every metric of the trained model on eval_mixture, with intervals",
    "inspect": "show the data as the model will see it, and what is wrong with it",
    "plan": "what its step takes of devices that need not be here, and whether it fits",
    "run": "carry out the run file's own `actions:`, in order",
}
# Of commands that have options of their own.
_OPTIONS = {
    "inspect": inspect_options,
    "evaluate": evaluate_options,
    "plan": plan_options,
}
_WITH_OPTIONS = (*_OPTIONS, *process_options.COMMANDS)
_BAD_INPUT = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # as a shell reports whom SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def _quiet():
    # transformers says at import that there is no PyTorch; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("engine").setLevel(logging.INFO)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, and returns its exit code; bad input is one line and a 2."""
    _quiet()
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        # Now: at Python's exit, what fails here would have Python's own words.
        _flush_output()
        return code
    except BrokenPipeError:  # who reads the output has seen enough, as `head` has
        _discard_output()
        return _BROKEN_PIPE
    except InputError as error:
        return _refuse(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        _discard_output()
        return _refuse(f"the output cannot be written: {one_line(error)}")
    except Interrupted as error:
        print(f"dpo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dpo: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _refuse(message: str, code: int = _BAD_INPUT) -> int:
    print(f"dpo: error: {message}", file=sys.stderr)
    return code


def _flush_output():
    if sys.stdout is not None:  # as it is where it was closed: `>&-`
        sys.stdout.flush()


def _discard_output():
    """What is still in the buffer would fail once more when Python exits."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:  # which reads its own arguments
        _import_jax()
        from dpo_kernels.verify import main as verify

        return verify(argv[1:])
    if argv and argv[0].split("=")[0] == "--config":
        argv = ["run", *argv]
    parser = _parser()
    try:
        if argv and argv[0] in _WITH_OPTIONS:  # which may stand between overrides
            arguments = _options_parser(argv[0]).parse_intermixed_args(argv[1:])
        else:
            arguments = parser.parse_args(argv)
    except SystemExit:  # --help and --version
        _flush_output()
        raise
    if arguments.command is None:
        parser.print_help()
        return 0
    if arguments.command == "export":
        _export(arguments)
        return 0
    if arguments.command == "report":
        _import_jax()
        from engine.commands import report

        report.main(arguments.directories, arguments.output)
        return 0
    path, overrides = arguments.config, arguments.words
    if path is None:
        if not overrides:
            raise InputError(
                f"no run file; write `dpo {arguments.command} run.yaml`, see "
                "`dpo --help`"
            )
        path, *overrides = overrides
    if arguments.command == "show":
        _import_jax()
        from engine.commands import show

        show.main(path, overrides)
        return 0
    options: tuple[Any, ...] = ()
    if arguments.command in _OPTIONS:
        options = (_OPTIONS[arguments.command].read_options(arguments),)
    if arguments.command == "plan" and "jax" not in sys.modules:
        apply_environment(options[0].target.environment, os.environ)
    launch = None
    if arguments.command in process_options.COMMANDS:
        launch = process_options.read_options(arguments)
    return _run(arguments.command, path, overrides, launch, *options)


def _import_jax():
    """First of all libraries, as it reads its environment variables at the import."""
    if "jax" not in sys.modules:  # else they have been read
        xla_flags.check(os.environ.get("XLA_FLAGS", ""))
    xla_flags.let_cpu_devices_wait()
    with stage("the working directory cannot be used", "change to one that is there"):
        os.getcwd()
    hint = "correct the environment variables whose names begin with JAX_"
    with stage("JAX cannot be imported", hint):
        importlib.import_module("jax")


def _run(
    name: str,
    path: str,
    overrides: list[str],
    launch: Launch | None,
    *options: Any,
) -> int:
    _import_jax()
    from engine.config.run import load_run_config

    run_config = load_run_config(path, overrides)
    actions = run_config.actions if name == "run" else (name,)
    if not actions:
        raise InputError(
            f"{path}: no actions; list some, such as `actions: [train]`, or use "
            "`dpo train`"
        )
    # What imports make lives for good: looking through it for garbage, again and again
    # while programs are traced, takes half a second of a start.
    gc.disable()
    commands = [importlib.import_module(f"engine.commands.{x}") for x in actions]
    gc.freeze()
    gc.enable()
    with contextlib.ExitStack() as stack:
        if launch is not None:
            from engine.parallel.processes import joined

            stack.enter_context(joined(launch))
        codes = [command.main(run_config, *options) or 0 for command in commands]
    return max(codes)


def _export(arguments: argparse.Namespace):
    _import_jax()
    from engine.commands import export

    export.main(
        arguments.merge,
        arguments.directory,
        model=arguments.model,
        dtype=arguments.dtype,
    )


def _add_export(commands: Any):
    export = commands.add_parser(
        "export",
        help="write a LoRA adapter and its model as one model",
        description="Write W + scale B A for each weight of a model, in Hugging Face "
        "form: computed in float32, rounded once to the model's own dtype.",
        allow_abbrev=False,
    )
    export.add_argument(
        "--merge", required=True, metavar="ADAPTER", help="a PEFT adapter's directory"
    )
    export.add_argument("directory", metavar="NEW_DIR", help="where the model goes")
    export.add_argument(
        "--model", metavar="BASE", help="if not the one that the adapter names"
    )
    dtypes = "bfloat16", "float16", "float32"
    export.add_argument("--dtype", choices=dtypes, help="of the weights on disk")


def _add_report(commands: Any):
    report = commands.add_parser(
        "report",
        help="one HTML page of runs: curves, configurations and their differences",
        description="Write one self-contained HTML page of what runs have written.",
        allow_abbrev=False,
    )
    report.add_argument(
        "directories", nargs="+", metavar="DIR", help="the save_directory of a run"
    )
    report.add_argument(
        "--output", metavar="FILE", help="default: report.html in the first DIR"
    )


def _about(name: str) -> str:
    return f"{_COMMANDS[name][0].upper()}{_COMMANDS[name][1:]}."


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dpo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dpo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=_about(name),
            usage=f"dpo {name} RUN.yaml [KEY=VALUE ...]",
            allow_abbrev=False,
        )
        _add_run_file(command)
    _add_export(commands)
    _add_report(commands)
    commands.add_parser(
        "verify", help="run every kernel that this machine can, against the reference"
    )
    return parser


def _add_run_file(parser: argparse.ArgumentParser):
    parser.add_argument("--config", metavar="RUN.yaml", help="the run file")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="an option's dotted name and its value in YAML: trainer.beta=0.2",
    )


def _options_parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"dpo {name}",
        usage=f"dpo {name} RUN.yaml [OPTIONS] [KEY=VALUE ...]",
        description=_OPTIONS[name].DESCRIPTION if name in _OPTIONS else _about(name),
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    if name in _OPTIONS:
        _OPTIONS[name].add_options(parser)
    if name in process_options.COMMANDS:
        process_options.add_options(parser)
    _add_run_file(parser)
    return parser
