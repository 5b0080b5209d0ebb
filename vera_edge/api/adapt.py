"""`vera_edge.adapt`: an adapter carried from the base it was trained on to the one that is shipped."""

from __future__ import annotations

from pathlib import Path

from vera_edge.api.arguments import StrPath, Texts, loading, mixture, path_or_none
from vera_edge.base.trained_as import TrainedAs
from vera_edge.progress import Progress, silent
from vera_edge.requantize.devices import CPU
from vera_edge.training import adapting
from vera_edge.training.adapting import Adapted

__all__ = ["Adapted", "adapt"]


def adapt(
    base: StrPath,
    adapter: StrPath,
    *,
    onto: StrPath,
    out: StrPath,
    calibration: Texts = (),
    steps: int = 160,
    activations: str = "float",
    projection_rounding: str | None = None,
    trained_as: str | TrainedAs | None = None,
    tokenizer: StrPath | None = None,
    compute_device: str = CPU,
    force: bool = False,
    progress: Progress = silent,
) -> Adapted:
    """Carry an adapter from the base it was trained on to another form of that base, by a short distillation.

    Its lambda vectors (a LoRA's pairs), and nothing else, are trained towards what the model as trained says
    to a text, beside the base that is shipped. Windows of the text that aren't trained on judge it: what did
    best there is written, and where nothing did better, the values as they came.

    Args:
        base: the folder of the base that the adapter was trained on.
        adapter: the PEFT folder, of a VeRA or a LoRA.
        onto: the folder of the base that is shipped: the same model in another format.
        out: the PEFT folder to write, whole or not at all.
        calibration: text to train on, like what the adapter is for: a UTF-8 file, several, or {file: share of
            the tokens}; built-in text takes the rest.
        steps: at most so many, of a window of 256 tokens each; it ends where nothing more is gained.
        activations: of the shipped base: "float", or "int8": what integer layers read is rounded as ONNX
            Runtime does.
        projection_rounding: what the projections were rounded to in training, where it can't be told.
        trained_as: how the base was loaded in training when it was never saved so, like "nf4,double".
        tokenizer: a folder to take the tokenizer from, not from the adapter's or the base's.
        compute_device: what both models run on: cpu, cuda, mps, or auto, the first of the others.
        force: replace `out` where it exists.
        progress: called with what is done, how much of it, and of how much (steps).

    Returns:
        An Adapted: the mean KL from the model as trained `before` and `after`, on held-out text, the
        adapter's whole `effect` there, and what it took.

    Raises:
        MismatchError: adapter and bases don't belong together.
        DataError: the text can't be used or is too short.
        PlanError: the request makes no sense, the device isn't there, or both models don't fit in memory.
        OutputError: `out` exists or can't be written.

    Example:
        >>> made = vera_edge.adapt("base", "adapter", onto="integers", out="carried", steps=10)
        >>> made.after <= made.before
        True
    """
    return adapting.to_folder(
        Path(base),
        Path(adapter),
        Path(onto),
        Path(out),
        mixture(calibration),
        steps,
        None if activations == "float" else activations,
        projection_rounding,
        loading(trained_as),
        path_or_none(tokenizer),
        compute_device,
        force,
        progress,
    )
