"""Answers to held-out prompts at each evaluation: whose, to what, and where they go."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from engine import DPOConfig, LoraConfig, load_model
from engine.errors import InputError
from engine.models.generate import greedy_generate
from engine.reports.page import page
from engine.reports.runs import read_run
from engine.training.events import Generation
from engine.training.generations import (
    GenerationsFile,
    ends_of,
    excerpt,
    first_prompts,
)
from engine.training.prepare import prepare_pairs
from tests.engine.training.runs import (
    FIXTURE,
    SHORT,
    compilations,
    make_trainer,
    one_device,
)
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

TOKENS = 6
SETTINGS: dict[str, Any] = {
    "train_dataset": SHORT,
    "num_train_epochs": 1,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "eval_steps": 1,
    "eval_on_start": True,
    "generation_num_prompts": 2,
    "generation_max_new_tokens": TOKENS,
}
TOKENIZER: Any = AutoTokenizer.from_pretrained(FIXTURE / "model")
# Rows 1 and 3 of these have the prompt of those before them.
TWICE = [row for row in SHORT[:2] for _ in range(2)]


def answers(model: Any, rows: list[dict] = SHORT[:2]) -> list[str]:
    """What is likeliest, worked out anew."""
    pairs = prepare_pairs(DPOConfig(), rows, TOKENIZER)
    prompts = [ids.tolist() for ids in first_prompts(pairs, 2)]
    found = greedy_generate(model, prompts, TOKENS, TOKENIZER.eos_token_id)
    return [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in found]


def before() -> list[str]:
    return answers(load_model(FIXTURE / "model", mesh=one_device(), dtype="float32"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to its end, its trainer, and what was compiled while it went on."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(directory, **SETTINGS, save_steps=1, save_total_limit=None)
    with compilations() as names:
        trainer.train()
    return directory, trainer, names


def test_policy_and_reference_at_each_evaluation(whole):
    directory, trainer, names = whole
    lines = read_lines(directory / "generations.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [line["reference"] for line in lines] == before() * 4
    assert [line["text"] for line in lines[:2]] == before()
    after = answers(trainer.model)
    assert [line["text"] for line in lines[-2:]] == after != before()
    assert lines[0]["prompt"] in SHORT[0]["prompt"]
    assert "_continue" not in names  # it was compiled before


def test_a_run_goes_on_without_a_line_twice(whole, tmp_path):
    directory, _, _ = whole
    name = "step-00000001"
    shutil.copytree(directory / "checkpoints" / name, tmp_path / "checkpoints" / name)
    for file in ("metrics.jsonl", "generations.jsonl"):
        shutil.copy(directory / file, tmp_path)
    make_trainer(tmp_path, **SETTINGS).train()
    files = [folder / "generations.jsonl" for folder in (directory, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_report_has_a_reference_once(whole):
    directory, _, _ = whole
    text = page([read_run(directory)], {})
    assert text.count("reference:</span>") == 2
    for line in read_lines(directory / "generations.jsonl"):
        assert f"step {line['step']}:" in text


def test_of_an_adapter_the_reference_is_its_base_on_any_mesh(tmp_path):
    settings = SETTINGS | {"max_training_steps": 1, "eval_steps": None}
    lora = LoraConfig(r=2, lora_alpha=64)
    trainer = make_trainer(tmp_path, **settings, lora=lora, sizes=(1, 2, 1))
    trainer.train()
    lines = read_lines(tmp_path / "generations.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 1, 1]
    assert [line["reference"] for line in lines] == before() * 2
    assert [line["text"] for line in lines[:2]] == before()
    assert [line["text"] for line in lines[2:]] == answers(trainer.model) != before()


def test_a_reference_that_moves_answers_each_time(tmp_path):
    settings = SETTINGS | {"eval_on_start": False, "max_training_steps": 2}
    settings |= {"sync_ref_model": True, "ref_model_sync_steps": 1}
    settings |= {"ref_model_mixup_alpha": 1.0}  # it is the policy then
    make_trainer(tmp_path, **settings).train()
    lines = read_lines(tmp_path / "generations.jsonl")
    assert [line["text"] for line in lines] == [line["reference"] for line in lines]
    assert [line["text"] for line in lines[:2]] != before()


def test_a_reference_that_is_scored_ahead_has_answered(tmp_path):
    trainer = make_trainer(tmp_path, **SETTINGS, precompute_ref_log_probs=True)
    assert trainer._answers is not None
    assert [x.reference for x in trainer._answers(trainer.model)] == before()


def test_without_a_reference_the_policy_answers_alone(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **SETTINGS, reference_free=True)
    assert trainer._answers is not None
    found = trainer._answers(trainer.model)
    assert [x.reference for x in found] == [None, None]
    assert [x.text for x in found] == before()


def test_sets_have_names_and_prompts_come_once(tmp_path):
    sets = {"near": TWICE, "far": SHORT[2:4]}
    trainer = make_trainer(tmp_path, **SETTINGS, eval_dataset=sets)
    assert trainer._answers is not None
    found = trainer._answers(trainer.model)
    assert [x.set_name for x in found] == ["near", "near", "far", "far"]
    assert [x.text for x in found[:2]] == before()


def test_what_is_drawn_is_the_same_again(tmp_path):
    texts = []
    for seed, heat in ((1, 1.0), (1, 1.0), (2, 1.0), (1, 1e-4)):
        trainer = make_trainer(
            tmp_path, **SETTINGS, seed=seed, generation_temperature=heat
        )
        assert trainer._answers is not None
        found = trainer._answers(trainer.model)
        assert [x.text for x in found] == [x.reference for x in found]
        texts.append([x.text for x in found])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] != texts[3] == before()


def test_an_answer_ends_as_those_of_the_data():
    pairs = prepare_pairs(DPOConfig(), SHORT, TOKENIZER)
    assert ends_of(TOKENIZER, [pairs]) == {TOKENIZER.eos_token_id}
    # The last special token of a completion: BOS, in this one.
    tokens = pairs.tokens.copy()
    tokens[pairs.offsets[1] - 2 : pairs.offsets[1]] = TOKENIZER.bos_token_id, 9
    changed = dataclasses.replace(pairs, tokens=tokens)
    assert ends_of(TOKENIZER, [changed]) == {
        TOKENIZER.eos_token_id,
        TOKENIZER.bos_token_id,
    }


def test_prompts_are_those_of_the_first_rows():
    pairs = prepare_pairs(DPOConfig(), TWICE, TOKENIZER)
    found = first_prompts(pairs, 3)
    assert len(pairs) == 4 and len(found) == 2
    start = int(pairs.completion_start[4])
    first = int(pairs.offsets[4])
    np.testing.assert_array_equal(found[1], pairs.tokens[first : first + start])


LINE = {"prompt": "p", "text": "t"}


def test_the_file_keeps_what_is_of_the_run(tmp_path, caplog):
    path = tmp_path / "generations.jsonl"
    old = "".join(json.dumps({"step": step} | LINE) + "\n" for step in (0, 2, 4))
    path.write_text(old + '{"step": 4, "pro')  # killed as it wrote
    file = GenerationsFile(tmp_path)
    file.started(9, 2)
    file.generated(3, [Generation(prompt="é", text="t", reference=None)])
    assert [line["step"] for line in read_lines(path)] == [0, 2, 3]
    assert read_lines(path)[-1] == {"step": 3, "prompt": "é", "text": "t"}
    file.started(9, 0)
    assert not path.exists()
    assert len(read_lines(tmp_path / "generations.1.jsonl")) == 3
    file.started(9, 0)
    assert [x.name for x in tmp_path.iterdir()] == ["generations.1.jsonl"]


def test_the_log_has_one_of_them(tmp_path, caplog):
    long = Generation(prompt='say\n"a"', text="word " * 30, reference="")
    words = excerpt([long, long])
    assert words.startswith('prompt "say \\"a\\"", policy "word word')
    assert words.endswith('w ...", reference ""') and len(words) < 120
    other = Generation(prompt="word " * 30 + "asked?", text="", reference=None)
    words = excerpt([other])
    assert words.startswith('prompt "... ') and words.endswith(' asked?", policy ""')
    assert len(words) < 85
    trainer = make_trainer(tmp_path, **SETTINGS, max_training_steps=1)
    with caplog.at_level(logging.INFO, "engine"):
        trainer.train()
    heard = [x for x in caplog.messages if x.startswith("step 1: prompt ")]
    assert len(heard) == 1
    said = "of policy and reference to 2 held-out prompts, at most 6 tokens, the li"
    assert said in caplog.text and "generations.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"generation_num_prompts": -1},
            "generation_num_prompts=-1 must be at least 0",
        ),
        ({"generation_num_prompts": 2000}, "must be at least 0 and below 1025"),
        ({"generation_max_new_tokens": 9}, "no effect without generation_num_prompts"),
        ({"generation_temperature": 0.5}, "no effect without generation_num_prompts"),
        (
            {"generation_num_prompts": 1, "generation_temperature": -1},
            "generation_temperature=-1.0 must be at least 0",
        ),
        (
            {"generation_num_prompts": 1, "generation_max_new_tokens": 0},
            "generation_max_new_tokens=0 must be greater than 0",
        ),
    ],
)
def test_options_without_sense(options, said):
    with pytest.raises(InputError, match=said):
        DPOConfig(**options)


def test_prompts_need_held_out_pairs(tmp_path: Path):
    with pytest.raises(InputError, match="generation_num_prompts=1 has no effect with"):
        make_trainer(tmp_path, evaluate=False, generation_num_prompts=1)
