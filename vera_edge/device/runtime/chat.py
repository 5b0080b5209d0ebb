"""Messages to text, text to tokens, and tokens back to text in whole characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from vera_edge.arrays import Tokens
from vera_edge.device.runtime import template
from vera_edge.device.runtime.template import ChatTemplate, Message
from vera_edge.errors import BundleError, DataError
from vera_edge.storage import tokenizer_json
from vera_edge.storage.json_text import read_json

_BROKEN = "�"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class BundleText:
    """A bundle's tokenizer and chat template. Safe from several threads at once.

    special: text of the special tokens by name. longest: tokens that the tokenizer is meant for, if it says.
    """

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json, tokenizer_config.json and the chat templates; the last two may be missing."""
        path = folder / "tokenizer.json"
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise BundleError(f"{path} is missing; export the bundle again") from None
        except (OSError, ValueError):
            raise BundleError(f"{path} can't be read as UTF-8 text; copy the bundle again") from None
        self.tokenizer = tokenizer_json.parse(text, path, BundleError, "copy the bundle again")
        self._failing = f"{path} can't be used", BundleError, "export the bundle again"
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, BundleError) if config_path.exists() else {}
        self.special = _special_tokens(folder, config)
        longest = config.get("model_max_length")
        self.longest: int | None = longest if type(longest) is int else None
        self.template = ChatTemplate(template.read(folder, config), self.special)

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self.template.sources)

    def render(self, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None) -> str:
        """The prompt for `messages`, up to where the assistant's answer begins; see ChatTemplate.render.

        Raises BundleError when there is no template or it fails, DataError when it refuses these messages.
        """
        if not self.has_template:
            raise BundleError(
                "this model has no chat template; give it plain text (on the command line: --raw)"
            )
        return self.template.render(messages, arguments)

    def tokens(self, text: str, special: bool = True) -> Tokens:
        """Token ids (n,) of `text`; `special` adds what the tokenizer puts around a plain text."""
        try:
            with tokenizer_json.told(*self._failing):
                return np.array(self.tokenizer.encode(text, add_special_tokens=special).ids, np.int64)
        except (UnicodeEncodeError, TypeError):  # tokenizers has one in some versions, one in others
            raise DataError("the text holds half of a surrogate pair, which isn't a character") from None

    def prompt(
        self,
        prompt: str | Sequence[Message],
        raw: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """Token ids (n,) of a prompt: messages, or a string as the user's message, or as it is when `raw`.

        arguments: of the chat template (`ChatTemplate.render`). Raises DataError when nothing is left to
        feed, or when an argument would have no effect.
        """
        if raw and isinstance(prompt, str):
            if arguments:
                name = next(iter(arguments))
                raise DataError(f"{name} is for a chat template, and this prompt goes without one")
            tokens = self.tokens(prompt)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = self.render(messages, arguments)
            if arguments and (unread := self.template.unread(arguments)):
                known = ", ".join(self.template.variables()) or "none"
                raise DataError(f"the chat template doesn't read {unread!r}; it reads: {known}")
            tokens = self.tokens(text, special=False)
        if not len(tokens):
            raise DataError("the prompt is empty; give the model something to continue")
        return tokens

    def text(self, tokens: Sequence[int] | Tokens, special: bool = False) -> str:
        """The text of `tokens`, with special tokens only when `special`."""
        ids = [int(token) for token in tokens]
        with tokenizer_json.told(*self._failing):
            return str(self.tokenizer.decode(ids, skip_special_tokens=not special))

    def batch(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoding]:
        """Each text, or pair of texts, as the tokenizer gives it, with what it puts around it.

        Raises DataError for what isn't text.
        """
        try:
            with tokenizer_json.told(*self._failing):
                return self.tokenizer.encode_batch(texts)
        except (UnicodeEncodeError, TypeError):
            raise DataError("a text isn't a string, or holds half of a surrogate pair") from None

    @cached_property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that `text` leaves out, by id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}


class TextStream:
    """Tokens in, text out, as soon as the characters are whole: never half of a UTF-8 sequence.

    All pieces and `flush()` together are the text of all tokens.
    """

    def __init__(self, text: BundleText) -> None:
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


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> Mapping[str, str]:
    """The texts of the special tokens by name: the config's, in older folders special_tokens_map.json's."""
    path = folder / "special_tokens_map.json"
    older = "added_tokens_decoder" not in config and path.is_file()
    given = {**config, **read_json(path, BundleError)} if older else config
    return {name: text for name in _SPECIAL if (text := _content(given.get(name))) is not None}


def _content(token: Any) -> str | None:
    """A special token's text; tokenizer_config.json has it plain or as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
