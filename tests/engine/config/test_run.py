"""Run files, overrides and options: what is accepted, and how the rest is refused."""

import textwrap

import pytest

from engine.config.dpo import DPOConfig
from engine.config.run import ShardingConfig, SourceConfig, load_run_config
from engine.errors import InputError
from tests.engine.tutorial import TUTORIAL

SMALL = """\
config:
  model: {name_or_path: m}
  mixture: {informs: [{data_files: pairs.jsonl}]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def refusal(path, *overrides) -> str:
    """The one line that `load_run_config` refuses with."""
    with pytest.raises(InputError) as caught:
        load_run_config(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tutorial_run_file(write):
    run = load_run_config(write(TUTORIAL))
    assert run.actions == ("train",)
    assert run.model.name_or_path == "meta-llama/Llama-3.1-8B-Instruct"
    assert run.reference_model is not None
    assert run.reference_model.name_or_path == run.model.name_or_path
    (source,) = run.mixture.informs
    assert source == SourceConfig(
        type="hf", data_files="trl-lib/ultrafeedback_binarized", split="train[:90%]"
    )
    assert run.trainer == DPOConfig(
        beta=0.08,
        max_length=2048,
        max_prompt_length=1024,
        total_batch_size=16,
        learning_rate=1e-6,
        num_train_epochs=3,
    )
    assert run.trainer.learning_rate == 1e-6  # which YAML 1.1 reads as a string


def test_empty_section_means_defaults(write):
    run = load_run_config(write(SMALL + "  trainer:\n  sharding:\n  eval_mixture:\n"))
    assert run.trainer == DPOConfig()
    assert run.sharding == ShardingConfig()
    assert run.eval_mixture is None


def test_overrides(write):
    run = load_run_config(
        write(TUTORIAL),
        [
            "trainer.beta=0.2",
            "config.trainer.learning_rate=5e-7",
            "trainer.max_grad_norm=null",
            "trainer.max_prompt_length=",
            "trainer.drop_last=true",
            "model.name_or_path=some/where",
            "mixture.informs.0.split=train[:50%]",
            "mixture.informs.0.data_files=[a.csv, b.csv]",
            "eval_mixture={informs: [{data_files: c.csv}]}",
            "sharding.fsdp=2",
            "actions=[validate, train]",
        ],
    )
    assert run.trainer.beta == 0.2
    assert run.trainer.learning_rate == 5e-7
    assert run.trainer.max_grad_norm is None
    assert run.trainer.max_prompt_length is None
    assert run.trainer.drop_last is True
    assert run.trainer.max_length == 2048
    assert run.model.name_or_path == "some/where"
    assert run.mixture.informs[0].split == "train[:50%]"
    assert run.mixture.informs[0].data_files == ("a.csv", "b.csv")
    assert run.eval_mixture is not None
    assert run.eval_mixture.informs[0].data_files == "c.csv"
    assert run.sharding.fsdp == 2
    assert run.actions == ("validate", "train")


def test_numbers_are_decimal(write):
    """Also where YAML 1.1 reads another base, in what is no number at all."""
    run = load_run_config(
        write(SMALL + "  trainer: {model_name: 010, log_steps: 1_000, seed: 0}\n"),
        ["trainer.save_directory=1:30", "trainer.beta=1.5e-1", "trainer.drop_last=yes"],
    )
    assert run.trainer.model_name == "010"
    assert run.trainer.save_directory == "1:30"
    assert (run.trainer.log_steps, run.trainer.beta, run.trainer.seed) == (
        1000,
        0.15,
        0,
    )
    assert run.trainer.drop_last is True


@pytest.mark.parametrize(
    "override, expected",
    [
        ("beta", "'beta' is not an override"),
        ("=1", "'=1' is not an override"),
        ("trainer..beta=1", "is not an override"),
        ("trainer.bta=1", "unknown key trainer.bta; did you mean 'trainer.beta'?"),
        ("trainer.beta=[", "trainer.beta: '[' is not a YAML value"),
        ("trainer.beta=abc", "trainer.beta='abc' must be a finite number"),
        ("trainer.beta=-1", "trainer.beta=-1.0 must be greater than 0"),
        ("trainer.beta.x=1", "trainer.beta.x: trainer.beta is 0.08"),
        ("trainer.seed.x=1", "trainer.seed={'x': 1} must be a whole number"),
        ("trainer.seed.x.y=1", "trainer.seed={'x': {'y': 1}} must be a whole number"),
        ("model.name_or_path=null", "model.name_or_path is missing"),
        ("mixture.informs.1.split=x", "mixture.informs is a list of 1"),
        ("mixture.informs.first.split=x", "mixture.informs is a list of 1"),
        ("trainer.seed=010", "trainer.seed='010' must be a whole number"),
        ("trainer.seed=1:30", "trainer.seed='1:30' must be a whole number"),
        ("trainer.beta=1:30.5", "trainer.beta='1:30.5' must be a finite number"),
        ("trainer.beta=" + "[" * 5000, "nested too deeply"),
        ("trainer.beta" + ".x" * 5000 + "=1", "trainer.beta is 0.08, which has no"),
        ("mixture.informs." + "1" * 5000 + "=x", "mixture.informs is a list of 1"),
        ("trainer.max_length=" + "9" * 5000, "is not a YAML value"),
        ("trainer={beta: 0}", "trainer.beta=0.0 must be greater than 0"),
        (f"trainer.workspace_bytes={2**63 - 1}", "and below 1099511627776"),
        (f"trainer.warmup_steps={2**63 - 1}", "and below 2147483648"),
        (f"mixture.informs.0.num_rows={2**63 - 1}", "and below 2147483648"),
    ],
)
def test_bad_override_blames_the_command_line(write, override, expected):
    message = refusal(write(TUTORIAL), override)
    assert message.startswith("command line: ")
    assert expected in message


def test_a_deep_key(write):
    message = refusal(write(TUTORIAL), "trainer.seed" + ".x" * 5000 + "=1")
    assert "trainer.seed=<a dict too large to print> must be a whole num" in message


def test_a_file_without_a_section_is_blamed_for_what_an_override_leaves_out(write):
    path = write("config: {mixture: {informs: [{data_files: x}]}}\n")
    message = refusal(path, "model.dtype=float32")
    assert message == f"{path}: model.name_or_path is missing"


def test_file_is_blamed_beside_overrides(write):
    path = write(SMALL + "  trainer: {seed: -1}\n")
    message = refusal(path, "trainer.beta=0.2")
    assert message == f"{path}: trainer.seed=-1 must be at least 0 and below 4294967296"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "is empty"),
        ("- a\n", "holds a list"),
        ("config: {\n", "not valid YAML"),
        ("a: b: c\n", "line 1, column 5"),
        ("actions: [train]\n", "config must be a mapping"),
        ("trainer: {}\n", "unknown key 'trainer'"),
        (SMALL + "  actions: [train]\n", "actions stands beside"),
        (SMALL + "actions: train\n", "actions='train' must be a list"),
        (SMALL + "actions: [trian]\n", "actions.0='trian' must be one of train, val"),
        (SMALL + "  model: {name_or_path: n}\n", "the key 'model' is given twice"),
        (SMALL + "  trainer: {beta: 1, beta: 2}\n", "the key 'beta' is given twice"),
        (SMALL + "  trainer: {trainer_type: sft}\n", "='sft' must be one of dpo"),
        (
            SMALL + "  trainer: {lr_scheduler_type: 1}\n",
            "one of constant, constant_with",
        ),
        (
            SMALL + "  trainer: {truncation_mode: keep_ends}\n",
            "did you mean 'keep_end'?",
        ),
        (
            SMALL + "  sharding: {fsdp: eight}\n",
            "sharding.fsdp='eight' must be a whole",
        ),
        (SMALL + "  trainer: {max_len: 1}\n", "did you mean 'trainer.max_length'?"),
        (SMALL + "  trainer: {dtype: float32}\n", "did you mean 'model.dtype'?"),
        (
            SMALL + "  trainer: {zzz: 1}\n",
            "unknown key trainer.zzz; known: beta, loss_type",
        ),
        (SMALL + "  trainer: {1: 1}\n", "unknown key trainer.1"),
        (SMALL + "  trainer: {no: 1}\n", "unknown key trainer.False"),
        (SMALL + "  trainer: " + "[" * 5000, "not valid YAML: nested too deeply"),
        (SMALL + "  trainer: {beta: 1e30000}\n", "must be a finite number"),
        (SMALL + "  trainer: 3\n", "trainer=3 must be a mapping"),
        (SMALL + "  sharding: {fsdp: 0}\n", "sharding.fsdp=0 must be at least 1"),
        (SMALL + "  sharding: {data: -1}\n", "sharding.fsdp=-1 cannot be"),
        (SMALL + "  sharding: {sequence: 0}\n", "sequence=0 must be at least 1: dev"),
        (SMALL + "  sharding: {sequence: -1}\n", "sequence=-1 must be at least 1"),
        (SMALL + "  sharding: {sequence: 1.5}\n", "sequence=1.5 must be a whole"),
        (SMALL + "  trainer: {drop_last: 1}\n", "must be true or false"),
        (SMALL + "  trainer: {seed: 1.5}\n", "seed=1.5 must be a whole number"),
        (SMALL + "  trainer: {num_train_epochs: }\n", "=None must be a whole number"),
        (SMALL + "  trainer: {seed: true}\n", "seed=True must be a whole number"),
        (SMALL + "  trainer: {beta: .nan}\n", "beta=nan must be a finite number"),
        (SMALL + "  trainer: {beta: .inf}\n", "beta=inf must be a finite number"),
        (SMALL + "  trainer: {model_name: 3}\n", "model_name=3 must be a string"),
        (SMALL + "  trainer: {eval_steps: 3}\n", "has no effect without eval_mixture"),
        ("config: {mixture: {informs: [{data_files: x}]}}\n", "model is missing"),
        (
            "config: {model: {dtype: float32}, mixture: {informs: []}}\n",
            "model.name_or_path is missing",
        ),
        ("config: {model: {name_or_path: m}}\n", "mixture is missing"),
    ],
)
def test_bad_file(write, text, expected):
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize(
    "mixture, expected",
    [
        ("{informs: []}", "mixture.informs=[] must list"),
        ("{informs: {a: b}}", "mixture.informs={'a': 'b'} must be a list of mappings"),
        ("{informs: [x.csv]}", "mixture.informs.0='x.csv' must be a mapping"),
        ("{informs: [{type: hf}]}", "mixture.informs.0.data_files is missing"),
        ("{informs: [{data_files: []}]}", "mixture.informs.0.data_files=() must name"),
        ("{informs: [{data_files: ''}]}", "mixture.informs.0.data_files='' must name"),
        (
            "{informs: [{data_files: x, type: jsn}]}",
            "mixture.informs.0.type='jsn' must be one of hf, json, jsonl, csv, ",
        ),
        (
            "{informs: [{data_files: x, num_rows: 0}]}",
            "mixture.informs.0.num_rows=0 must be greater than 0",
        ),
        (
            "{informs: [{data_files: x, type: csv, dataset_split_name: a}]}",
            "mixture.informs.0.dataset_split_name='a' has no effect",
        ),
        (
            "{informs: [{data_files: x}], mixture_weights: [1, 2]}",
            "mixture.mixture_weights has 2 entries, but informs has 1",
        ),
        (
            "{informs: [{data_files: x}], mixture_weights: [a]}",
            "mixture.mixture_weights.0='a' must be a finite number",
        ),
        (
            "{informs: [{data_files: x}, {data_files: y}], mixture_weights: [1e308, 1e3"
            "08]}",
            "mixture.mixture_weights=[1e+308, 1e+308] have an infinite sum",
        ),
        ("{informs: [{data_files: x}], seed: -1}", "mixture.seed=-1 must be at least"),
        (
            "{informs: [{data_files: x}], mixture_weights: [0]}",
            "mixture.mixture_weights=[0.0] must all be greater than 0",
        ),
    ],
)
def test_bad_mixture(write, mixture, expected):
    path = write(f"config: {{model: {{name_or_path: m}}, mixture: {mixture}}}")
    assert refusal(path).startswith(f"{path}: {expected}")


def test_unreadable_files(tmp_path):
    missing = tmp_path / "none.yaml"
    assert refusal(missing) == f"{missing}: there is no such file; give a YAML file"
    assert "cannot be read" in refusal(tmp_path)
    assert "cannot be read (embedded null byte" in refusal("run\0.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refusal(binary)


def test_reference_free_refuses_a_reference(write):
    message = refusal(write(TUTORIAL), "trainer.reference_free=true")
    assert "reference_model has no effect with trainer.reference_free" in message
