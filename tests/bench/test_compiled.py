"""Rows of compiled programs are taken as recorded only while nothing changes them."""

import pytest

from bench import compiled, rows

FORWARD = rows.ROOT / "dpo_kernels" / "pallas_tpu" / "forward.py"


@pytest.fixture(autouse=True)
def _fresh():
    compiled._made_from.cache_clear()
    yield
    compiled._made_from.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """One that notes what it compiles, and says of some that they do not fit."""
    asked, wrong = [], []

    def compile_all(target, wanted):
        for program in wanted:
            asked.append((target, program))
            yield {"T": program["shape"][0], "D": 1, "V": 1, "devices": 1} | {
                **{"device": target, "implementation": "auto", "variant": "plain"},
                **{"compile_s": 0.5, "temp_bytes": 2 * (program in wrong)},
                **{"bound_bytes": 1, "kernels": []},
            }

    problems = staticmethod(lambda row: ["too large"] * (row["temp_bytes"] > 1))
    spied = type("Spied", (), {"problems": problems})
    for name, target in compiled.TARGETS.items():
        changed = {**vars(target), "compiler": spied}
        monkeypatch.setitem(compiled.TARGETS, name, compiled.Target(**changed))
    monkeypatch.setattr(compiled, "_compile", compile_all)
    monkeypatch.setattr(compiled, "PATH", tmp_path / "compiled.json")
    return asked, wrong


def keys(target="tpu"):
    compiled._made_from.cache_clear()
    return [compiled.key(target, program) for program in compiled.programs(target)]


def test_every_program_has_a_key_of_its_own():
    every = [*keys("tpu"), *keys("gpu")]
    assert len(set(every)) == len(every)
    assert every == [*keys("tpu"), *keys("gpu")]


def test_the_sources_are_those_of_the_target_and_of_nothing_else():
    tpu, gpu = (set(compiled.sources(target)) for target in ("tpu", "gpu"))
    kernels = rows.ROOT / "dpo_kernels"
    sums = {kernels / "pallas_tpu" / "sums.py"}  # the other op's
    assert set((kernels / "pallas_tpu").glob("*.py")) - sums <= tpu
    assert kernels / "mosaic_gpu" / "kernels.py" in gpu
    assert kernels / "triton" / "kernels.py" in gpu
    assert kernels / "op" / "backward.py" in tpu & gpu
    assert rows.ROOT / "engine" / "planning" / "h200.textproto" in gpu
    assert not tpu & set((kernels / "triton").glob("*.py"))
    assert not gpu & set((kernels / "pallas_tpu").glob("*.py"))
    others = {path.relative_to(rows.ROOT).parts[0] for path in tpu | gpu}
    assert others == {"dpo_kernels", "bench", "engine"}


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("import jax\n", "import jax  # a comment\n", True),
        ("import jax\n", "import jax\n\n\n\n", True),
        ('"""', '"""Another word. ', True),
        ("import jax\n", "import jax\nx = 1\n", False),
        (" + ", " - ", False),
        ("1", "2", False),
    ],
)
def test_only_what_the_interpreter_sees_counts(tmp_path, old, new, same):
    assert old in FORWARD.read_text()
    path = tmp_path / "changed.py"
    path.write_text(FORWARD.read_text().replace(old, new, 1))
    assert (compiled.meaning(path) == compiled.meaning(FORWARD)) == same


def test_other_versions_options_and_environments_are_other_programs(monkeypatch):
    before = keys()

    def all_differ():
        return not set(keys()) & set(before)

    with monkeypatch.context() as patch:
        patch.setattr(
            compiled, "version", lambda name: "9" if name == "libtpu" else "1"
        )
        assert all_differ()
    with monkeypatch.context() as patch:
        patch.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")
        assert all_differ()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "VARIANTS", (("plain", {"num_valid": True}),))
        assert all_differ()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "WORKSPACE", 1)
        assert all_differ()
    assert keys() == before


def test_only_what_is_not_recorded_is_compiled(compiler):
    asked, _ = compiler
    assert compiled.main([]) == 0
    every = [(t, p) for t in ("tpu", "gpu") for p in compiled.programs(t)]
    assert asked == every
    asked.clear()
    first = compiled.rows_of("tpu")
    assert asked == [] and [row["T"] for row in first] == [
        program["shape"][0] for program in compiled.programs("tpu")
    ]
    rows.write_to(compiled.PATH, rows.read(compiled.PATH)[1:])
    assert compiled.rows_of("tpu") == first
    assert asked == every[:1]
    assert len(rows.read(compiled.PATH)) == len(every) - 1  # written by main alone


def test_a_changed_kernel_is_compiled_again(compiler, monkeypatch):
    asked, _ = compiler
    assert compiled.main([]) == 0
    asked.clear()
    meaning = compiled.meaning
    monkeypatch.setattr(
        compiled, "meaning", lambda path: meaning(path) + "+" * (path == FORWARD)
    )
    compiled._made_from.cache_clear()
    for target in compiled.TARGETS:
        compiled.rows_of(target)
    assert asked == [("tpu", program) for program in compiled.programs("tpu")]


def test_what_does_not_fit_is_said_and_not_recorded(compiler, capsys):
    asked, wrong = compiler
    wrong.append(compiled.programs("tpu")[0])
    assert compiled.main(["--target", "tpu"]) == 1
    assert capsys.readouterr().out.count("too large") == 1
    kept = rows.read(compiled.PATH)
    assert len(kept) == len(compiled.programs("tpu")) - 1
    assert compiled.main(["--target", "gpu"]) == 0
    assert [row for row in rows.read(compiled.PATH) if row["device"] == "tpu"] == kept
    assert compiled.main(["--target", "tpu"]) == 1
    assert [program for target, program in asked if target == "tpu"].count(
        wrong[0]
    ) == 2
