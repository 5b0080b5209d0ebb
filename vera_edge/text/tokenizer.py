"""A model's tokenizer as the tokenizers package reads it, made of an older vocabulary where it must be.

Devices read tokenizer.json alone. transformers makes one of vocab.txt, of vocab.json with merges.txt, and of
a sentencepiece model; what it makes of the last is held to sentencepiece's own pieces, since for some model
types it leaves out the space that begins a text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers

from vera_edge.errors import CheckpointError
from vera_edge.quiet import first_line, quiet
from vera_edge.storage import tokenizer_json
from vera_edge.storage.json_text import TABLE, parse_json, settings_json
from vera_edge.storage.side_files import GENERATION, TOKENIZER_CONFIG, VOCABULARIES, SideFiles

FAST = "tokenizer.json"
_PLAIN = (
    "tokenizer.model"  # whose ids are sentencepiece's own; others are shifted, or have tokens around a text
)
_SENTENCEPIECE = (
    _PLAIN,
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
)
# Words alone: what a model makes of other characters is its own affair.
_SAMPLE = "The weights of a layer keep their bytes and the adapter adds what it learned"
_SHOWN = 60
# Writing a tokenizer.json takes memory for every id up to the highest. Vocabularies have some 300,000.
_HIGHEST_ID = 1 << 24


def read(files: SideFiles, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a model of this `config`, for text of any length.

    Raises CheckpointError when there is none, or none that can be read or made.
    """
    tokenizer = _parsed(with_fast(files, config))
    # What the file was saved with (a maximum length, padding) is about training batches, not about text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def with_fast(files: SideFiles, config: Mapping[str, Any]) -> SideFiles:
    """`files` with a tokenizer.json, made of another vocabulary where there's no such file.

    Raises CheckpointError when there's no vocabulary, or none that transformers makes a tokenizer.json of.
    """
    if FAST in files:
        return files
    if not files.has_vocabulary:
        raise CheckpointError(
            f"{_folder(files)} holds no tokenizer; save the model's there (save_pretrained)"
        )
    names = [name for name in files.names if "/" not in name]
    content = tuple((name, files.read(name)) for name in names)
    for name in ("vocab.json", "added_tokens.json"):
        if name in files:
            _check_ids(files.read(name), files.where(name))
    made = _made(content, str(config.get("model_type")), str(_folder(files)))
    for name, data in made:
        files = files.with_file(name, data)
    return files


def _check_ids(data: bytes, where: Path) -> None:
    """Raise CheckpointError where a vocabulary's JSON gives a token an id beyond any vocabulary."""
    vocabulary = parse_json(data, str(where), CheckpointError, TABLE)
    for word, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and not 0 <= number <= _HIGHEST_ID:
            raise CheckpointError(
                f"{where} gives the token {word[:_SHOWN]!r} the id {number}, which no vocabulary has; "
                "copy or download it again"
            )


def _folder(files: SideFiles) -> Path:
    return next(iter(files.folders.values()), Path("the model"))


def _parsed(files: SideFiles) -> Tokenizer:
    try:
        text = files.read(FAST).decode()
    except ValueError:
        raise CheckpointError(f"{files.where(FAST)} isn't UTF-8 text; copy it again") from None
    return tokenizer_json.parse(text, files.where(FAST), CheckpointError, "copy or download it again")


@lru_cache(maxsize=4)
def _made(
    content: tuple[tuple[str, bytes], ...], model_type: str, folder: str
) -> tuple[tuple[str, bytes], ...]:
    """tokenizer.json, and tokenizer_config.json as transformers writes it beside."""
    files = dict(content)
    spm = next((name for name in _SENTENCEPIECE if name in files), None)
    if spm is not None and find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{folder} holds its tokenizer as {spm} alone, which takes the package sentencepiece to read; "
            "install the extra: pip install 'vera-edge[build]'"
        )
    if spm is not None and not _pieces(files[spm]):
        raise CheckpointError(
            f"{Path(folder) / spm} isn't a sentencepiece model that can be read, and there's no {FAST}; copy "
            "it again, or save the tokenizer with the transformers it was made with (AutoTokenizer)"
        )
    reasons = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in content:
            (Path(scratch) / name).write_bytes(data)
        # Nothing but the type: a config may name code of its own.
        (Path(scratch) / "config.json").write_text(json.dumps({"model_type": model_type}))
        for found, problem in _tries(Path(scratch), spm == _PLAIN):
            if found is not None and (spm is None or _reads_alike(found, files[spm])):
                saved = Path(scratch) / "saved"
                found.save_pretrained(saved)
                return tuple((name, (saved / name).read_bytes()) for name in (FAST, TOKENIZER_CONFIG))
            reasons.append(problem or "it splits text otherwise than sentencepiece does")
    held = ", ".join(name for name in files if name != TOKENIZER_CONFIG)
    raise CheckpointError(
        f"{folder} holds no {FAST}, and transformers makes none of what is there ({held}): {reasons[0]}; "
        "save it with the transformers it was made with (AutoTokenizer, save_pretrained)"
    )


