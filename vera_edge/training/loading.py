"""A quantized base as a transformers model whose linears are ordinary, with exactly the stored values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vera_edge.errors import AdapterError, PlanError
from vera_edge.versions import installed

if TYPE_CHECKING:
    import os

    from vera_edge.base.checkpoint import Checkpoint

DTYPES = ("float32", "bfloat16")
INT8 = "int8"


def load(
    base: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    activations: str | None = None,
    trained_as: str | None = None,
) -> Any:
    """A base as a transformers model to train adapters on: its own class, frozen, every linear dequantized.

    Each linear layer is an ordinary `torch.nn.Linear` (GPT-2's an ordinary `Conv1D`), so that PEFT's VeRA and
    the Trainer take the model as they take any. bitsandbytes and gptqmodel aren't needed. Layers carry
    `compute_dtype`, by which PEFT 0.19 and later rounds the adapter's projections as vera-edge will expect.

    Args:
        base: the folder, in any format that vera-edge reads: GPTQ as `quantize` makes it, NF4, floats, ....
        dtype: float32 has every stored value exactly. bfloat16 rounds each weight to 8 significant bits,
            by up to 0.4 %: half the memory, and the adapter is trained beside a base that is that far from
            the one that is shipped.
        activations: "int8" rounds what integer layers read as ONNX Runtime does when it runs them (blocks of
            inputs, accuracy level 4), with gradients passed straight through. None reads floats.
        trained_as: quantize a base in floats as it is loaded, like "nf4,double"; for gptq use `quantize`.

    Returns:
        The model, of config.json's class, in eval mode and without gradients.

    Raises:
        CheckpointError: the base can't be read, or transformers doesn't know it.
        PlanError: no such dtype or activations, or no layer whose activations the runtime rounds.

    Example:
        >>> from vera_edge.training import load
        >>> model = load("base")
        >>> type(model).__name__, sum(p.requires_grad for p in model.parameters())
        ('LlamaForCausalLM', 0)
    """
    from pathlib import Path

    import torch

    from vera_edge.base.checkpoint import Checkpoint
    from vera_edge.base.trained_as import parse
    from vera_edge.reference.model import load_dense
    from vera_edge.tasks import task as tasks

    if dtype not in DTYPES:
        raise PlanError(f"dtype {dtype!r} isn't one to train on; choose {' or '.join(DTYPES)}")
    check_activations(activations)
    checkpoint = Checkpoint.open(Path(base), None if trained_as is None else parse(trained_as))
    model = load_dense(checkpoint, tasks.of(checkpoint.config).auto_class)
    model = model.to(getattr(torch, dtype)).requires_grad_(requires_grad=False)
    _mark(model, checkpoint, dtype)
    if activations == INT8:
        round_inputs(model, checkpoint)
    model.name_or_path = model.config._name_or_path = str(base)
    return model


def check_activations(activations: str | None) -> None:
    """Raise PlanError for what the runtime doesn't round to."""
    if activations not in (None, INT8):
        raise PlanError(f"activations {activations!r} aren't known; choose {INT8}, or leave them out")


def round_inputs(model: Any, checkpoint: Checkpoint) -> None:
    """Let the model's integer layers read int8 activations, as ONNX Runtime's do; branches read floats.

    Raises PlanError when there's no such layer.
    """
    from vera_edge.training.runtime_rounding import RoundInputs, runtime_block

    count = 0
    for module, layer in _layers(model, checkpoint).items():
        block = runtime_block(checkpoint, module)
        if block is not None:
            getattr(layer, "base_layer", layer).register_forward_pre_hook(RoundInputs(block))
            count += 1
    if not count:
        raise PlanError(
            f"the runtime rounds the activations of no layer of {checkpoint.path}: none is stored in "
            "integers; leave activations out, or make a base of integers with vera-edge quantize --to gptq"
        )


def _layers(model: Any, checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's linear layers by the names that the checkpoint has for them."""
    from vera_edge.trained.alignment import names_in

    names = names_in(model, checkpoint.linears)
    if names is None:
        raise PlanError(
            f"layers of {checkpoint.path} go by other names in transformers' model, and can't be told apart"
        )
    return {module: model.get_submodule(names[module]) for module in checkpoint.linears}


def _mark(model: Any, checkpoint: Checkpoint, dtype: str) -> None:
    """Say on each layer what PEFT is to round the projections to: what vera-edge infers of this base.

    PEFT before 0.19 looks at the weight's dtype alone. Raises PlanError where that comes to something else.
    """
    import torch

    from vera_edge.trained.peft_rounding import of_layer, rounds_to_compute_dtype

    version = installed(["peft"]).get("peft")
    for module, layer in _layers(model, checkpoint).items():
        try:
            rounding = of_layer(checkpoint, checkpoint.linears[module], version)[0]
        except AdapterError:  # nothing can be inferred of such a base: what is said later holds
            rounding = "float32"
        if version is not None and not rounds_to_compute_dtype(version) and rounding != dtype:
            raise PlanError(
                f"PEFT {version} rounds an adapter's projections to the weights' dtype, {dtype}, where "
                f"{rounding} belongs on this base; install PEFT 0.19 or later, or load it in {rounding}"
            )
        layer.compute_dtype = getattr(torch, rounding)
