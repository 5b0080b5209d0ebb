"""The recipe: one TOML file that says which bases, adapters and variants a release is made of.

Read into frozen models and checked as a whole before any work starts: a typo in the last line of the file
is reported in the first second, with the key it stands in.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import Field, ValidationError, model_validator

from vera_edge.base.trained_as import TrainedAs, parse
from vera_edge.bundle.signing import Signer, Trust
from vera_edge.errors import PlanError
from vera_edge.exporting import target
from vera_edge.releasing.adapter_entry import AdapterEntry
from vera_edge.releasing.names import Id, Line, RecipeTable
from vera_edge.releasing.variant import Variant
from vera_edge.text import windows
from vera_edge.text.mixture import Mixture


class ReleaseTable(RecipeTable):
    """[release]: what the release is called; `golden`: whether bundles carry vectors to validate by."""

    name: Id
    version: Line = Field(default="0.1.0", max_length=64)
    golden: bool = True


class Base(RecipeTable):
    """[[base]]: a model's Hugging Face folder; `licence` is an SPDX expression, for the SBOM.

    trained_as: how it was loaded when the adapters were trained, in the words of `--trained-as`; for a folder
    of floats.
    """

    id: Id
    path: Line
    licence: Line | None = None
    trained_as: Line | None = None

    @model_validator(mode="after")
    def _loadable(self) -> Base:
        try:
            _ = self.spec
        except PlanError as cause:
            raise ValueError(f"has a trained_as that can't be read: {cause}") from None
        return self

    @property
    def spec(self) -> TrainedAs | None:
        """What `trained_as` says."""
        return None if self.trained_as is None else parse(self.trained_as)


class LimitsEntry(RecipeTable):
    """[limits]: the text that drift is measured on, and what may not be exceeded. Units as in `drift`.

    Which limits there are depends on what a model gives; tokens and window are for those that give text.
    """

    data: Line = windows.BUILT_IN
    max_kl: float | None = Field(default=None, ge=0, strict=False)
    min_top1: float | None = Field(default=None, ge=0, le=1, strict=False)
    min_retained: float | None = Field(default=None, le=1, strict=False)
    min_cosine: float | None = Field(default=None, le=1, strict=False)
    min_overlap: float | None = Field(default=None, ge=0, le=1, strict=False)
    min_rank_correlation: float | None = Field(default=None, le=1, strict=False)
    max_relative_error: float | None = Field(default=None, ge=0, strict=False)
    max_largest_error: float | None = Field(default=None, ge=0, strict=False)
    tokens: int = Field(default=4096, ge=64)
    window: int = Field(default=256, ge=16)

    @property
    def bounds(self) -> dict[str, float | None]:
        """Every limit by its name, None where it isn't given."""
        names = (name for name in type(self).model_fields if name.startswith(("max_", "min_")))
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _holds_a_window(self) -> LimitsEntry:
        if self.window > self.tokens:
            raise ValueError(f"has a window of {self.window} tokens and measures {self.tokens}; take more")
        return self


class Signing(RecipeTable):
    """[sign]: the key (PEM) that bundles are signed with, or the identity that a CI job signs by.

    certificate: the key's (PEM). chain: those between it and its issuer's. public_key: that, or the issuer's
    certificate, to tell an old signature from a good one. identity, issuer: as `--trusted-identity`.
    """

    key: Line | None = None
    public_key: Line | None = None
    certificate: Line | None = None
    chain: tuple[Line, ...] = Field(default=(), strict=False)
    identity: Line | None = None
    issuer: Line | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Signing:
        if (self.identity is None) != (self.issuer is None) or (self.key is None) == (self.identity is None):
            raise ValueError("needs a key, or identity and issuer")
        beside = ("public_key", "certificate", "chain") if self.key is None else ()
        if given := [name for name in beside if getattr(self, name)]:
            raise ValueError(f"has {given[0]}, which belongs to a key, and no key")
        return self


