"""A GGUF bundle opened in llama.cpp: its model, and the adapter that runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vera_edge.arrays import Float32, Tokens
from vera_edge.bundle import contents as bundle
from vera_edge.bundle.contents import Manifest
from vera_edge.device.llama.runner import LlamaRunner


@dataclass(frozen=True)
class LlamaBundle:
    """An open bundle. `swap` changes the adapter for what comes afterwards; the weights aren't touched."""

    manifest: Manifest
    runner: LlamaRunner

    @classmethod
    def open(cls, folder: Path, adapter: str | None = "default", threads: int | None = None) -> LlamaBundle:
        """Verify the bundle in `folder` and open it; adapter: as for `swap`.

        Raises BundleError when it is damaged or llama.cpp can't load it, MismatchError when it has no such
        adapter, TargetError without llama-cpp-python.
        """
        manifest = bundle.verify(folder)
        lora = _file(manifest, adapter)
        return cls(manifest, LlamaRunner(manifest.path(manifest.model), lora, threads=threads))

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

    def swap(self, adapter: str | None) -> None:
        """Change the adapter: "default", a name of the bundle, None for the base alone.

        Raises MismatchError when the bundle has no such adapter, BundleError when llama.cpp can't take it.
        """
        self.runner.swap(_file(self.manifest, adapter))

    def logits(self, tokens: Tokens) -> Float32:
        """See `LlamaRunner.logits`."""
        return self.runner.logits(tokens)

    def parts(self, tokens: Tokens, prompt: int) -> Iterator[tuple[int, Float32]]:
        """See `LlamaRunner.parts`."""
        return self.runner.parts(tokens, prompt)

    def greedy(self, tokens: Tokens, count: int) -> list[int]:
        """See `LlamaRunner.greedy`."""
        return self.runner.greedy(tokens, count)

    def ends_text(self, token: int) -> bool:
        """See `LlamaRunner.ends_text`."""
        return self.runner.ends_text(token)


def _file(manifest: Manifest, adapter: str | None) -> Path | None:
    """The LoRA file of an adapter; None where none runs beside the model's file."""
    name = manifest.adapter_named(adapter)
    return None if name is None else manifest.path(manifest.adapters[name]["file"])
