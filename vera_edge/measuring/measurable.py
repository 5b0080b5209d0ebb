"""What drift measures of a base's models, told before any of them is made: by its config alone."""

from __future__ import annotations

from collections.abc import Mapping

from vera_edge.base.checkpoint import Checkpoint
from vera_edge.device.check import answers
from vera_edge.errors import MismatchError, PlanError
from vera_edge.measuring import limits
from vera_edge.measuring.encoder_report import LIMITS, Measured
from vera_edge.measuring.encoders import ClassDrift, EmbeddingDrift
from vera_edge.measuring.labels_and_values import LabelDrift, ValueDrift
from vera_edge.tasks import task as tasks

_ANSWERS: Mapping[str, type[Measured]] = {
    answers.CLASS: ClassDrift,
    answers.LABELS: LabelDrift,
    answers.VALUES: ValueDrift,
}


def check(checkpoint: Checkpoint, bounds: Mapping[str, float]) -> None:
    """Raise MismatchError when drift isn't measured of such models, PlanError for a limit on what isn't.

    Imports torch. A default limit isn't looked at: see `limits.hold`.
    """
    measured = _measured(checkpoint)
    if measured is None:
        limits.check_text(bounds)
        return
    known = (*LIMITS[measured], "min_retained")
    if unknown := [name for name in bounds if name not in known]:
        raise PlanError(
            f"{unknown[0]} can't be held: of {_name(checkpoint)} only {', '.join(known)} are measured"
        )


def _measured(checkpoint: Checkpoint) -> type[Measured] | None:
    """What is measured of an encoder; None of a model that gives text."""
    from vera_edge.reference.loading import config_of

    config, task = checkpoint.config, tasks.of(checkpoint.config)
    if task.gives == tasks.TEXT and tasks.is_decoder(tasks.architecture(config)):
        return None
    if task.gives not in (tasks.EMBEDDINGS, tasks.CLASSES) or tasks.main_input(config) != "input_ids":
        raise _refused(checkpoint)
    known = config_of(checkpoint)
    if known.is_encoder_decoder:
        raise _refused(checkpoint)
    if task.gives == tasks.EMBEDDINGS:
        return EmbeddingDrift
    return _ANSWERS[answers.kind(known.problem_type, known.num_labels)]


def _refused(checkpoint: Checkpoint) -> MismatchError:
    return MismatchError(
        f"{checkpoint.path} is a {_name(checkpoint)}, and drift is measured of models that give text, "
        "embeddings of texts or one answer for a text; export it (vera-edge export), and measure its own task"
    )


def _name(checkpoint: Checkpoint) -> str:
    return tasks.architecture(checkpoint.config) or "model without an architecture"