class RecipeFile(RecipeTable):
    """A recipe as written: paths are still relative to the file's folder."""

    release: ReleaseTable
    base: tuple[Base, ...] = Field(min_length=1, strict=False)
    adapter: tuple[AdapterEntry, ...] = Field(min_length=1, strict=False)
    variant: tuple[Variant, ...] = Field(min_length=1, strict=False)
    limits: LimitsEntry = LimitsEntry()
    sign: Signing | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe, and the folder its paths start from.

    confined: whether a path that leaves the folder is refused, as where a stranger wrote the recipe. Links in
    the folder are of whoever gave it.
    """

    file: RecipeFile
    folder: Path
    confined: bool = False

    def path(self, relative: str) -> Path:
        """A path of the recipe, absolute.

        Raises PlanError when it starts from the home of nobody, or leaves the folder and mustn't.
        """
        if self.confined and leaves(relative):
            raise PlanError(f"{relative!r} leads out of {self.folder}; the recipe was changed")
        try:
            return (self.folder / Path(relative).expanduser()).absolute()
        except RuntimeError:
            raise PlanError(f"{relative} starts from a home folder that isn't there; write it out") from None

    def text(self, name: str) -> str:
        """A text of the recipe, as `windows.read_text` takes it."""
        return name if name == windows.BUILT_IN else str(self.path(name))

    def mixture(self, texts: str | tuple[str, ...]) -> Mixture:
        """What is calibrated on, as `Rounding` takes it: texts of the recipe, with built-in text."""
        return Mixture.of(texts, self.text)

    @property
    def signer(self) -> Signer | None:
        """What [sign] says to sign with."""
        asked = self.file.sign
        if asked is None:
            return None
        key, certificate = (
            None if name is None else self.path(name) for name in (asked.key, asked.certificate)
        )
        return Signer(key, certificate, tuple(self.path(name) for name in asked.chain))

    @property
    def trust(self) -> Trust:
        """Which signatures are those that [sign] asks for; any, where it doesn't say how to tell."""
        asked = self.file.sign
        if asked is None:
            return Trust()
        if asked.identity is not None and asked.issuer is not None:
            return Trust(required=True, identity=(asked.identity, asked.issuer))
        keys = None if asked.public_key is None else self.path(asked.public_key)
        return Trust(keys, required=keys is not None)

    def base(self, identifier: str) -> Base:
        """The [[base]] called `identifier`."""
        return next(base for base in self.file.base if base.id == identifier)

    @property
    def jobs(self) -> tuple[tuple[AdapterEntry, Variant], ...]:
        """Every bundle to make, in the order of the recipe: adapters of one base and variant together."""
        return tuple(
            (adapter, variant)
            for base in self.file.base
            for variant in self.file.variant
            for adapter in self.file.adapter
            if adapter.base == base.id and (variant.adapters is None or adapter.id in variant.adapters)
        )


def leaves(relative: str) -> bool:
    """Whether a path leads out of the folder that it starts from, on any system, but for links."""
    ways = (PurePosixPath(relative), PureWindowsPath(relative))
    return relative.startswith("~") or any(".." in way.parts or way.anchor for way in ways)


def read(path: Path) -> Recipe:
    """Read and check a recipe. Raises PlanError with one sentence that names the key at fault."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path} is missing; give the recipe's TOML file") from None
    except OSError as cause:
        raise PlanError(f"{path} can't be read: {cause.strerror}") from None
    except (ValueError, RecursionError) as cause:
        raise PlanError(f"{path} isn't valid TOML: {cause}") from None
    try:
        file = RecipeFile.model_validate(document)
    except ValidationError as cause:
        raise PlanError(f"{path}: {_first_fault(cause)}") from None
    _check_references(path, file)
    return Recipe(file, path.absolute().parent)


def _first_fault(error: ValidationError) -> str:
    fault: Any = error.errors()[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
    said = fault["msg"].removeprefix("Value error, ")
    what = {
        "missing": "is missing",
        "extra_forbidden": "isn't a key of a recipe; check its spelling",
        "value_error": said,
    }.get(fault["type"], said[:1].lower() + said[1:])
    return f"{key} {what}" if key else what


def _check_references(path: Path, file: RecipeFile) -> None:
    bases, adapters = [base.id for base in file.base], [adapter.id for adapter in file.adapter]
    names = [variant.name for variant in file.variant]
    for kind, values in (("base", bases), ("adapter", adapters), ("variant", names)):
        folders = [value.lower() for value in values]  # as some file systems see them
        if twice := next((value for value in values if folders.count(value.lower()) > 1), None):
            raise PlanError(f"{path}: {kind} {twice!r} stands twice; ids must differ, and not by case only")
    for adapter in file.adapter:
        if adapter.base not in bases:
            raise PlanError(f"{path}: adapter {adapter.id!r} names base {adapter.base!r}, which isn't there")
    for variant in file.variant:
        if variant.target not in (*target.names(), *target.OLD_NAMES):
            raise PlanError(
                f"{path}: variant {variant.name!r} is for {variant.target!r}, which isn't a target here; "
                f"choose from {', '.join(target.names())}"
            )
        if missing := next((one for one in variant.adapters or () if one not in adapters), None):
            raise PlanError(f"{path}: variant {variant.name!r} names adapter {missing!r}, which isn't there")
