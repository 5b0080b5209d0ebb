"""Messages to text, text to tokens, and tokens back to text in whole characters.

The chat template comes with the bundle and is code in a small language: it runs in jinja2's sandbox, with the
environment that transformers gives it, so that a template renders the same string in both.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from vera_edge.errors import BundleError, DataError
from vera_edge.files import read_json

Tokens = npt.NDArray[np.int64]
Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
_BROKEN = "�"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Text:
    """A bundle's tokenizer and chat template. Safe from several threads at once.

    special: text of the special tokens by name. longest: tokens that the tokenizer is meant for, if it says.
    """

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja; the last two may be missing."""
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        except FileNotFoundError:
            raise BundleError(f"{path} is missing; export the bundle again") from None
        except Exception as cause:  # tokenizers raises bare Exception
            raise BundleError(f"{path} isn't a tokenizer ({cause}); copy the bundle again") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, BundleError) if config_path.exists() else {}
        self.special = {name: text for name in _SPECIAL if (text := _content(config.get(name))) is not None}
        longest = config.get("model_max_length")
        self.longest: int | None = longest if type(longest) is int else None
        self._source = _template_source(folder, config)
        self._template: jinja2.Template | None = None

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return self._source is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for `messages`, up to where the assistant's answer begins.

        Raises BundleError when there is no template or it fails, DataError when it refuses these messages.
        """
        if self._source is None:
            raise BundleError(
                "this model has no chat template; give it plain text (on the command line: --raw)"
            )
        try:
            if self._template is None:
                self._template = _environment().from_string(self._source)
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self.special)
        except _RefusedError as cause:
            raise DataError(f"the chat template refuses these messages: {cause}") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as cause:
            raise BundleError(f"the chat template fails ({cause}); export the bundle again") from None

    def tokens(self, text: str, special: bool = True) -> Tokens:
        """Token ids (n,) of `text`; `special` adds what the tokenizer puts around a plain text."""
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=special).ids, np.int64)
        except (UnicodeEncodeError, TypeError):  # tokenizers has one in some versions, one in others
            raise DataError("the text holds half of a surrogate pair, which isn't a character") from None

    def prompt(self, prompt: str | Sequence[Message], raw: bool = False) -> Tokens:
        """Token ids (n,) of a prompt: messages, or a string as the user's message, or as it is when `raw`.

        Raises DataError when nothing is left to feed.
        """
        if raw and isinstance(prompt, str):
            tokens = self.tokens(prompt)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            tokens = self.tokens(self.render(messages), special=False)
        if not len(tokens):
            raise DataError("the prompt is empty; give the model something to continue")
        return tokens

    def text(self, tokens: Sequence[int] | Tokens, special: bool = False) -> str:
        """The text of `tokens`, with special tokens only when `special`."""
        return str(self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=not special))

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that `text` leaves out, by id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}


class TextStream:
    """Tokens in, text out, as soon as the characters are whole: never half of a UTF-8 sequence.

    All pieces and `flush()` together are the text of all tokens.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        # Decoded again at each step: some decoders look at the token before (spaces, for one). Both
        # stay short, for `push` drops what has been shown.
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Add a token; the characters that are now complete, perhaps none."""
        self._waiting.append(token)
        text = self._new_text()
        # A replacement character at the end may be the beginning of a sequence whose rest comes next.
        if not text or text.endswith(_BROKEN):
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is left once the last token is in; an incomplete sequence shows as U+FFFD."""
        return self._show(self._new_text()) if self._waiting else ""

    def _new_text(self) -> str:
        before = self._text.text(self._shown)
        return self._text.text(self._shown + self._waiting)[len(before) :]

    def _show(self, text: str) -> str:
        self._shown, self._waiting = self._waiting, []
        return text


class _RefusedError(jinja2.TemplateError):
    """What a template's raise_exception raises."""


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's words for training and renders as its body."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # a set in jinja2, never changed

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise _RefusedError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or the template within tokenizer_config.json as older models have it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, ValueError):
            raise BundleError(f"{path} can't be read as UTF-8 text; copy the bundle again") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: Any) -> str | None:
    """A special token's text; tokenizer_config.json has it plain or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
