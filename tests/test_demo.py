"""The demo's bundled files are what its script makes, and load as anybody's would."""

import importlib.util
import json
from pathlib import Path

from engine import load_model
from engine.config.run import load_run_config
from engine.models.tokenizer import load_tokenizer
from tests.json_lines import read_lines

DEMO = Path(__file__).parent.parent / "examples" / "demo"


def test_the_pairs_are_those_of_the_script():
    spec = importlib.util.spec_from_file_location("corpus", DEMO / "corpus.py")
    assert spec is not None and spec.loader is not None
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    train, heldout = corpus.preference_pairs(0)
    assert read_lines(DEMO / "train.jsonl") == train
    assert read_lines(DEMO / "heldout.jsonl") == heldout
    prompts = [{json.dumps(row["prompt"]) for row in rows} for rows in (train, heldout)]
    assert not prompts[0] & prompts[1]  # held out is held out


def test_the_model_its_tokenizer_and_the_run_load():
    model = load_model(DEMO / "model")
    tokenizer = load_tokenizer(str(DEMO / "model"))
    assert len(tokenizer) <= model.config.vocab_size
    run = load_run_config(DEMO / "demo.yaml")
    assert run.actions == ("train",) and run.eval_mixture is not None
