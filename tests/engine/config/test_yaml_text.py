"""What YAML means here: what is right stays right, and what nobody means is refused."""

import pytest

from engine.config.run import load_run_config
from engine.config.yaml_text import parse
from engine.errors import InputError

RUN = "config: {model: {name_or_path: m}, mixture: {informs: [{data_files: a}]}"


@pytest.fixture
def trainer(tmp_path):
    def load(text: str, start: str = ""):
        path = tmp_path / "run.yaml"
        path.write_bytes(f"{start}{RUN}, trainer: {text}}}".encode())
        return load_run_config(path).trainer

    return load


def test_a_byte_order_mark_is_no_part_of_the_text(trainer):
    assert trainer("{beta: 0.3}", "\ufeff").beta == 0.3


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E6", 1e6), ("'2e-7'", 2e-7), ("1_0.5", 10.5), ("1", 1.0)],
)
def test_numbers_without_a_point(trainer, text, value):
    """YAML 1.1 takes 1e-6 for text."""
    assert trainer(f"{{learning_rate: {text}}}").learning_rate == value


def test_anchors_and_merges_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "config:\n"
        "  model: &m {name_or_path: m, dtype: float32}\n"
        "  reference_model: {<<: *m, name_or_path: r}\n"
        "  mixture: &rows {informs: [{data_files: a}], seed: 1}\n"
        "  eval_mixture: {<<: *rows, seed: 2}\n"
    )
    run = load_run_config(path)
    assert run.reference_model is not None and run.eval_mixture is not None
    assert (run.reference_model.name_or_path, run.reference_model.dtype) == (
        "r",
        "float32",
    )
    assert run.eval_mixture.informs == run.mixture.informs
    assert (run.mixture.seed, run.eval_mixture.seed) == (1, 2)


def test_a_merge_of_a_merge_has_no_key_twice():
    """The one in the middle is flattened, in place, before it is looked at."""
    text = "a: &a {x: 1}\nb: {c: &c {<<: *a, x: 2}}\nd: {<<: *c, y: 3}"
    assert parse(text)["d"] == {"x": 2, "y": 3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("!!int ''", "string index out of range, line 1, column 1"),
        ("a: !!float x", "could not convert string to float: 'x', line 1, column 4"),
        ("- !!timestamp x", "line 1, column 3"),
        ("!!set [1]", "expected a mapping node"),
        ("2024-02-30", "line 1, column 1"),
        (
            "a: 1\n---\nb: 1",
            "a second document begins (---), and a run has one, line 2",
        ),
        ("&a [*a]", "an alias within itself, line 1, column 1"),
        ("a: {b: 1, b: 2}", "the key 'b' is given twice, line 1, column 11"),
        ("[" * 1200, "nested too deeply"),
        ("a: \x01", "unacceptable character #x0001"),
    ],
)
def test_what_is_no_yaml_is_one_line_with_its_place(text, said):
    with pytest.raises(InputError) as error:
        parse(text)
    assert said in str(error.value) and str(error.value).isprintable()


def test_no_tag_makes_an_object_or_runs_code(tmp_path):
    ran = tmp_path / "ran"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"):
        with pytest.raises(InputError, match="could not determine a constructor"):
            parse(f"!!python/{tag} [{str(ran)!r}]")
    assert not ran.exists()
