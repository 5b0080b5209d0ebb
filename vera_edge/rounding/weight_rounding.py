"""How the weights of a plan are rounded: by which method, calibrated on what, and where the codes are kept.

It imports torch only when there is something to calibrate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from vera_edge import merging
from vera_edge.adapters.adapter import WeightedAdapter
from vera_edge.adapters.vera import LambdaVectors
from vera_edge.arrays import Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import PlanError
from vera_edge.exporting.exporter import CALIBRATION, RoundedWeights
from vera_edge.formats import FORMATS
from vera_edge.formats.blocks import BITS, block_within
from vera_edge.parallel import Engine
from vera_edge.plans.int8 import INT8_QDQ, LLM_INT8, int8_form
from vera_edge.plans.plan import HEAD, Plan, Step
from vera_edge.progress import Progress, silent
from vera_edge.requantize import (
    CALIBRATED,
    GGML_GRIDS,
    METHODS,
    Codes,
    Effort,
    Grid,
    bnb_grid,
    devices,
    int8_rows,
    int_blocks,
)
from vera_edge.requantize.effort import DEFAULT
from vera_edge.rounding import recover
from vera_edge.storage.files import check_output, output_error
from vera_edge.storage.resumable import resumable_folder
from vera_edge.storage.scratch import scratch_folder
from vera_edge.tasks import task as tasks
from vera_edge.text import mixture, windows
from vera_edge.text import tokenizer as tokenizers
from vera_edge.text.mixture import Cut, Mixture
from vera_edge.trained.text_settings import vocabulary_size
from vera_edge.trained.trained_model import TrainedModel

FOUR_BIT = ("nf4", "fp4", "int4", "int2", "gptq", "awq", "w4a16", *GGML_GRIDS.keys() - {"q8_0", "q6_k"})
BLOCK = 32  # of integers in ONNX graphs
BUILT_IN = windows.BUILT_IN
_ROOM_SHARE = 8  # of --max-memory: the part of it that hidden states may have


def default_method(steps: Sequence[Step]) -> str:
    """`gptq` when any layer goes to 4 bits, where rounding to nearest drowns adapters; else `rtn`."""
    return "gptq" if any(step.result in FOUR_BIT and not step.copies for step in steps) else "rtn"


def grid_of(step: Step, exported: bool = False) -> Grid | None:
    """The grid that a step's result is stored on; None for one that isn't rounded.

    exported: in an ONNX graph, where absmax are float32, "int8" is another thing (`plans.int8`), and a group
    is cut into blocks that MatMulNBits has.
    """
    if step.result in ("nf4", "fp4"):
        options = dict(step.options)
        double = options.pop("double_quant", False) and not exported
        return bnb_grid(step.result, options.pop("blocksize", 64), double_quant=double, **options)
    if step.result in GGML_GRIDS:
        return GGML_GRIDS[step.result]
    if int8_form(step, exported) in (LLM_INT8, INT8_QDQ):
        return int8_rows()
    if step.result in ("int8", "int4", "int2"):
        # Zero points cost more than they're worth at 8 bits, and halve the error at 4.
        symmetric = step.options.get("symmetric", step.result == "int8")
        return int_blocks(int(step.result[3:]), step.options.get("block", BLOCK), symmetric)
    # GPTQ, AWQ, compressed-tensors: the formats that store any integer codes
    target = FORMATS.get(step.result)
    facts = getattr(target, "integer_grid", lambda options: None)(step.options)
    if facts is None:
        return None
    bits, group, symmetric = facts
    least = 0 if exported else getattr(target, "least_zero", lambda options: 0)(step.options)
    group = step.shape[1] if group == -1 else group
    block = group if not exported else block_within(group) if bits in BITS else None
    return None if block is None else Grid("int", bits, block, symmetric=symmetric, least_zero=least)


@dataclass(frozen=True)
class Rounding:
    """How a plan's weights are rounded. method: of requantize.METHODS, None for the plan's own or
    `default_method`.

    text: what "search" and "gptq" are calibrated on: texts with shares, or one alone, a UTF-8 file or
        "built-in"; about `tokens` of it, or as many as the effort takes.
    recover: what to win back from rounding, of recover.PARTS.
    any_adapter: calibrate a side-branch's base without its adapter, so that the weights come out the same
        whichever adapter they are exported with.
    effort: of requantize.EFFORTS, what "search" and "gptq" spend; None for the plan's own or "default".
    device: of requantize.devices.DEVICES, what statistics and rounding are computed on.
    max_memory: bytes; an eighth of them, and no more than `hidden_states.ROOM`, is for what a text leaves
        between layers, the rest of which goes to the disk. Models are read layer by layer in any case.
    """

    method: str | None = None
    text: str | Mixture = BUILT_IN
    tokens: int | None = None
    recover: tuple[str, ...] = ()
    any_adapter: bool = False
    effort: str | None = None
    max_memory: int | None = None
    device: str = devices.CPU

    @contextmanager
    def codes(
        self,
        model: TrainedModel,
        plan: Plan,
        out: Path,
        progress: Progress = silent,
        exported: bool = True,
        head: Grid | None = None,
    ) -> Iterator[RoundedWeights]:
        """The weights rounded; codes are kept beside `out` while the context lasts, and after a kill.

        A run that was killed goes on where it was, as long as all that decides the result is the same.
        head: what the output head is stored on, where it's to be rounded too; its codes are called HEAD.

        No codes for "rtn", which every format does by itself. Raises PlanError for an unknown method or
        effort, a device that isn't there, a method that no layer can use, or where nothing can be recovered;
        DataError for unusable text.
        """
        method = self.method or str(plan.options.get("method") or default_method(plan.steps))
        if method not in METHODS:
            raise PlanError(f"no quantization method is called {method!r}; known: {', '.join(METHODS)}")
        named = self.effort or str(plan.options.get("effort") or DEFAULT)
        effort, device = Effort.named(named), devices.chosen(self.device)
        asked = recover.check(self.recover, model.adapters, plan.mode == "merged", method)
        if asked.corrects and not exported:
            raise PlanError("only an exported graph has a place for a low-rank term or a bias of its own")
        if method == "rtn":
            yield RoundedWeights({}, (), model)
            return
        changed = [step for step in plan.steps if not step.copies]
        # At 8 bits rounding to nearest loses next to nothing, and formats and exporters do it by themselves.
        grids = {
            step.module: grid
            for step in changed
            if (grid := grid_of(step, exported)) is not None and (self.method or grid.bits != 8)
        }
        if grids and head is not None and method in CALIBRATED:
            grids[HEAD] = head
        if not grids and self.method is None and not self.recover:
            yield RoundedWeights({}, (), model)
            return
        if not grids:
            raise PlanError(
                f"method {method} rounds to 4 or 8 bits, and this plan has no such layer to round"
            )
        # They import torch.
        from vera_edge.reference.hidden_states import ROOM
        from vera_edge.rounding.journal import RoundingJournal, key_of
        from vera_edge.rounding.writeback import Calibration, write_back

        said = method if named == DEFAULT else f"{method} with effort {named}"
        on = devices.told(device) if method in CALIBRATED else None
        said += f" on {on}" if on else ""
        texts = Mixture.either(self.text)
        cut, notes = _windows(model.checkpoint, method, said, texts, self.tokens or effort.tokens)
        notes += cut.shortage(_widest(model.checkpoint, grids))
        if plan.options.get(CALIBRATION, cut.to_list()) != cut.to_list():
            notes = (*notes, "the plan was made for other calibration text: it may lose more than it says")
        calibration = Calibration(
            cut.windows,
            method,
            "inputs" if effort.follows else "original",
            effort=effort,
            recover=self.recover,
            device=device,
        )
        merged = plan.mode == "merged"
        seen = model if merged else replace(model, adapters=self._calibrated_with(model))
        task = tasks.of(model.checkpoint.config).auto_class
        room = min(ROOM, ROOM if self.max_memory is None else self.max_memory // _ROOM_SHARE)
        key = key_of(seen, grids, calibration, merged, task)
        with _journal_folder(out, key) as folder:
            store = RoundingJournal(folder, grids)
            with devices.enough_memory(device, "a layer and its statistics"):
                won = write_back(seen, grids, calibration, _nowhere, merged, task, progress, store, room=room)
            if HEAD in grids and HEAD not in store:
                notes = (*notes, "the output head isn't one that text calibrates: it was rounded to nearest")
            if count := max(len(won.vectors), len(won.corrections)):
                parts = " and ".join(self.recover)
                notes = (*notes, f"{parts} of {count} layers were fitted to the rounding")
            fitted = _with_vectors(model, won.vectors)
            yield RoundedWeights(store, notes, fitted, won.corrections, on, cut.to_list())

    def _calibrated_with(self, model: TrainedModel) -> tuple[WeightedAdapter, ...]:
        """The adapters that run in a branch's calibration: their sum, or the first where they have none."""
        if self.any_adapter:
            return ()
        first = model.adapters[0]
        alike = all(one.adds and one.method == first.adapter.method for one, _ in model.adapters)
        return tuple(model.adapters) if alike else (first,)


