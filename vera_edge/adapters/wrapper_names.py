"""Takes the names of wrappers out of a tensor's name: what compiling, sharding and checkpointing put there.

A model that is saved while `torch.compile`, DDP, FSDP or activation checkpointing holds it, or by its
`state_dict()`, names its tensors after the wrappers too, and after the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vera_edge.errors import AdapterError

PEFT_PREFIX = "base_model.model."
# Parts between dots: of torch.compile, DataParallel and DDP, FSDP, activation checkpointing, Lightning.
WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_fsdp_wrapped_module",
        "_fpw_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
_ENDS = ("weight", "bias")  # of what a method keeps in a layer of its own, behind the adapter's name


def unwrapped(name: str) -> tuple[str, frozenset[str]]:
    """`name` without the parts that wrappers put there, and these parts.

    PEFT's prefix, where it's there more than once, counts as one.
    """
    parts = name.split(".")
    kept = [part for part in parts if part not in WRAPPERS]
    plain, taken = ".".join(kept), {part for part in parts if part in WRAPPERS}
    while plain.startswith(f"{PEFT_PREFIX}base_model."):
        plain, taken = plain.removeprefix(PEFT_PREFIX), taken | {PEFT_PREFIX.rstrip(".")}
    return plain, frozenset(taken)


def plain_names(
    keys: Iterable[str], path: Path, own: Callable[[str], bool]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The tensors of the adapter in `path`: plain name -> name as stored; and sentences on what was left out.

    own: whether a part of a name is the method's own, behind which an adapter's name may stand.
    Raises AdapterError when a wrapper isn't known, when two names become one, or for two adapters in a file.
    """
    parts = {key: unwrapped(key) for key in keys}
    adapters = {name for plain, _ in parts.values() if (name := _adapter_name(plain, own))}
    if len(adapters) > 1:
        raise AdapterError(
            f"{path} holds the adapters {' and '.join(sorted(adapters))} in one file; save one of them"
        )
    adapter, left_out, names = next(iter(adapters), "default"), set[str](), dict[str, str]()
    bare: dict[str, str] = {}
    for key, (plain, taken) in parts.items():
        name = _without_adapter(plain, adapter, own)
        left_out |= taken | ({adapter} if name != plain else set())
        _check(name, key, bare, path)
        names[name] = bare[name.removeprefix(PEFT_PREFIX)] = key
    told = (
        f"its tensors are named after what held the model ({', '.join(sorted(left_out))}), which is left out"
    )
    return names, ((told,) if left_out else ())


def _check(name: str, key: str, bare: Mapping[str, str], path: Path) -> None:
    """bare: the names before, without PEFT's prefix, and as stored."""
    before = name.partition(PEFT_PREFIX)[0] if PEFT_PREFIX in name else ""
    if before:
        raise AdapterError(
            f"tensor {key} of {path} is named after a wrapper that isn't known ({before.rstrip('.')}); take "
            "the model out of it and save the adapter again"
        )
    if (other := bare.get(name.removeprefix(PEFT_PREFIX))) is not None:
        raise AdapterError(
            f"tensors {other} and {key} of {path} are one without the names of wrappers; save the "
            "adapter again, from the model alone"
        )


def _adapter_name(name: str, own: Callable[[str], bool]) -> str | None:
    """The adapter's name behind the method's own part of an unwrapped name, or None.

    As in `q_proj.vera_lambda_b.default` and `q_proj.lora_A.default.weight`; a number counts a method's own
    layers.
    """
    parts = name.split(".")
    parts = parts[:-1] if parts[-1] in _ENDS else parts
    last = parts[-1]
    return last if len(parts) > 1 and own(parts[-2]) and not own(last) and not last.isdecimal() else None


def _without_adapter(name: str, adapter: str, own: Callable[[str], bool]) -> str:
    """An unwrapped name without its adapter's name, behind the method's own part or `modules_to_save`."""
    if _adapter_name(name, own) == adapter:
        parts = name.split(".")
        del parts[-2 if parts[-1] in _ENDS else -1]
        return ".".join(parts)
    return name.replace(f".modules_to_save.{adapter}.", ".")
