"""[[variant]] of a recipe: a form that adapters are released in, in the words of `vera-edge export`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from vera_edge.errors import PlanError, TargetError
from vera_edge.exporting import target
from vera_edge.precision import PlanRequest
from vera_edge.releasing.names import Id, Line, RecipeTable
from vera_edge.sizes import parse_size
from vera_edge.text import windows
from vera_edge.text.mixture import Mixture

Stored = Literal["fp32", "fp16", "int8", "int4"]
PLAN = "plan"
# By the key of a recipe, what an exporter calls the option.
_OPTIONS = {
    "run": "run",
    "block": "block",
    "symmetric": "symmetric",
    "accuracy_level": "accuracy_level",
    "activations": "activations",
    "kv_cache": "kv_cache",
    "head": "head",
    "head_activations": "head_activations",
    "projections_dtype": "projections",
    "vectors": "vectors",
    "imatrix": "imatrix",
}
_OF_A_BRANCH = ("projections_dtype", "vectors")
_OF_A_FORMAT = ("run", "block", "symmetric", "activations")


class Variant(RecipeTable):
    """[[variant]]: a form that every adapter is released in; `adapters` restricts it to some of them.

    weights: a format, or "plan": from the file `plan`, or searched for within `max_kl` nats or `max_size`
    bytes, of `formats`. projections: "seed" leaves them to the device to draw.
    """

    target: Id = "onnx"
    mode: Literal["merged", "branch"] = "merged"
    weights: Line = "int8"
    run: Literal["int8"] | None = None
    plan: Line | None = None
    max_kl: float | None = Field(default=None, gt=0, strict=False)
    max_size: Line | None = None
    formats: tuple[Line, ...] = Field(default=("int4", "int8"), strict=False, min_length=1)
    block: Literal[16, 32, 64, 128, 256] | None = None
    symmetric: bool | None = None
    accuracy_level: Literal[0, 4] | None = None
    activations: Literal["float", "dynamic", "static"] | None = None
    kv_cache: Literal["float", "int8"] | None = None
    head: Line | None = None
    head_activations: Literal["int8", "int16"] | None = None
    projections: Literal["baked", "seed"] = "baked"
    projections_dtype: Stored | None = None
    vectors: Literal["fp32", "fp16"] | None = None
    imatrix: Literal["gguf", "dat"] | None = None
    method: Literal["rtn", "search", "hqq", "gptq"] | None = None
    effort: Literal["quick", "default", "thorough"] | None = None
    calibration: Line | Annotated[tuple[Line, ...], Field(strict=False, min_length=1)] = windows.BUILT_IN
    compute_device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    id: Id | None = None
    adapters: tuple[Id, ...] | None = Field(default=None, strict=False, min_length=1)

    @model_validator(mode="after")
    def _known(self) -> Variant:
        known = (*self._formats(), PLAN)
        if self.weights not in known:
            raise ValueError(f"has weights {self.weights!r}; choose from {', '.join(known)}")
        heads = get_args(Stored) if self._formats() == target.WEIGHTS else self._formats()
        if self.head not in (None, *heads):
            raise ValueError(f"has a head of {self.head!r}; choose from {', '.join(heads)}")
        given = [name for name in _OF_A_BRANCH if getattr(self, name) is not None]
        given += ["projections"] * (self.projections == "seed")
        if self.mode == "merged" and given:
            raise ValueError(f'has {given[0]}, which belongs to mode = "branch"')
        return self

    def _formats(self) -> tuple[str, ...]:
        try:
            return target.weights_of(self.target)
        except TargetError as cause:
            raise ValueError(str(cause)) from None

    @model_validator(mode="after")
    def _planned(self) -> Variant:
        given = [name for name in ("plan", "max_kl", "max_size") if getattr(self, name) is not None]
        if self.weights != PLAN and given:
            raise ValueError(f'has {given[0]}, which belongs to weights = "plan"')
        if self.weights == PLAN and len(given) != 1:
            raise ValueError('has weights = "plan" and needs one of plan, max_kl and max_size')
        decided = [name for name in _OF_A_FORMAT if getattr(self, name) is not None]
        if self.weights == PLAN and decided:
            raise ValueError(f"has {decided[0]}, and a plan decides on that; leave it out")
        if self.weights == PLAN and self.plan is None:
            self.request()
        return self

    @model_validator(mode="after")
    def _calibrated(self) -> Variant:
        try:
            Mixture.of(self.texts)
        except PlanError as cause:
            raise ValueError(str(cause)) from None
        return self

    @property
    def texts(self) -> tuple[str, ...]:
        """What is calibrated on: texts, some with =SHARE behind their name."""
        return (self.calibration,) if isinstance(self.calibration, str) else self.calibration

    def request(self, calibration: str | Mixture = PlanRequest.calibration) -> PlanRequest:
        """What automatic precision is asked for; `calibration` as `Rounding` takes it. Raises ValueError."""
        try:
            asked = PlanRequest(
                max_size=None if self.max_size is None else parse_size(self.max_size),
                max_kl=self.max_kl,
                mode=self.mode,
                formats=self.formats,
                target=self.target,
                method=self.method or PlanRequest.method,
                effort=self.effort or PlanRequest.effort,
                device=self.compute_device or PlanRequest.device,
                calibration=calibration,
            )
            asked.check()
        except PlanError as cause:
            raise ValueError(str(cause)) from None
        return asked

    @property
    def name(self) -> str:
        """The variant's folder: its id, or target-mode-weights."""
        return self.id or f"{self.target}-{self.mode}-{self.weights}"

    @property
    def options(self) -> dict[str, str]:
        """The exporter's options, those that are given; see `target.export`."""
        given = {name: getattr(self, key) for key, name in _OPTIONS.items()}
        found = {name: str(value).lower() for name, value in given.items() if value is not None}
        return found | ({"origin": "seed"} if self.projections == "seed" else {})

    @property
    def shares_graph(self) -> bool:
        """Whether adapters that touch the same layers have one graph, which differs in no byte.

        A plan is for one adapter, and ranges of activations, of keys and of values are of the adapters they
        were seen with.
        """
        seen = {self.activations, self.kv_cache} - {None, "float"}
        return self.mode == "branch" and self.weights != PLAN and not seen
