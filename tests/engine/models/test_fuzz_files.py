"""Files of models that somebody has spoilt end in a model, or in one clear line."""

import json
import shutil
import struct
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models import check_checkpoint
from engine.models.adapter_files import read_adapter_config
from engine.models.rope import inverse_frequencies
from engine.models.tensors import open_checkpoint
from engine.models.tokenizer import load_tokenizer
from tests.engine.checkpoints import FAMILIES, FIXTURES
from tests.engine.fuzzing import JSON, NUMBERS, examples, mutated, one_line_or_success

TRL = FIXTURES.parent / "trl" / "text" / "model"


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


CONFIGS = [content(FIXTURES / family / "config.json") for family in FAMILIES]
# As other versions and other models have them, so that more than defaults is reached.
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {"rope_parameters": SCALING | {"rope_theta": 1e4}}
MORE = {
    "rope_scaling": SCALING,
    "rope_theta": 1e4,
    "sliding_window": 4,
    "layer_types": ["full_attention"] * 3,
    "head_dim": 8,
    "eos_token_id": [1, 2],
    "torch_dtype": "float32",
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "m",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": False,
    "rank_pattern": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with its tokenizer; each test writes one file of it anew."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(TRL, folder)
    return folder


def spoilt(folder: Path, name: str, data: bytes) -> Path:
    for path in TRL.iterdir():
        shutil.copyfile(path, folder / path.name)
    (folder / name).write_bytes(data)
    return folder


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@given(st.sampled_from(CONFIGS).flatmap(lambda x: mutated(x | MORE)))
@examples(50)
def test_fuzz_config_json(folder, tree):
    path = spoilt(folder, "config.json", dumped(tree))
    found = one_line_or_success(check_checkpoint, path)
    if isinstance(found, str):
        assert found.startswith(str(folder))


def checked(path: Path) -> bool:
    """A model that passes has tables that can be computed."""
    config = check_checkpoint(path)
    tables = [inverse_frequencies(rope, config.head_dim) for rope in config.ropes]
    return all(np.isfinite(table).all() for table in tables)


@given(mutated(content(TRL / "config.json") | LLAMA3, JSON | NUMBERS))
@examples(50)
def test_fuzz_the_config_of_weights_that_are_there(folder, tree):
    path = spoilt(folder, "config.json", dumped(tree))
    found = one_line_or_success(checked, path)
    assert found is True or str(found).startswith(str(folder))


WHOLE = (TRL / "model.safetensors").read_bytes()
(_SIZE,) = struct.unpack("<Q", WHOLE[:8])
HEADER: dict[str, Any] = json.loads(WHOLE[8 : 8 + _SIZE])


@st.composite
def weights(draw: st.DrawFn) -> bytes:
    """A safetensors file with another header, or with other bytes in it."""
    if draw(st.booleans()):
        text = dumped(draw(mutated(HEADER, JSON | NUMBERS)))
        size = draw(st.sampled_from([len(text)] * 4 + [0, len(text) - 1, 2**62]))
        data = struct.pack("<Q", size) + text + WHOLE[8 + _SIZE :]
    else:
        at = draw(st.integers(0, 8 + _SIZE))
        data = WHOLE[:at] + draw(st.binary(max_size=2)) + WHOLE[at:]
    if draw(st.integers(0, 3)) == 0:
        data = data[: draw(st.integers(0, len(data)))]
    return data


def read_all(path: Path) -> int:
    """Every tensor's every element."""
    with ExitStack() as stack:
        _, reader = open_checkpoint(path, stack)
        return sum(
            reader.read(name, tuple(slice(0, n) for n in shape)).size
            for name, shape in reader.shapes().items()
        )


@given(weights())
@examples(50)
def test_fuzz_safetensors(folder, data):
    found = one_line_or_success(read_all, spoilt(folder, "model.safetensors", data))
    if isinstance(found, str):
        assert found.startswith(str(folder))


@pytest.fixture(scope="module")
def model():
    return check_checkpoint(TRL)


@given(mutated(ADAPTER))
@examples(50)
def test_fuzz_adapter_config_json(folder, model, tree):
    (folder / "adapter_config.json").write_bytes(dumped(tree))
    found = one_line_or_success(read_adapter_config, folder, model)
    (folder / "adapter_config.json").unlink()
    assert not isinstance(found, str) or found.startswith(str(folder))


TOKENIZER = content(TRL / "tokenizer.json")
SETTINGS = content(TRL / "tokenizer_config.json")


@given(
    st.one_of(
        mutated(TOKENIZER).map(lambda tree: ("tokenizer.json", tree)),
        mutated(SETTINGS).map(lambda tree: ("tokenizer_config.json", tree)),
        mutated({"eos_token": {"content": "</s>"}, "pad_token": "x"}).map(
            lambda tree: ("special_tokens_map.json", tree)
        ),
        mutated({"<x>": 500}).map(lambda tree: ("added_tokens.json", tree)),
    )
)
@examples(20)
def test_fuzz_tokenizers(folder, spoil):
    name, tree = spoil
    path = spoilt(folder, name, dumped(tree))
    found = one_line_or_success(load_tokenizer, path)
    for other in ("special_tokens_map.json", "added_tokens.json"):
        (path / other).unlink(missing_ok=True)
    assert not isinstance(found, str) or str(folder) in found
