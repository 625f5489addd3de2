"""Models, references, adapters and machines that are refused, and what is said."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np

from tests.engine.refusals import (
    MODEL,
    Case,
    both,
    edit,
    remove,
    rename,
    tensors,
    write,
)


def shrink(found):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            found[name] = found[name][:100]


def as_bytes(found):
    found["model.norm.weight"] = found["model.norm.weight"].astype(np.int8)


def adapter(weights: str):
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    return both(
        write("adapter/adapter_config.json", json.dumps(values)),
        write(f"adapter/{weights}", b""),
    )


def with_other_vocabulary():
    shutil.copytree("model", "other")
    models = MODEL.parents[2] / "models" / "llama"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models / name, Path("other", name))


def only_an_index():
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    Path("model/model.safetensors").unlink()
    write("model/model.safetensors.index.json", json.dumps(index))()


WEIGHTS = "model/model.safetensors"
CONFIG_JSON = "model/config.json"
MODELS = {
    "a missing tensor": Case(
        "model: tensors do not match config.json (llama): missing: model.norm.weight",
        tensors(lambda found: found.pop("model.norm.weight")),
    ),
    "a tensor of another shape": Case(
        "model: tensors do not match config.json (llama): mis-shaped: model.norm.weight"
        " is (1,), not (",
        tensors(lambda x: x.update({"model.norm.weight": np.ones(1, np.float32)})),
    ),
    "a tensor too many": Case(
        "model: tensors do not match config.json (llama): extra: own",
        tensors(lambda x: x.update(own=np.ones(1, np.float32))),
    ),
    "quantised tensors": Case(
        "model: tensor 'model.norm.weight' is I8; allowed: ", tensors(as_bytes)
    ),
    "no bytes at all": Case(f"{WEIGHTS}: empty; fetch it again", write(WEIGHTS, "")),
    "a file cut off": Case(
        f"{WEIGHTS}: not a whole safetensors file (",
        lambda: Path(WEIGHTS).write_bytes(Path(WEIGHTS).read_bytes()[:-1]),
    ),
    "a pointer of Git LFS": Case(
        f"{WEIGHTS}: a Git LFS pointer, not the weights",
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
    ),
    "a missing shard": Case(
        f"{WEIGHTS}.index.json: 1 of its 1 files are missing", only_an_index
    ),
    "pickled weights": Case(
        "model: no model.safetensors or model.safetensors.index.json; "
        "pytorch_model.bin is pickled weights, which run code when they are read",
        both(remove(WEIGHTS), write("model/pytorch_model.bin", pickle.dumps({}))),
    ),
    "a pickled adapter": Case(
        "adapter: no adapter_model.safetensors; adapter_model.bin is pickled",
        adapter("adapter_model.bin"),
        lora={"adapter": "adapter"},
    ),
    "an adapter that is empty": Case(
        "adapter/adapter_model.safetensors: empty; fetch it again",
        adapter("adapter_model.safetensors"),
        lora={"adapter": "adapter"},
    ),
    "an adapter for a model": Case(
        "adapter: holds a LoRA (PEFT) adapter of None, not a whole model; give",
        adapter("adapter_model.safetensors"),
        model={"name_or_path": "adapter"},
    ),
    "an unknown architecture": Case(
        "model: config.json: model_type 'mixtral' is not supported; allowed: llama, ",
        edit(CONFIG_JSON, model_type="mixtral"),
    ),
    "code that comes along": Case(
        "model: config.json: model_type 'own' is not supported; ...auto_map names code "
        "that comes with it, which is never run",
        both(
            edit(CONFIG_JSON, model_type="own", auto_map={"AutoConfig": "own.Own"}),
            write("model/own.py", "open('ran', 'w')"),
        ),
    ),
    "another kind of head": Case(
        "model: config.json: architectures=['LlamaForSequenceClassification'] is not",
        edit(CONFIG_JSON, architectures=["LlamaForSequenceClassification"]),
    ),
    "a quantised model": Case(
        "model: config.json: quantization_config={'bits': 4} is not supported",
        edit(CONFIG_JSON, quantization_config={"bits": 4}),
    ),
    "a wrong value": Case(
        "model: config.json: hidden_size='x' must be an integer above 0",
        edit(CONFIG_JSON, hidden_size="x"),
    ),
    "a number beyond float32": Case(
        "model: config.json: rms_norm_eps=1e+300 must be a finite number above 0, from "
        "1e-12 to 1e+15",
        edit(CONFIG_JSON, rms_norm_eps=1e300),
    ),
    "a base of rope beyond float32": Case(
        "model: config.json: rope rope_theta=1e+300 must be a finite number above 0",
        edit(CONFIG_JSON, rope_parameters={"rope_theta": 1e300}),
    ),
    "a broken config.json": Case(f"{CONFIG_JSON}: not JSON (", write(CONFIG_JSON, "{")),
    "no config.json": Case(f"{CONFIG_JSON}: missing", remove(CONFIG_JSON)),
    "a hub that cannot be reached": Case(
        "model 'nobody/model': there is no such directory, and downloading it from the "
        "hub failed: ",
        model={"name_or_path": "nobody/model"},
    ),
    "a tokenizer larger than the embedding": Case(
        "the model's vocab_size=100 is smaller than the tokenizer's 432 tokens",
        both(edit(CONFIG_JSON, vocab_size=100), tensors(shrink)),
    ),
    "a reference of another vocabulary": Case(
        "reference_model...vocabulary",
        with_other_vocabulary,
        reference_model={"name_or_path": "other"},
    ),
    "no reference": Case(
        "model './other': there is no such directory",
        reference_model={"name_or_path": "./other"},
    ),
    "a damaged tokenizer": Case(
        "model/tokenizer.json: tokenizers ...cannot read it",
        write("model/tokenizer.json", "{}"),
    ),
    "a tokenizer with code": Case(
        "model/tokenizer_config.json: auto_map names code that comes with the ",
        both(
            edit(
                "model/tokenizer_config.json",
                tokenizer_class="Own",
                auto_map={"AutoTokenizer": ["own.Own", None]},
            ),
            write("model/own.py", "open('ran', 'w')"),
            rename("model/tokenizer.json", "model/vocab.json"),
        ),
    ),
}

MACHINE = {
    "a file where a folder is to be": Case(
        "save_directory='pairs.jsonl' is a file; give another",
        trainer={"save_directory": "pairs.jsonl"},
    ),
    "a file in the way": Case(
        "save_directory='pairs.jsonl/out' cannot be made, as ...pairs.jsonl' is a file",
        trainer={"save_directory": "pairs.jsonl/out"},
    ),
    "the model's own folder": Case(
        "save_directory='model' is the directory of model.name_or_path='model'",
        trainer={"save_directory": "model"},
    ),
    "somebody else's model": Case(
        "save_directory='other' has model.safetensors, ...which this program did not ",
        lambda: shutil.copytree("model", "other"),
        trainer={"save_directory": "other"},
    ),
    "fewer devices than the mesh": Case(
        "sharding: data=16, fsdp=1, tensor=1 does not fit 8 devices; the product must",
        sharding={"data": 16, "fsdp": 1},
    ),
    "kernels of another machine": Case(
        "...mosaic_gpu",
        trainer={"implementation": "mosaic_gpu"},
    ),
    "memory that nothing fits in": Case(
        "...workspace_bytes=1000...give at least", trainer={"workspace_bytes": 1000}
    ),
}