@contextmanager
def _journal_folder(out: Path, key: str) -> Iterator[Path]:
    """Where the codes of this work are kept. Raises OutputError when that can't be made."""
    with ExitStack() as held:
        try:
            folder = held.enter_context(resumable_folder(out, "rounding", key))
        except OSError as cause:
            raise output_error(out, cause) from cause
        yield folder


def _nowhere(module: str, codes: Codes) -> None:
    """The journal has them."""


def _with_vectors(model: TrainedModel, vectors: Mapping[str, LambdaVectors]) -> TrainedModel:
    if not vectors:
        return model
    (adapter, weight), *_ = model.adapters
    refitted = replace(adapter, vectors={**adapter.vectors, **vectors})
    return replace(model, adapters=(WeightedAdapter(refitted, weight),))


def merge_to_folder(
    ready: merging.Prepared,
    out: Path,
    rounding: Rounding | None = None,
    progress: Progress = silent,
    force: bool = False,
    resources: merging.Resources = merging.ONE_PROCESS,
) -> merging.MergeReport:
    """Merge what was prepared into `out`, its weights rounded as `rounding` says. Raises as that does."""
    return merge_to_folders({out: ready}, rounding, progress, force, resources)[0]


def merge_to_folders(
    ready: Mapping[Path, merging.Prepared],
    rounding: Rounding | None = None,
    progress: Progress = silent,
    force: bool = False,
    resources: merging.Resources = merging.ONE_PROCESS,
) -> list[merging.MergeReport]:
    """Merge what was prepared, of one base, into its folder each; see `merge.write_each`.

    Calibration, where the method needs it, is done before all else: on a cluster each on a machine of its
    own, here one after the other, since each takes all cores.
    """
    inputs = [path for one in ready.values() for path in one.model.folders]
    for out in ready:
        check_output(out, force, inputs)
    with ExitStack() as held:
        rounded = list(_rounded_each(ready, rounding or Rounding(), progress, resources.engine, held))
        merges = [
            one.merge(out, codes, notes)
            for (out, one), (codes, notes) in zip(ready.items(), rounded, strict=True)
        ]
        return merging.write_each(merges, progress, force, resources=resources)


