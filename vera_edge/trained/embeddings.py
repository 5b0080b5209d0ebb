"""Tables of embeddings as they were trained: computed from the base's, then whole tensors like any other.

So what merges, exports and measures `modules_to_save` needs to know nothing of pairs and rows beside a table.
An output head that shares the table goes with it where PEFT ties the two: trained rows always do, a pair with
`ensure_weight_tying`; else PEFT leaves the head with the base's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.embeddings import EmbeddingPair, TokenRows
from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Float32
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import MismatchError
from vera_edge.storage.tensors import FLOATS, RawTensor
from vera_edge.trained.alignment import empty_model

# Settings that PEFT would make such layers by, beside those that it now keeps whole.
_DONE = {"trainable_token_indices": None, "ensure_weight_tying": False}


def with_tables(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """`adapter`, aligned with `checkpoint`, with its tables of embeddings among its whole tensors (`made`).

    Unchanged where it trained none. Raises MismatchError where the base has no such table.
    """
    if not adapter.embeddings:
        return adapter
    trained = adapter.as_trained or adapter
    tied, names = _tied(checkpoint), dict(zip(trained.embeddings, adapter.embeddings, strict=True))
    tables = {
        theirs: _table(adapter, checkpoint, ours, names.get(tied.get(theirs, theirs), ours))
        for theirs, ours in names.items()
    }
    heads = {head: source for head, source in tied.items() if _follows(trained, source, head)}
    for head, source in heads.items():
        _check_same(trained, head, source)
        tables[head], names[head] = tables[source], names.get(head, head)
    found = _whole(adapter, tables, names, heads)
    if adapter.as_trained is None:
        return found
    return replace(found, as_trained=_whole(trained, tables, {module: module for module in tables}, heads))


def _table(adapter: Adapter, checkpoint: Checkpoint, module: str, source: str) -> Float32:
    """A table as trained: from the copy that the adapter holds, of a resized one, or else the base's.

    source: the table that it shares in the base, itself where it is one of its own.
    """
    name = f"{module}.weight"
    if name not in checkpoint.tensors:
        name = f"{source}.weight"
    kept, info = adapter.modules_to_save.get(name), checkpoint.tensors.get(name)
    if kept is None and (info is None or info.dtype not in FLOATS or len(info.shape) != 2):
        raise MismatchError(
            f"{adapter.path} trains rows of {module}, and {checkpoint.path} has no table of floats there"
        )
    table = checkpoint.tensors.float32(name) if kept is None else kept.float32()
    found = adapter.embeddings[module].whole(table, f"{module} of {adapter.path}")
    return np.ascontiguousarray(found, np.float32)


def _tied(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Output head -> the table that it shares, as PEFT calls them; empty where they're apart."""
    if checkpoint.config.get("tie_word_embeddings") is False:
        return {}
    model = empty_model(checkpoint)
    if model is None or not getattr(model.config, "tie_word_embeddings", False):
        return {}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {_owner(head): _owner(source) for head, source in tied.items() if head.endswith(".weight")}


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _follows(trained: Adapter, source: str, head: str) -> bool:
    """Whether a head that shares a table is what the adapter makes of that."""
    change = trained.embeddings.get(source)
    if isinstance(change, TokenRows):
        return head not in trained.embeddings
    return isinstance(change, EmbeddingPair) and bool(trained.config.get("ensure_weight_tying"))


def _check_same(trained: Adapter, head: str, source: str) -> None:
    """Raise MismatchError where the head has a pair that isn't the table's own, turned."""
    ours, pair = trained.embeddings[source], trained.vectors.get(head)
    if not isinstance(ours, EmbeddingPair) or not isinstance(pair, LoraPair):
        return
    if not (np.array_equal(pair.a, ours.b.T) and np.array_equal(pair.b, ours.a.T)):
        raise MismatchError(
            f"{trained.path} says that {head} shares what it trained for {source} (ensure_weight_tying), and "
            "holds something else for it"
        )


def _whole(
    adapter: Adapter, tables: Mapping[str, Float32], names: Mapping[str, str], heads: Mapping[str, str]
) -> Adapter:
    """`adapter` with `tables` whole and without a pair of its own for `heads`.

    tables, heads: by PEFT's names, as in the config. names: what the adapter at hand calls those.
    """
    made = {f"{names[module]}.weight": RawTensor.of(values) for module, values in tables.items()}
    apart = {names[head] for head in heads}
    whole = {*(adapter.config.get("modules_to_save") or []), *tables}
    return replace(
        adapter,
        vectors={module: change for module, change in adapter.vectors.items() if module not in apart},
        modules_to_save={**adapter.modules_to_save, **made},
        made=frozenset(made),
        config={**adapter.config, **_DONE, "modules_to_save": sorted(whole)},
    )
