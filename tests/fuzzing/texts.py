"""Readers of what makes text: tokenizer files, chat templates, generation settings."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzzing import graphs
from tests.fuzzing.mutate import Form
from tests.fuzzing.target import Seed, Target
from vera_edge.base.trained_files import gather
from vera_edge.device.runtime.chat import BundleText
from vera_edge.storage.side_files import GENERATION, SideFiles, find
from vera_edge.text import tokenizer as tokenizers

TEMPLATES = Path(__file__).parents[1] / "templates"
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "pad_token": None,
    "model_max_length": 256,
    "added_tokens_decoder": {"1": {"content": "</s>", "special": True}},
    "chat_template": "{{ bos_token }}{{ messages[0].content }}",
}
MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
TOOL = {"type": "function", "name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}
WORDS = (
    "for", "in", "if", "else", "endif", "endfor", "set", "endset", "macro", "endmacro", "block", "filter",
    "loop", "range(99999)", "range(10**9)", "namespace()", "messages", "message", "content",
    "raise_exception('no')", "**", "*", "~", "|", "tojson", "join", "length", "[0]", ".__class__",
    "__globals__", "{%", "%}", "{{", "}}", "{#", "-%}", "'a'*10**9", "lipsum()", "cycler", "recursive",
    "loop(messages)", "call", "strftime_now('%Y')", "|replace('a','b')", "|center(10**8)",
    "|indent(10**8)", "|batch(1)", "'%s'|format", "self", "none", "true", "|map(attribute='x')", "|sum",
    "|sort", "|round(99)", "include 'x'", "import 'x' as y", "extends 'x'", "1/0", "|wordwrap(1)",
    "|truncate", "|urlize", "|xmlattr", "|slice(0)", "|int(base=99)", "dict(a=1)", "break",
)  # fmt: skip


@cache
def tokenizer() -> bytes:
    """A byte-level tokenizer of a few words."""
    folder = graphs.scratch() / "tokenizer"
    folder.mkdir(exist_ok=True)
    _bpe(folder / "tokenizer.json")
    return (folder / "tokenizer.json").read_bytes()


def _bpe(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["<s>", "</s>", "a", "b", "c", "Ġ", "ab", "Ġa", "H", "e", "l", "o", "x"]
    merges = [("a", "b"), ("Ġ", "a")]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges, unk_token="x"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(path))


@cache
def _tokenizers() -> list[Seed]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("a", -1.5), ("▁b", -2.0)], 0, False))
    pieces.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Metaspace()
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    words.enable_truncation(8)
    words.enable_padding(length=8)
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return [Seed(tokenizer()), *(Seed(made.to_str().encode()) for made in (pieces, words, plain))]


def _used(folder: Path) -> object:
    """What a session does with a folder's text files, on the device and where a bundle is made."""
    text = BundleText(folder)
    ids = text.tokens("a b abc é")
    _ = text.text(ids), text.special_tokens
    if text.has_template:
        text.prompt(MESSAGES)
    files = gather(folder)
    tokenizers.check(files, {}, 13, files)
    return tokenizers.ending(files, {"eos_token_id": 2})


def _file(name: str, file: str, value: object = None) -> Target:
    def prepare(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(tokenizer())
        (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))

    def read(seed: Seed, folder: Path) -> object:
        (folder / file).write_bytes(seed.data)
        return _used(folder)

    made = [Seed(json.dumps(value).encode())]
    return Target(name, Form.JSON, lambda: _tokenizers() if value is None else made, read, prepare)


def _special_map() -> Target:
    """special_tokens_map.json, which is read where tokenizer_config.json is of an older kind."""
    older = {key: value for key, value in CONFIG.items() if key != "added_tokens_decoder"}
    value = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "additional_special_tokens": ["a"]}

    def prepare(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(tokenizer())
        (folder / "tokenizer_config.json").write_text(json.dumps(older))

    def read(seed: Seed, folder: Path) -> object:
        (folder / "special_tokens_map.json").write_bytes(seed.data)
        return _used(folder)

    return Target("special-tokens", Form.JSON, lambda: [Seed(json.dumps(value).encode())], read, prepare)


def _template() -> Target:
    def prepare(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(tokenizer())

    def read(seed: Seed, folder: Path) -> object:
        (folder / "chat_template.jinja").write_bytes(seed.data)
        text = BundleText(folder)
        text.template.variables()
        return text.render(MESSAGES, {"tools": [TOOL]})

    def seeds() -> list[Seed]:
        return [Seed(path.read_bytes()) for path in sorted(TEMPLATES.glob("*.jinja"))]

    return Target("chat-template", Form.TEXT, seeds, read, prepare, WORDS)


def _vocabulary(name: str, files: dict[str, bytes], changed: str, form: Form) -> Target:
    """A vocabulary without a tokenizer.json, of which transformers makes one."""

    def prepare(folder: Path) -> None:
        for file, data in files.items():
            (folder / file).write_bytes(data)

    def read(seed: Seed, folder: Path) -> object:
        (folder / changed).write_bytes(seed.data)
        return tokenizers.read(SideFiles(dict.fromkeys(find(folder), folder)), {"model_type": "bert"})

    return Target(name, form, lambda: [Seed(files[changed])], read, prepare, ("[UNK]", "\n", "##a", "[PAD]"))


_BERT = {
    "vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n",
    "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}',
}
_GPT2 = {
    "vocab.json": b'{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}',
    "merges.txt": b"#version: 0.2\na b\n",
    "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}',
}
TARGETS = (
    _file("tokenizer", "tokenizer.json"),
    _file("tokenizer-config", "tokenizer_config.json", value=CONFIG),
    _file(
        "generation-config", GENERATION, value={"eos_token_id": [1, 2], "pad_token_id": 0, "do_sample": True}
    ),
    _special_map(),
    _template(),
)
# transformers takes its time over each of these.
SLOW = (
    _vocabulary("vocabulary-words", _BERT, "vocab.txt", Form.TEXT),
    _vocabulary("vocabulary-json", _GPT2, "vocab.json", Form.JSON),
    _vocabulary("vocabulary-merges", _GPT2, "merges.txt", Form.TEXT),
)