def _rounded_each(
    ready: Mapping[Path, merging.Prepared],
    rounding: Rounding,
    progress: Progress,
    engine: Engine,
    held: ExitStack,
) -> Iterator[tuple[Mapping[str, Codes], tuple[str, ...]]]:
    """Codes and notes of each, in their order; codes are kept as long as `held`."""
    if engine.kind != "ray" or len(ready) == 1:
        for out, one in ready.items():
            codes = rounding.codes(one.model, one.plan, out, progress, exported=False)
            rounded = held.enter_context(codes)
            yield rounded.codes, rounded.notes
        return
    items = [
        _Item(one.model, one.plan, held.enter_context(scratch_folder(out.absolute(), "codes")))
        for out, one in ready.items()
    ]
    rounding = replace(
        rounding, text=Mixture.either(rounding.text).absolute()
    )  # a worker may stand elsewhere
    found = {}
    for index, result in engine.map_with(_round_item, rounding, items, whole_machine=True):
        found[index] = result
        progress("calibrating on the cluster", len(found), len(items))
    yield from (found[index] for index in range(len(items)))


class _Item(NamedTuple):
    """A model to round for a merge, as data that any worker can be sent. folder: where its codes go."""

    model: TrainedModel
    plan: Plan
    folder: Path


def _round_item(rounding: Rounding, item: _Item) -> tuple[Mapping[str, Codes], tuple[str, ...]]:
    """Codes and notes of one model. Each try has a folder of its own, whatever a lost worker left."""
    from vera_edge.rounding.journal import RoundingJournal  # it imports torch

    name = uuid4().hex
    with rounding.codes(item.model, item.plan, item.folder / f"try-{name}", exported=False) as rounded:
        codes = rounded.codes
        if isinstance(codes, RoundingJournal):
            codes = codes.moved(item.folder / name)
        return codes, rounded.notes


