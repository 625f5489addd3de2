import pytest

from engine.data.pairs import tokenize_pairs
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def tokenize(rows, tokenizer):
    return tokenize_pairs(rows, tokenizer, max_length=100)


def messages(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


OK = {"prompt": "p", "chosen": "c", "rejected": "r"}
CHAT = {"chosen": messages("p", "c"), "rejected": messages("p", "r")}
BAD_ROWS = {
    "number": ({**OK, "prompt": 3}, "'prompt', is 3 (a int); it must be text or a"),
    "null": ({**OK, "rejected": None}, "'rejected', is null; it must be text or"),
    "missing": ({"prompt": "p", "chosen": "c"}, "has no 'rejected', only 'prompt'"),
    "kinds": ({**OK, "chosen": messages("a")}, "is text, but chosen is a list of"),
    "prompt kind": ({**OK, "prompt": messages("a")}, "'prompt', is a list of messages"),
    "other prompt": ({**CHAT, "prompt": "x"}, "is text that is no message of what"),
    "no messages": ({**CHAT, "prompt": []}, "'prompt', is an empty list; give at"),
    "strings": ({**CHAT, "chosen": ["a"]}, "message 0, is text; a message is"),
    "sharegpt": (
        {**CHAT, "chosen": [{"from": "bot", "value": "a"}]},
        "message 0, is from 'bot'; that must be one of human, gpt, system, function_",
    ),
    "no content": ({**CHAT, "chosen": [{"role": "user"}]}, "0, has no 'content'"),
    "role": (
        {**CHAT, "chosen": [{"role": 1, "content": "a"}]},
        "message 0, has the role 1; a message is",
    ),
    "image": (
        {**CHAT, "chosen": [{"role": "user", "content": [{"type": "image"}]}]},
        "(images and sound are not read)",
    ),
    "unshared": (
        {"chosen": messages("p", "c"), "rejected": messages("q", "c")},
        "'chosen' and 'rejected', do not start with the same messages",
    ),
    "tools": ({**CHAT, "tools": "{"}, "field 'tools', is not JSON (Expecting"),
    "nested tools": ({**CHAT, "tools": "[" * 100_000}, "field 'tools', is not JSON"),
    "bytes": ({**OK, "chosen": b"c"}, "'chosen', is bytes (b'c'); it must be text"),
    "token ids": (
        {**OK, "chosen": [5, 6]},
        "'chosen', is a list of numbers, as token ids are; it must be text",
    ),
    "refused arguments": (
        {**CHAT, "chat_template_kwargs": {"tokenize": True}},
        "field 'chat_template_kwargs', has 'tokenize', which says how the template is",
    ),
    "tools kind": ({**CHAT, "tools": 3}, "field 'tools', is 3 (a int); give a list"),
    "arguments": ({**CHAT, "chat_template_kwargs": "x"}, "is text; give a mapping"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_in_one_line(name):
    row, message = BAD_ROWS[name]
    with pytest.raises(InputError) as caught:
        tokenize([OK, CHAT, row], make())
    said = str(caught.value)
    assert said.startswith("the data set, row 2 (counting from 0), ")
    assert message in said and "\n" not in said and len(said) < 400


def test_messages_need_a_chat_template():
    with pytest.raises(InputError, match="row 1 .* the tokenizer has no chat template"):
        tokenize([OK, CHAT], make(template=None))
    assert len(tokenize([OK], make(template=None))) == 1


def test_plain_text_needs_eos():
    with pytest.raises(InputError, match="row 1 .* plain text.* no eos_token"):
        tokenize([CHAT, OK], make(eos=None))
    assert len(tokenize([CHAT], make(eos=None))) == 1


def test_what_the_template_refuses_is_named():
    template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(InputError, match=r"refuses it \(roles must alternate\)"):
        tokenize([CHAT], make(template=template))
