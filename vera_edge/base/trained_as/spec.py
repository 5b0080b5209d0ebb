"""How a float base was loaded when an adapter was trained on it, in one word or a few: "nf4,double".

The words are those of `--trained-as` and of a recipe's `trained_as`; `parse` reads them, `str` writes them.
What they stand for is a call of transformers: `from_pretrained(BASE, dtype=...,
quantization_config=BitsAndBytesConfig(...))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vera_edge.errors import PlanError

FLOAT = "float"
FOUR_BIT = ("nf4", "fp4")
QUANTIZED = (*FOUR_BIT, "int8")
DTYPES: Mapping[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
STORAGES = ("uint8", *DTYPES)
WORDS = (*QUANTIZED, FLOAT, *DTYPES.values())
_SPELLINGS = {name: name for name in STORAGES} | {short: name for name, short in DTYPES.items()}
_DOUBLE, _SKIP = "double", "skip"
# The keys of a specification, by the field each one sets.
_KEYS = {"compute": "compute_dtype", "storage": "storage", "dtype": "dtype"}


@dataclass(frozen=True)
class TrainedAs:
    """How a base was loaded.

    format: "nf4", "fp4", "int8" or "float", not quantized. dtype: what transformers' `dtype=` was ("float32",
    "bfloat16", "float16"); None for the one that config.json names, and of "float" for the weights as they
    lie. double_quant, compute_dtype, storage: of 4 bits, as BitsAndBytesConfig has them. skip: its
    `llm_int8_skip_modules`; empty for transformers' own choice.
    Raises PlanError when a field has a value that nothing has, or that its format has no use for.
    """

    format: str
    dtype: str | None = None
    double_quant: bool = False
    compute_dtype: str = "float32"
    storage: str = "uint8"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in (*QUANTIZED, FLOAT):
            raise PlanError(_unknown(self.format))
        for name, value, known in (
            ("dtype", self.dtype, (None, *DTYPES)),
            ("compute dtype", self.compute_dtype, tuple(DTYPES)),
            ("storage", self.storage, STORAGES),
        ):
            if value not in known:
                raise PlanError(f"a {name} can't be {value!r}; choose {_some(filter(None, known))}")
        four_bit = (self.double_quant, self.compute_dtype != "float32", self.storage != "uint8")
        for given, what in zip(four_bit, ("double", "a compute dtype", "a storage"), strict=True):
            if given and self.format not in FOUR_BIT:
                raise PlanError(f"{what} belongs to nf4 and fp4; leave it out beside {self.format}")
        if self.skip and not self.quantized:
            raise PlanError("skip names layers that aren't quantized, and float quantizes none; leave it out")
        if not all(self.skip) or any("," in name for name in self.skip):
            raise PlanError("skip= needs the name of a module, one for each skip=")

    @property
    def quantized(self) -> bool:
        """Whether bitsandbytes quantized the layers."""
        return self.format != FLOAT

    def __str__(self) -> str:
        """The words for it; `parse` reads them back."""
        if not self.quantized:
            return FLOAT if self.dtype is None else DTYPES[self.dtype]
        words = [self.format, *([_DOUBLE] if self.double_quant else [])]
        words += [f"compute={self.compute_dtype}"] if self.compute_dtype != "float32" else []
        words += [f"storage={self.storage}"] if self.storage != "uint8" else []
        words += [f"dtype={self.dtype}"] if self.dtype is not None else []
        return ",".join([*words, *(f"{_SKIP}={name}" for name in self.skip)])

    @property
    def call(self) -> str:
        """The arguments of `from_pretrained` that it stands for, as they are written in Python."""
        dtype = [] if self.dtype is None else [f"dtype=torch.{self.dtype}"]
        if not self.quantized:
            return ", ".join(dtype)
        given = ["load_in_8bit=True"] if self.format == "int8" else ["load_in_4bit=True"]
        given += [f'bnb_4bit_quant_type="{self.format}"'] if self.format in FOUR_BIT else []
        given += ["bnb_4bit_use_double_quant=True"] if self.double_quant else []
        for key, value, default in (
            ("bnb_4bit_compute_dtype", self.compute_dtype, "float32"),
            ("bnb_4bit_quant_storage", self.storage, "uint8"),
        ):
            given += [f"{key}=torch.{value}"] if value != default else []
        given += [f"llm_int8_skip_modules={list(self.skip)}"] if self.skip else []
        return ", ".join([*dtype, f"quantization_config=BitsAndBytesConfig({', '.join(given)})"])

    def quantization_config(self) -> dict[str, Any] | None:
        """The `quantization_config` that transformers writes for it; None when it isn't quantized."""
        if not self.quantized:
            return None
        four_bit = self.format in FOUR_BIT
        return {
            "_load_in_4bit": four_bit,
            "_load_in_8bit": not four_bit,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": self.storage,
            # What BitsAndBytesConfig has where nothing is said.
            "bnb_4bit_quant_type": self.format if four_bit else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": list(self.skip) or None,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four_bit,
            "load_in_8bit": not four_bit,
            "quant_method": "bitsandbytes",
        }


def parse(text: str) -> TrainedAs:
    """The inverse of `str`: "nf4", "nf4,double,compute=bf16,skip=lm_head", "int8", "bf16", "float".

    Dtypes also go by their short names. Raises PlanError on a word that isn't known, or stands twice.
    """
    first, *words = (word.strip() for word in text.split(","))
    if first not in WORDS:
        raise PlanError(_unknown(first))
    given: dict[str, Any] = {"format": first}
    if first in DTYPES.values():
        given = {"format": FLOAT, "dtype": _SPELLINGS[first]}
    for word in words:
        key, equals, value = (part.strip() for part in word.partition("="))
        if key == _SKIP and equals:
            given[_SKIP] = (*given.get(_SKIP, ()), value)
            continue
        name = "double_quant" if word == _DOUBLE else _KEYS.get(key, "") if equals else ""
        if not name:
            raise PlanError(
                f"{word!r} says nothing of how a base was loaded; after {first} may come double, compute=, "
                "storage=, dtype= and skip=, with commas"
            )
        if name in given:
            raise PlanError(f"{key} stands twice in {text!r}; say it once")
        given[name] = True if name == "double_quant" else _SPELLINGS.get(value, value)
    return TrainedAs(**given)


def _unknown(word: str) -> str:
    return (
        f"{word!r} isn't a way to load a base; choose {_some(WORDS)} (load_in_4bit=True alone is fp4, "
        "load_in_8bit=True is int8)"
    )


def _some(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