def calibration_texts(checkpoint: Checkpoint, text: str | Mixture, tokens: int) -> list[Int64]:
    """Token ids of paragraphs of text, with what the tokenizer puts around them; about `tokens` in all.

    Of a mixture only what isn't built-in, where there is any: a range is to be that of what an encoder will
    read. Raises DataError on unusable text, CheckpointError without tokenizer.
    """
    from vera_edge.measuring.encoder_assess import cut_texts  # more of drift comes with it

    tokenizer, found = tokenizers.read(checkpoint.files, checkpoint.config), list[Int64]()
    rows = vocabulary_size(checkpoint.config)
    for source in Mixture.either(text).names:
        cut = cut_texts(windows.read_text(source), tokenizer, _longest(checkpoint.config))
        for ids in cut if rows else ():
            windows.check_ids(ids, tokenizer, rows, f"{source} text")
        found += cut
    return found[:: max(1, sum(map(len, found)) // tokens)]


def _longest(config: Mapping[str, Any]) -> int:
    """Tokens of the longest text to calibrate on: a window, or as many as the model has positions for."""
    from vera_edge.device.runtime.encoder import SHIFTED  # onnxruntime comes with it

    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id")
    positions = config.get("n_positions") if positions is None else positions
    if type(positions) is not int:
        return windows.WINDOW
    if config.get("model_type") in SHIFTED and type(padding) is int:
        positions -= padding + 1
    return min(windows.WINDOW, positions)


def _windows(
    checkpoint: Checkpoint, method: str, said: str, texts: Mixture, tokens: int
) -> tuple[Cut, tuple[str, ...]]:
    if method not in CALIBRATED:
        return Cut((), ()), (f"weights were rounded by {method}, which needs no calibration",)
    _check_takes_text(checkpoint, method)
    cut, beyond = calibration_windows(checkpoint, texts, tokens)
    note = f"weights were rounded by {said}, calibrated on {cut.said()}"
    if not texts.own:
        note += "; text like the adapter's own (--calibration FILE) loses less"
    return cut, (note, *beyond)


def calibration_windows(
    checkpoint: Checkpoint, text: str | Mixture, tokens: int
) -> tuple[Cut, tuple[str, ...]]:
    """Windows of text that a decoder is calibrated on, about `tokens` tokens in all, and notes.

    Raises DataError on unusable text, CheckpointError without tokenizer, MismatchError when it's another's.
    """
    config = checkpoint.config.get("text_config") or checkpoint.config
    tokenizer, known = tokenizers.read(checkpoint.files, checkpoint.config), int(config.get("vocab_size", 0))
    cut = mixture.cut(Mixture.either(text), tokenizer, known, tokens, _longest(config))
    return cut, windows.beyond(tokenizer, known)


def _widest(checkpoint: Checkpoint, modules: Iterable[str]) -> int:
    """The most inputs that one of these linears has; 0 where none is among the checkpoint's."""
    found = [checkpoint.linears[module].in_features for module in modules if module in checkpoint.linears]
    return max(found, default=0)


def _check_takes_text(checkpoint: Checkpoint, method: str) -> None:
    """Raise PlanError for a model of images or sound, which no text calibrates."""
    takes = tasks.main_input(checkpoint.config)
    if takes != "input_ids":
        name = tasks.architecture(checkpoint.config)
        raise PlanError(
            f"method {method} is calibrated on text, and {name} takes {takes}; choose --method hqq or rtn"
        )
