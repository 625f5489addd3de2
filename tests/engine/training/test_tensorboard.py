"""TensorBoard's event files have every line's values, and never stop a run."""

import importlib
import struct
from pathlib import Path
from typing import Any

import pytest

from engine.config.dpo import DPOConfig
from engine.training.events import Generation, Record
from engine.training.listeners import own_listeners
from engine.training.tensorboard import TensorBoard

LINES: list[Any] = [
    Record(kind="train", prefix="", step=2, metrics={"step": 2, "loss": 0.75}),
    Record(
        kind="eval",
        prefix="eval_held_",
        step=2,
        metrics={"step": 2, "eval_held_rewards/margins": 0.5},
    ),
    Record(kind="train", prefix="", step=4, metrics={"step": 4, "loss": float("nan")}),
]


def events(folder: Path) -> list[Any]:
    """The events of a folder's files: a length, its checksum, the event, another."""
    kind = importlib.import_module("tensorboardX.proto.event_pb2").Event
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(kind.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def values(folder: Path) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
    }


def test_answers_are_there_as_text(tmp_path):
    listener = TensorBoard(tmp_path)
    listener.started(4, 0)
    one = Generation(prompt="Say\n*hi*", text="hi <b>", reference="no")
    listener.generated(3, [one, Generation(prompt="p", text="", reference=None)])
    (event,) = (x for x in events(tmp_path / "tensorboard") if x.summary.value)
    (value,) = event.summary.value
    assert event.step == 3 and value.metadata.plugin_data.plugin_name == "text"
    (said,) = value.tensor.string_val
    assert said.decode().split("\n\n")[:4] == [
        "**prompt**",
        "    Say\n    *hi*",
        "**policy**",
        "    hi <b>",
    ]
    assert said.decode().count("**reference**") == 1
    listener.ended(None)


def run(listener: TensorBoard, lines: list[Any], done: int = 0) -> None:
    listener.started(4, done)
    for line in lines:
        listener.recorded(line)
    listener.ended(None)


def test_every_value_is_there_as_soon_as_it_is_told(tmp_path):
    listener = TensorBoard(tmp_path)
    listener.started(4, 0)
    for line in LINES:
        listener.recorded(line)
    found = values(tmp_path / "tensorboard")
    assert found.pop(("train/loss", 4)) != 0.75  # no number
    assert found == {("train/loss", 2): 0.75, ("eval_held/rewards/margins", 2): 0.5}
    listener.ended(None)


def test_a_run_that_goes_on_hides_what_it_repeats(tmp_path):
    run(TensorBoard(tmp_path), LINES)
    run(TensorBoard(tmp_path), LINES[:1], done=2)
    starts = [x.step for x in events(tmp_path / "tensorboard") if x.session_log.status]
    assert starts == [3] and len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_an_earlier_run_is_kept_apart(tmp_path):
    run(TensorBoard(tmp_path), LINES)
    run(TensorBoard(tmp_path), LINES[:1])
    assert len(values(tmp_path / "tensorboard")) == 1
    assert len(values(tmp_path / "tensorboard.1")) == 3


@pytest.mark.parametrize("place", ["start", "line", "end"])
def test_what_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog, place):
    writers = importlib.import_module("tensorboardX.event_file_writer")

    name = {"start": "__init__", "line": "write_event", "end": "close"}[place]
    close = writers.EventsWriter.close

    def full(writer, *_):
        if place == "end":
            close(writer)
        raise OSError(28, "No space left on device")

    listener = TensorBoard(tmp_path)
    if place != "start":
        listener.started(4, 0)
    monkeypatch.setattr(writers.EventsWriter, name, full)
    if place == "start":
        listener.started(4, 0)
    for line in LINES:
        listener.recorded(line)
    listener.ended(None)
    (said,) = caplog.messages
    assert "No space left on device; training goes on without TensorBoard" in said


def test_it_is_on_unless_it_is_turned_off(tmp_path):
    for wanted in (True, False):
        arguments = DPOConfig(save_directory=str(tmp_path), use_tensorboard=wanted)
        kinds = [type(listener) for listener in own_listeners(arguments)]
        assert (TensorBoard in kinds) == wanted
    assert DPOConfig().use_tensorboard
