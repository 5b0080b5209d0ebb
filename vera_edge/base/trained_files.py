"""Which folder each of a model's side files is taken from: the base's, or an adapter's.

A trainer puts the tokenizer, the chat template and the generation settings that it trained with into the
adapter's folder. The model that is shipped must read text as it was trained to, so those win over the base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vera_edge.errors import CheckpointError, MismatchError
from vera_edge.storage.json_text import TABLE, parse_json, read_json, settings_json
from vera_edge.storage.side_files import (
    GENERATION,
    MODULE_FILES,
    MODULES,
    MORE_TEMPLATES,
    PROCESSORS,
    SENTENCES,
    TEMPLATE,
    TEMPLATES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    VOCABULARIES,
    SideFiles,
    find,
)

Group = Callable[[str], bool]
PLAIN = re.compile(r"[A-Za-z0-9_-]+")


def gather(base: Path, adapters: Sequence[Path] = (), tokenizer: Path | None = None) -> SideFiles:
    """The side files of a model: the base's, but for those that lie beside its adapters, or in `tokenizer`.

    What belongs together is taken together: a vocabulary with its added tokens, all chat templates, the
    modules of sentence-transformers. tokenizer: a folder whose tokenizer, templates and generation settings
    win over all others.
    Raises MismatchError when two adapters bring different ones, CheckpointError when `tokenizer` holds none.
    """
    own = find(base)
    folders = dict.fromkeys(own, base)
    written: dict[str, bytes] = {}
    if tokenizer is not None and not set(find(tokenizer)) & {*VOCABULARIES, *TEMPLATES, TOKENIZER_CONFIG}:
        raise CheckpointError(f"{tokenizer} holds no tokenizer; give a folder that one was saved in")
    for group in (_is_vocabulary, _is_config, _is_template, _is_generation, _is_processor, _is_of_sentences):
        of_text = group not in (_is_processor, _is_of_sentences)
        sources = [tokenizer] if tokenizer is not None and of_text else list(adapters)
        found = _brought(group, sources)
        if found is None:
            continue
        if group in (_is_vocabulary, _is_template, _is_of_sentences):  # the base's would contradict them
            folders = {name: folder for name, folder in folders.items() if not group(name)}
        folders |= dict.fromkeys(found[1], found[0])
    if not any(map(_is_template, folders)):
        written |= _lost_templates(folders, base)
    if (settings := _settings_of_both(folders, base)) is not None:
        written[TOKENIZER_CONFIG] = settings
    folders = _without_old_template(folders, base)
    return SideFiles(folders, written, _notes(folders, base))


def _is_vocabulary(name: str) -> bool:
    return name in TOKENIZER_FILES and name != TOKENIZER_CONFIG and name not in TEMPLATES


def _is_config(name: str) -> bool:
    return name == TOKENIZER_CONFIG


def _is_template(name: str) -> bool:
    return name in TEMPLATES or name.startswith(f"{MORE_TEMPLATES}/")


def _is_generation(name: str) -> bool:
    return name == GENERATION


def _is_processor(name: str) -> bool:
    return name in PROCESSORS


def _is_of_sentences(name: str) -> bool:
    return name in SENTENCES or name.endswith(tuple(f"/{file}" for file in MODULE_FILES))


def _brought(group: Group, sources: Iterable[Path]) -> tuple[Path, list[str]] | None:
    """The folder that brings the files of a group, and their names; None when none does.

    Raises MismatchError when two bring different ones.
    """
    found: tuple[Path, list[str]] | None = None
    for folder in sources:
        names = [name for name in find(folder) if group(name)]
        if group is _is_vocabulary and not set(names) & set(VOCABULARIES):
            continue  # tokens added to a vocabulary that isn't there
        if group is _is_of_sentences and MODULES not in names:
            continue
        if not names:
            continue
        if found is None:
            found = folder, names
        elif other := next(
            (name for name in {*names, *found[1]} if not same(found[0] / name, folder / name)), ""
        ):
            raise MismatchError(
                f"{found[0]} and {folder} bring another {other} each, and one model has one; say with "
                "--tokenizer FOLDER which to take"
            )
    return found


def same(one: Path, other: Path) -> bool:
    """Whether two files say the same: equal bytes, or equal JSON."""
    try:
        data = one.read_bytes(), other.read_bytes()
    except OSError:
        return False
    if data[0] == data[1]:
        return True
    if one.suffix != ".json":
        return False
    try:
        values = [
            parse_json(text, str(path), CheckpointError, TABLE)
            for text, path in zip(data, (one, other), strict=True)
        ]
        return bool(values[0] == values[1])
    except CheckpointError:
        return False


def _inline_template(folder: Path) -> Any:
    """The chat template in a folder's tokenizer_config.json, where older models keep it."""
    try:
        return read_json(folder / TOKENIZER_CONFIG, CheckpointError).get("chat_template")
    except CheckpointError:
        return None


def _lost_templates(folders: Mapping[str, Path], base: Path) -> dict[str, bytes]:
    """The templates in the base's tokenizer_config.json, by the files that newer models keep them in, when an
    adapter's file without one takes its place.
    """
    source = folders.get(TOKENIZER_CONFIG, base)
    if source == base or _inline_template(source) is not None:
        return {}
    found = _inline_template(base)
    entries = [{"name": "default", "template": found}] if isinstance(found, str) else found
    named = {
        entry.get("name"): entry.get("template")
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    }
    return {
        TEMPLATE if name == "default" else f"{MORE_TEMPLATES}/{name}.jinja": template.encode()
        for name, template in named.items()
        if isinstance(name, str) and PLAIN.fullmatch(name) and isinstance(template, str)
    }


def _settings_of_both(folders: Mapping[str, Path], base: Path) -> bytes | None:
    """tokenizer_config.json where it is an adapter's and the vocabulary is the base's: the base's settings
    stay, but for those that the adapter's file has.
    """
    source = folders.get(TOKENIZER_CONFIG, base)
    vocabulary = next((folders[name] for name in VOCABULARIES if name in folders), source)
    if source == base or vocabulary != base or not (base / TOKENIZER_CONFIG).is_file():
        return None
    theirs, ours = (SideFiles({TOKENIZER_CONFIG: folder}).json(TOKENIZER_CONFIG) for folder in (base, source))
    return settings_json({**theirs, **ours})


def _without_old_template(folders: Mapping[str, Path], base: Path) -> dict[str, Path]:
    """Without the base's template files, when the tokenizer_config.json of another folder has a template.

    A file would win over the one in there.
    """
    source = folders.get(TOKENIZER_CONFIG, base)
    if source == base or _inline_template(source) is None:
        return dict(folders)
    return {name: folder for name, folder in folders.items() if folder != base or not _is_template(name)}


def _notes(folders: Mapping[str, Path], base: Path) -> tuple[str, ...]:
    changed: dict[Path, list[str]] = {}
    for name, folder in folders.items():
        if folder != base and not same(folder / name, base / name):
            changed.setdefault(folder, []).append(name)
    return tuple(
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} taken from {folder.resolve().name}, not from "
        f"{base.resolve().name}"
        for folder, names in changed.items()
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
