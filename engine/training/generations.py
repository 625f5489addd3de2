"""What policy and reference answer to some held-out prompts, at each evaluation."""

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from engine.data.pair_tokens import PairTokens
from engine.errors import stage
from engine.models import Decoder
from engine.models.generate import Generator
from engine.training.events import Generation, Listener
from engine.training.prepare import EVAL, Prepared

logger = logging.getLogger(__name__)

FILE_NAME = "generations.jsonl"


class Answers:
    """The answers of a run's models to the first distinct prompts of each held-out set.

    Args:
        reference: answers now, once: then it may go. None: there is none to ask.
    """

    def __init__(self, run: Prepared, reference: Decoder | None):
        arguments = run.arguments
        self._tokenizer: Any = run.tokenizer
        prompts = [
            (prefix, ids)
            for prefix, pairs in run.evaluations.items()
            for ids in first_prompts(pairs, arguments.generation_num_prompts)
        ]
        self._sets = [prefix.removeprefix(EVAL).rstrip("_") for prefix, _ in prompts]
        self._prompts = [self._text(ids) for _, ids in prompts]
        self._generator = Generator(
            [ids.tolist() for _, ids in prompts],
            arguments.generation_max_new_tokens,
            ends_of(run.tokenizer, run.evaluations.values()),
            temperature=arguments.generation_temperature,
            seed=arguments.seed,
        )
        self._references = None if reference is None else self._texts(reference)

    def compile(self, model: Decoder) -> None:
        """Be ready for a model that answers during the run."""
        self._generator.compile(model)

    def __call__(
        self, policy: Decoder, reference: Decoder | None = None
    ) -> list[Generation]:
        """What the policy answers now, and a reference that has changed since."""
        references = self._references
        if reference is not None:
            references = self._texts(reference)
        return [
            Generation(
                set_name=name,
                prompt=prompt,
                text=text,
                reference=None if references is None else references[i],
            )
            for i, (name, prompt, text) in enumerate(
                zip(self._sets, self._prompts, self._texts(policy), strict=True)
            )
        ]

    def _texts(self, model: Decoder) -> list[str]:
        return [self._text(ids) for ids in self._generator(model)]

    def _text(self, ids: Any) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()


def ask(
    run: Prepared, model: Decoder, reference_model: Decoder | None
) -> Answers | None:
    """The answers of a run that has not begun, or None where it asks for none.

    Args:
        model: as it is before training: the reference, where no other is given.
    """
    arguments = run.arguments
    if not arguments.generation_num_prompts or not run.evaluations:
        return None
    reference = model if reference_model is None else reference_model
    if arguments.without_reference or run.has_values:
        reference = None
    answers = Answers(run, reference)
    answers.compile(model)
    return answers


def first_prompts(pairs: PairTokens, count: int) -> list[np.ndarray]:
    """The tokens of the first distinct prompts of a set, at most so many."""
    found: dict[bytes, np.ndarray] = {}
    for sequence in range(0, 2 * len(pairs), 2):
        if len(found) == count:
            break
        start = pairs.offsets[sequence]
        prompt = pairs.tokens[start : start + pairs.completion_start[sequence]]
        found.setdefault(prompt.tobytes(), prompt)
    return list(found.values())


def ends_of(
    tokenizer: PreTrainedTokenizerBase, sets: Collection[PairTokens]
) -> set[int]:
    """The tokens that end an answer: EOS, and what the sets' own answers end with.

    That is their last special token: a chat template's end of a turn.
    """
    eos: Any = tokenizer.eos_token_id
    ends: set[int] = set() if eos is None else {eos}
    special = np.asarray(tokenizer.all_special_ids, np.int64)
    for pairs in sets:
        for sequence in range(0, 2 * len(pairs), 2):
            begin, end = pairs.offsets[sequence : sequence + 2]
            answer = pairs.tokens[begin + pairs.completion_start[sequence] : end]
            found = answer[np.isin(answer, special)]
            if len(found):
                ends.add(int(found[-1]))
    return ends


class GenerationsFile(Listener):
    """`generations.jsonl` in the save directory: a line for each prompt and evaluation.

    Of a run that goes on, lines behind the step that it goes on from are taken back. An
    earlier run's file is kept as `generations.1.jsonl` and so on.
    """

    def __init__(self, directory: Path):
        self.path = directory / FILE_NAME

    def started(self, total_steps: int, done: int) -> None:
        """Make room, or cut the file back."""
        with self._written():
            if not self.path.exists():
                return
            if not done:
                number = 1
                while os.path.lexists(old := self.path.with_suffix(f".{number}.jsonl")):
                    number += 1
                os.rename(self.path, old)
                return
            text = self.path.read_text(encoding="utf-8")
            kept = [line for line in text.splitlines() if _is_until(line, done)]
            part = self.path.with_name(f".{FILE_NAME}.part")
            part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(part, self.path)

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """Append the lines."""
        with self._written(), self.path.open("a", encoding="utf-8") as file:
            for line in generations:
                file.write(json.dumps(_record(step, line), ensure_ascii=False) + "\n")

    def _written(self) -> Any:
        return stage(f"{self.path} cannot be written", "see save_directory")


def _record(step: int, generation: Generation) -> Mapping[str, Any]:
    record = {"step": step, "prompt": generation.prompt, "text": generation.text}
    if generation.set_name:
        record["set"] = generation.set_name
    if generation.reference is not None:
        record["reference"] = generation.reference
    return record


def _is_until(line: str, step: int) -> bool:
    """Whether it is a whole line, of that step or one before."""
    try:
        found = json.loads(line)
    except ValueError:  # cut off as it was written
        return False
    return isinstance(found, dict) and found.get("step", step + 1) <= step


def excerpt(generations: Sequence[Generation], width: int = 60) -> str:
    """The first answer in a line of the log, beside the reference's.

    Of a long prompt its end: it begins with what all prompts begin with.
    """
    first = generations[0]
    prompt, texts = " ".join(first.prompt.split()), {"policy": first.text}
    if first.reference is not None:
        texts["reference"] = first.reference
    if len(prompt) > width:
        prompt = f"... {prompt[4 - width :].lstrip()}"
    said = [f"{name} {_quoted(text, width)}" for name, text in texts.items()]
    return ", ".join([f"prompt {json.dumps(prompt, ensure_ascii=False)}", *said])


def _quoted(text: str, width: int) -> str:
    words = " ".join(text.split())
    cut = words if len(words) <= width else f"{words[: width - 4].rstrip()} ..."
    return json.dumps(cut, ensure_ascii=False)
