"""A conversation with a bundle: what was said so far, the adapter that answers, and what /commands do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vera_edge.bundle.contents import NO_ADAPTER
from vera_edge.device.runtime.opened import named
from vera_edge.device.runtime.session import Session
from vera_edge.device.runtime.template import Message
from vera_edge.errors import BundleError, DataError

HELP = """\
/adapter         list the adapters
/adapter NAME    answer with this one from now on; none is the base alone, a path an .onnx_adapter file
/system TEXT     say how to answer; without a text nothing is said
/reset           forget what was said
/help            show this
/quit            leave
A line that begins with two slashes is said with one."""


class Conversation:
    """What a person and a model say to each other, rendered with the bundle's chat template at each turn.

    messages: what was said, as templates take it. ended: whether /quit came.

    Example:
        >>> talk = vera_edge.chat("bundle", system="Be brief.", max_tokens=4)
        >>> answer = "".join(talk.take("Hello")) + "".join(talk.take("/adapter none"))
        >>> [message["role"] for message in talk.messages], talk.session.adapter
        (['system', 'user', 'assistant'], None)
    """

    def __init__(self, session: Session, system: str | None = None, **options: Any) -> None:
        """`options` of Session.generate. Raises BundleError when the bundle has no chat template."""
        if not session.text.has_template:
            raise BundleError(
                f"{session.manifest.folder} has no chat template, so nothing says who speaks; continue texts "
                "with `vera-edge run --raw`"
            )
        self.session, self.system, self.ended = session, system, False
        self.forgotten = 0  # messages that no longer fit
        self._said: list[Message] = []
        self._options = options

    @property
    def messages(self) -> list[Message]:
        """What was said, the system message first where there is one."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self._said

    def take(self, line: str) -> Iterator[str]:
        """What comes of a line: pieces of the answer, or what a command (`HELP`) has to tell.

        Raises as `say`; MismatchError or AdapterError when an adapter can't be used: the old one stays.
        """
        if not line.startswith("/"):
            yield from self.say(line)
        elif line.startswith("//"):
            yield from self.say(line[1:])
        else:
            word, _, rest = line[1:].partition(" ")
            yield self._command(word, rest.strip())

    def say(self, text: str) -> Iterator[str]:
        """Say `text` to the model; the pieces of its answer as they come.

        The answer is kept as far as it came when the iterator is closed early, and nothing where it hadn't
        begun. Where the context ends, what was said first is forgotten. Raises DataError when `text` alone
        is too long, or the template refuses it.
        """
        if not text.strip():
            return
        before = list(self._said)
        self._said.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            for piece in self._answer():
                answer.append(piece)
                yield piece
        finally:
            if answer:
                self._said.append({"role": "assistant", "content": "".join(answer)})
            else:
                self._said = before

    def reset(self) -> None:
        """Forget what was said; system message and adapter stay."""
        self._said, self.forgotten = [], 0

    def _answer(self) -> Iterator[str]:
        context = self.session.decoder.context
        wanted = min(int(self._options.get("max_tokens", 256)), context // 4)
        while True:
            tokens = self.session.text.prompt(self.messages, arguments=self._arguments())
            if len(tokens) + wanted <= context or len(self._said) < 3:
                break
            del self._said[:2]
            self.forgotten += 2
        if len(tokens) >= context:
            raise DataError(f"that makes {len(tokens)} tokens, and the model reads {context}; say less")
        options = {name: value for name, value in self._options.items() if name != "template_args"}
        yield from self.session.generate(tokens, **options)

    def _arguments(self) -> dict[str, Any]:
        return dict(self._options.get("template_args") or {})

    def _command(self, word: str, rest: str) -> str:
        if word == "adapter":
            return self._adapter(rest)
        if word == "system":
            self.system = rest or None
            return "the system message is set" if rest else "there is no system message now"
        if word == "reset":
            self.reset()
            return "what was said is forgotten"
        if word == "quit":
            self.ended = True
            return ""
        if word == "help":
            return HELP
        raise DataError(f"there is no command /{word}; /help lists those there are")

    def _adapter(self, name: str) -> str:
        if name:
            self.session.swap(named(name, self.session.manifest), resident=self.session.resident)
            return f"adapter: {self._running()}"
        manifest = self.session.manifest
        if manifest.mode == "merged":
            return "the adapter is merged into this bundle"
        names = [*manifest.adapters, NO_ADAPTER]
        running = self._running()
        return "\n".join(f"{'*' if each == running else ' '} {each}" for each in names)

    def _running(self) -> str:
        """What answers now, as /adapter takes it."""
        return NO_ADAPTER if self.session.adapter is None else str(self.session.adapter)
