"""Tokenizers for tests, small enough to read their ids: one token a character."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def make(
    merges: str = "",
    adds_bos: bool = False,
    adds_eos: bool = False,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    template: str | None = TEMPLATE,
) -> PreTrainedTokenizerFast:
    """One token a character, id its code point + 10, but for two-character `merges`."""
    vocab = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocab |= {chr(c): c + 10 for c in (10, *range(32, 127))}
    pairs = [(pair[0], pair[1]) for pair in merges.split()]
    vocab |= {a + b: 200 + i for i, (a, b) in enumerate(pairs)}
    model = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence([])  # pyright: ignore
    model.decoder = decoders.Fuse()  # pyright: ignore
    if adds_bos or adds_eos:
        single = ("<s> " if adds_bos else "") + "$A" + (" </s>" if adds_eos else "")
        model.post_processor = processors.TemplateProcessing(  # pyright: ignore
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=bos,
        eos_token=eos,
        unk_token="<unk>",
        chat_template=template,
    )


def ids(text: str) -> list[int]:
    """What a tokenizer without merges makes of `text`."""
    return [ord(c) + 10 for c in text]
