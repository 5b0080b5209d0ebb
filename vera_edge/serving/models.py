"""Model names: each adapter of the bundle, the base, the bundle itself, and adapters that come and go."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_edge.bundle import contents, signing
from vera_edge.bundle.signing import Signature, Trust
from vera_edge.device.runtime.adapters import Vectors
from vera_edge.device.runtime.opened import AdapterChoice, Opened
from vera_edge.errors import BundleError, MismatchError
from vera_edge.serving.refusal import RefusedRequestError
from vera_edge.storage.files import sha256_file

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_ADDED = 256  # adapters; each holds its vectors in memory
_KEPT = 32  # vectors of the bundle's own adapters that stay in memory; reading them again takes a millisecond


@dataclass(frozen=True)
class ModelName:
    """One name that a request may ask for. choice: the adapter in the bundle, None for the base.

    vectors: of an adapter that was added, which is read once. signed_by: who signed it, in words.
    """

    name: str
    choice: AdapterChoice
    created: int
    vectors: Vectors | None = None
    signed_by: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's model object."""
        signed = {} if self.signed_by is None else {"signed_by": self.signed_by}
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vera-edge"} | signed


class Models:
    """The names of one open bundle. Changed from one thread; vectors may be asked for from several."""

    def __init__(self, opened: Opened, name: str) -> None:
        """name: what the bundle is called, for the adapter that it runs by itself.

        Raises MismatchError when one of its adapters is called as the base is.
        """
        self._opened, self._created = opened, int(time.time())
        self._names: dict[str, ModelName] = {}
        self._kept: OrderedDict[AdapterChoice, Vectors] = OrderedDict()
        if opened.manifest.mode == "branch":
            if BASE in opened.manifest.adapters:
                raise MismatchError(
                    f"{opened.manifest.folder} has an adapter that is called {BASE}, which is how one asks "
                    "for the base alone; pack it under another name"
                )
            for adapter in opened.manifest.adapters:
                self._names[adapter] = ModelName(adapter, adapter, self._created)
            self._names[BASE] = ModelName(BASE, None, self._created)
        self._names.setdefault(name, ModelName(name, "default", self._created))
        self._own = frozenset(self._names)

    def __iter__(self) -> Any:
        return iter(list(self._names.values()))

    def get(self, name: str) -> ModelName:
        """The model of this name; raises RefusedRequestError (404) when there is none."""
        if (found := self._names.get(name)) is None:
            raise RefusedRequestError(
                404,
                f"there is no model {name!r} here, only: {', '.join(sorted(self._names)[:20])}",
                "model",
                "model_not_found",
            )
        return found

    def vectors(self, model: ModelName) -> Vectors:
        """What the graph takes for a model; read when it's first asked for, and kept for a while.

        The same object for the same adapter, so that rows can tell that they run the same one. Raises
        AdapterError or MismatchError when the file can't be used.
        """
        if model.vectors is not None:
            return model.vectors
        choice = self._opened.manifest.default_adapter if model.choice == "default" else model.choice
        if choice == self._opened.adapter and self._opened.manifest.mode == "branch":
            return self._opened.vectors  # which may live in the graph
        if (kept := self._kept.get(choice)) is None:
            kept = self._opened.vectors_of(choice if self._opened.manifest.mode == "branch" else "default")
            self._kept[choice] = kept
        while len(self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        return kept

    def add(self, name: str, path: Path, trust: Trust) -> ModelName:
        """Add an adapter: an .onnx_adapter file, or a folder that holds one (a bundle's own default).

        Raises RefusedRequestError (400 or 409) for the name, BundleError for the signature, AdapterError or
        MismatchError when the file isn't for this bundle.
        """
        if self._opened.manifest.mode != "branch":
            raise RefusedRequestError(400, "the adapter is merged into this bundle and can't be changed")
        if not _NAME.fullmatch(name):
            raise RefusedRequestError(400, "name must be letters, digits, dots, dashes", "name")
        if name in self._names:
            raise RefusedRequestError(409, f"there is a model {name!r} already", "name", "already_exists")
        if len(self._names) - len(self._own) >= _MOST_ADDED:
            raise RefusedRequestError(400, f"{_MOST_ADDED} adapters were added already; remove some")
        file, signature = _checked(path, trust)
        vectors = self._opened.vectors_of(file)
        by = None if signature is None else signature.by
        self._names[name] = ModelName(name, file, int(time.time()), vectors, by)
        return self._names[name]

    def remove(self, name: str) -> None:
        """Forget an adapter that was added; what it answers now goes on. Raises RefusedRequestError (404,
        or 400 for one of the bundle)."""
        self.get(name)
        if name in self._own:
            raise RefusedRequestError(
                400, f"{name!r} belongs to the bundle; only what was added can go", "model"
            )
        del self._names[name]


def _checked(path: Path, trust: Trust) -> tuple[Path, Signature | None]:
    """The adapter's file in `path`, and its signature, held to `trust` as `install` holds a bundle's."""
    if not path.is_dir():
        if trust.required:
            raise BundleError(f"{path.name} is a lone file, which carries no signature; give a signed folder")
        return path, None
    signature = signing.check(path, trust)
    if (path / contents.MANIFEST).exists():
        manifest = contents.read(path)
        if manifest.default_adapter is None:
            raise BundleError(f"{path.name} is a bundle without an adapter; give one with a side-branch")
        name = manifest.adapters[manifest.default_adapter]["file"]
        file = manifest.path(name)
        if not file.is_file() or sha256_file(file) != manifest.files[name].sha256:
            raise BundleError(f"{path.name}/{name} isn't what its manifest lists; copy it again")
        return file, signature
    files = sorted(path.glob("*.onnx_adapter"))
    if len(files) != 1:
        raise BundleError(f"{path.name} holds {len(files)} .onnx_adapter files; give a folder with one")
    return files[0], signature


def within(folder: Path, name: str) -> Path:
    """The path `name` in `folder`, where links lead too; raises RefusedRequestError (400) elsewhere."""
    try:
        path, root = (folder / name).resolve(strict=True), folder.resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise RefusedRequestError(
            400, f"there is no {name!r} among the adapters that can be added", "path"
        ) from None
    if path == root or not path.is_relative_to(root):
        raise RefusedRequestError(400, f"{name!r} isn't among the adapters that can be added", "path")
    return path
