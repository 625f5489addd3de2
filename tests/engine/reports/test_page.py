"""`dpo report`: the page has the files' values, is whole, and needs no network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from engine.cli import main
from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.reports.charts import charts
from engine.reports.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    short,
    thinned,
    ticks,
)
from engine.reports.page import page
from engine.reports.runs import Points, read_run
from engine.training.records import RunRecord
from tests.json_lines import read_lines

RECORDED = Path(__file__).parents[2] / "fixtures" / "report"
VOID = {"meta", "br"}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


class Strict(HTMLParser):
    """Collects texts by element, and refuses what does not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.paths: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.loaded += [values[x] for x in ("src", "href") if x in values]
        if tag == "path":
            self.paths.append(values["d"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def runs(tmp_path):
    """Two recorded runs, with the configurations of two learning rates."""
    for name, rate in (("a", 1e-4), ("b", 1e-3)):
        folder = tmp_path / name
        shutil.copytree(RECORDED / name, folder)
        config = {"trainer": DPOConfig(learning_rate=rate, beta=0.5)}
        RunRecord(folder, config, {"model": "a small one"}).started(84, 0)
    return tmp_path / "a", tmp_path / "b"


def values(text: str) -> dict:
    found = re.search(r'id="values">(.*?)</script>', text)
    assert found is not None
    return json.loads(found[1])


def test_what_is_drawn_is_what_the_file_has(runs):
    lines = read_lines(runs[0] / "metrics.jsonl")
    assert main(["report", str(runs[0])]) == 0
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    parsed = Strict(text)
    assert parsed.loaded == [] and "url(" not in text and "@import" not in text
    assert "http:" not in text and "https:" not in text
    drawn = list(charts([read_run(runs[0])]))
    titles = [chart.title for chart in drawn]
    assert titles[:3] == ["Loss", "Margin", "Accuracy"] and len(titles) == 13
    assert len(parsed.paths) == sum(len(chart.series) for chart in drawn)
    paths = iter(parsed.paths)
    metrics = {"Loss": "loss", "Gradient norm": "grad_norm"}
    for i, chart in enumerate(drawn):
        (low, high), (bottom, top) = chart.span(0), chart.span(1)
        # As they are drawn: what is marked comes last.
        for series in sorted(chart.series, key=lambda s: s.marked):
            d = next(paths)
            points = [tuple(map(float, x.split(","))) for x in re.split("[ML]", d)[1:]]
            assert len(points) == len(series.points)
            for (x, y), (step, value) in zip(points, series.points, strict=True):
                wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
                assert low + (x - LEFT) / wide * (high - low) == pytest.approx(
                    step, abs=0.06 * (high - low) / wide
                )
                assert value is not None
                assert bottom + (HEIGHT - BOTTOM - y) / tall * (
                    top - bottom
                ) == pytest.approx(value, abs=0.06 * (top - bottom) / tall)
        if chart.title in metrics:
            name = metrics[chart.title]
            shown = values(text)["charts"][str(i)]["series"]
            for series, key in zip(shown, (name, f"eval_{name}"), strict=False):
                expected = [[x["step"], x[key]] for x in lines if key in x]
                assert series["points"] == expected and len(expected) >= 5


def test_runs_are_compared(runs, tmp_path):
    out = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "--output", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    parsed = Strict(text)
    before, after = text.split("Where the runs differ:")[1].split("<details>")[:2]
    assert "trainer.learning_rate" in before and "trainer.beta" not in before
    assert "0.0001</td>" in before and "0.001</td>" in before
    assert "trainer.beta" in after
    labels = {s["label"] for s in values(text)["charts"]["0"]["series"]}
    assert labels == {f"{run} {of}" for run in runs for of in ("train", "eval")}
    assert parsed.of("h1") == [", ".join(map(str, runs))]
    assert parsed.of("dd") == ["a small one"] * 2


def test_only_what_is_not_at_its_default_is_shown_at_once(runs):
    assert main(["report", str(runs[0])]) == 0
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    shown, rest = text.split("What is not at its default:")[1].split("<details>")[:2]
    assert "trainer.learning_rate" in shown and "trainer.beta" in shown
    assert "trainer.seed" not in shown and "trainer.seed" in rest


def test_a_run_that_goes_on_or_went_wrong(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 0.7}\n{"step": 2, "loss": null}\n'
        '{"step": 3, "loss": 0.5}\n{"step": 4, "lo'
    )
    run = read_run(tmp_path)
    assert run.points("loss") == [(1, 0.7), (2, None), (3, 0.5)]
    text = page([run], {})
    parsed = Strict(text)
    assert any("line 4 of metrics.jsonl is incomplete" in x for x in parsed.of("p"))
    assert any("no run.json" in x for x in parsed.of("p"))
    assert parsed.paths[0].count("M") == 2  # a gap where nothing was finite


def test_generations_stand_under_their_prompt(runs):
    lines = [
        {"step": 0, "prompt": "Say <hi>", "text": "no"},
        {"step": 84, "prompt": "Say <hi>", "text": "hi & ho"},
    ]
    path = runs[0] / "generations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parsed = Strict(page([read_run(runs[0])], {}))
    assert parsed.of("b") == ["Say <hi>"]
    assert parsed.of("span")[-2:] == ["step 0:", "step 84:"]
    texts = [x.strip() for x in parsed.of("p")]
    assert texts.index("no") < texts.index("hi & ho")
    path.write_text('{"step": 0, "prompt": "x"}\n')
    with pytest.raises(InputError, match="line 1 must have `step`, `prompt` and"):
        read_run(runs[0])


def test_names_are_text_only(tmp_path):
    folder = tmp_path / "<script>alert(1)<" / "script>"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    (folder / "run.json").write_text('{"facts": {"model": "</script><b>x"}}')
    text = page([read_run(folder), read_run(folder)], {})
    assert Strict(text).of("b") == [] and text.count("<script") == 2


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "there is no such file (no run has begun there)"),
        ("", "it has no line yet"),
        ('{"step": 1}\nnot json\n', "line 2 is not JSON"),
        ('{"loss": 1}\n', "line 1 is no line of metrics, which has a `step`"),
        ('{"step": 1, "loss": "x"}\n', "line 1: loss='x' must be a number or null"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, text, said):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_bad_words_are_one_line(runs, capsys):
    assert main(["report", str(runs[0]), str(runs[0])]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["report", str(runs[0]), "--output", "no/such/page.html"]) == 2
    assert "give another place with --output" in capsys.readouterr().err
    (runs[0] / "run.json").write_text("[]")
    assert main(["report", str(runs[0])]) == 2
    assert "run.json is no record of a run" in capsys.readouterr().err