def _tries(folder: Path, plain: bool) -> Iterator[tuple[Any, str]]:
    """transformers' tokenizer for a folder; of a plain sentencepiece model also Llama's, which most models
    use, and one that is of no class, with a space before every text.

    Each with what went wrong, where it is None.
    """
    import transformers

    yield _opened(transformers.AutoTokenizer, folder)
    if plain:
        yield _opened(transformers.LlamaTokenizer, folder)
        found, problem = _opened(transformers.PreTrainedTokenizerFast, folder)
        if found is not None:
            _begin_with_space(found.backend_tokenizer)
        yield found, problem


def _opened(cls: Any, folder: Path) -> tuple[Any, str]:
    with quiet():
        try:
            found = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except BaseException as cause:  # of transformers, and of whatever package reads the vocabulary
            if not tokenizer_json.complains(cause):
                raise
            return None, first_line(cause)[:200]
    return (found, "") if found.is_fast else (None, f"{type(found).__name__} has no fast form")


def _begin_with_space(tokenizer: Tokenizer) -> None:
    """Let a sentencepiece tokenizer put a space before a text, and leave it out of what it decodes."""
    rest = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *rest])
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(list(steps))


def _reads_alike(tokenizer: Any, model: bytes) -> bool:
    """Whether plain words are cut into sentencepiece's own pieces."""
    found = tokenizer.backend_tokenizer.encode(_SAMPLE, add_special_tokens=False).tokens
    return [token for token in found if token != tokenizer.unk_token] == _pieces(model)


def _pieces(model: bytes) -> list[str]:
    """The sample as sentencepiece cuts it, without what the model doesn't know; empty for no such model."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        found: list[str] = processor.encode(_SAMPLE, out_type=str)
    except (RuntimeError, TypeError, ValueError):
        return []
    return [piece for piece in found if processor.piece_to_id(piece) != processor.unk_id()]


def check(
    files: SideFiles, config: Mapping[str, Any], rows: int, base: SideFiles, trained: bool = False
) -> None:
    """Raise CheckpointError unless a tokenizer that isn't the base's can be one of its model's.

    rows: of the embeddings, 0 where that isn't known. base: the base's own side files. trained: whether the
    embeddings were trained too. Ids beyond the rows that the base's tokenizer has as well never occur in text
    (published models have such), nor does a padding token.
    """
    ours = read(files, config).get_vocab(with_added_tokens=True)
    theirs = _vocabulary(base, config)
    padding = special_tokens(files).get("pad_token")
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if rows and number >= rows and theirs.get(token) != number and token != padding:
            raise CheckpointError(
                f"{_where(files)} gives {token[:_SHOWN]!r} the id {number}, and the model has embeddings for "
                f"{rows} tokens; save the adapter with its embeddings (save_embedding_layers=True), or give "
                "the tokenizer it was trained with (--tokenizer FOLDER)"
            )
        if not trained and theirs.get(token, number) != number:
            raise CheckpointError(
                f"{_where(files)} gives {token[:_SHOWN]!r} the id {number}, and the base's tokenizer "
                f"{theirs[token]}: it belongs to another model; give the one it was trained with "
                "(--tokenizer FOLDER)"
            )


def _vocabulary(files: SideFiles, config: Mapping[str, Any]) -> Mapping[str, int]:
    """The ids of a base's tokens; none where its tokenizer can't be read, which may be why it isn't taken."""
    try:
        return read(files, config).get_vocab(with_added_tokens=True)
    except CheckpointError:
        return {}


def _where(files: SideFiles) -> Path:
    return files.where(next(name for name in VOCABULARIES if name in files))


def special_tokens(files: SideFiles) -> dict[str, str]:
    """The text of the special tokens that the files name, by name ("eos_token")."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        for key, token in files.json(name).items():
            text = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(text, str):
                found[key] = text
    return found


def special_id(files: SideFiles, config: Mapping[str, Any], name: str) -> int | None:
    """The id of a special token by its name ("pad_token"); None when none is named or known."""
    text = special_tokens(files).get(name)
    if text is None:
        return None
    number = read(files, config).token_to_id(text)
    return number if isinstance(number, int) else None


def ending(files: SideFiles, config: Mapping[str, Any]) -> tuple[SideFiles, tuple[str, ...]]:
    """`files` whose generation settings end a text at the tokenizer's own end token too; and a note if so.

    A trainer that ends answers with another token (eos_token "<|im_end|>") says so in the tokenizer alone.
    """
    end = special_id(files, config, "eos_token")
    settings = files.json(GENERATION)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    fallback = {**(text or {}), **config}
    known = settings.get("eos_token_id", fallback.get("eos_token_id"))
    ends = [number for number in (known if isinstance(known, list) else [known]) if type(number) is int]
    if end is None or end in ends:
        return files, ()
    if not settings:  # without the file transformers takes these from config.json
        settings = {
            name: fallback[name]
            for name in ("bos_token_id", "pad_token_id")
            if type(fallback.get(name)) is int
        }
    content = settings_json({**settings, "eos_token_id": [*ends, end]})
    token = special_tokens(files)["eos_token"]
    return files.with_file(GENERATION, content), (
        f"text ends at {token!r} (id {end}) too, which is the tokenizer's eos_token",
    )