def test_long_curves_keep_their_extremes():
    points: Points = [(i, float((i * 7919) % 10007)) for i in range(20000)]
    points[7000], points[7001] = (7000, 1e6), (7001, -1e6)
    points[9000] = (9000, None)
    kept = thinned(points, 600)
    assert len(kept) <= 610 and set(kept) <= set(points)
    assert {(7000, 1e6), (7001, -1e6), (9000, None)} <= set(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert kept == sorted(kept)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (0.25, "0.25"), (2.5e-4, "2.5e-4"), (1e-6, "1e-6"), (-10.0, "-10"),
     (12345, "12.35k"), (2e6, "2M"), (3e10, "3e10"), (1e-10, "1e-10")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short(value) == text


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.9, 3.1, 5) == pytest.approx([0, 1, 2, 3])
    assert ticks(4, 84, 5) == pytest.approx([20, 40, 60, 80])


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_shows_values_at_the_pointer(runs, tmp_path):
    assert CHROMIUM is not None
    assert main(["report", str(runs[0])]) == 0
    text = (runs[0] / "report.html").read_text(encoding="utf-8")
    event = """<script>
    const at = document.querySelector("svg").getBoundingClientRect();
    document.querySelector("svg").dispatchEvent(new PointerEvent(
      "pointermove", {clientX: at.right - 5, clientY: at.top + 20}));
    </script></body>"""
    driven = tmp_path / "driven.html"
    driven.write_text(text.replace("</body>", event), encoding="utf-8")
    words = "--headless --no-sandbox --disable-gpu --window-size=390,800 --dump-dom"
    done = subprocess.run(
        [CHROMIUM, *words.split(), f"--user-data-dir={tmp_path / 'chrome'}",
         driven.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    last = read_lines(runs[0] / "metrics.jsonl")[-1]
    assert f"<div>step {last['step']}</div>" in done.stdout
    assert f"<div>eval: {last['eval_loss']:.5g}</div>" in done.stdout
