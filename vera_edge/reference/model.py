"""The reference: the model as it was trained, in torch.

Its base weights are the checkpoint's exact values, dequantized in float32 by our own readers and never by a
live quantized module (bitsandbytes repacks those in place at their first forward on a CPU). Its adapter stays
unmerged, in PEFT's own layers, with the projections it was trained with put in place of those that the
installed PEFT and torch would draw. Everything else, the architecture first, is transformers' own.

Memory is the model in float32 plus one tensor. Nothing is looked up on a network and no code of the
checkpoint is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn

from vera_edge.adapters.projection import Projections
from vera_edge.adapters.vera import Adapter
from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, CheckpointError, MismatchError
from vera_edge.quiet import first_line, quiet
from vera_edge.reference.loading import LOCAL, config_of, loaded
from vera_edge.trained.alignment import as_loaded


@dataclass(frozen=True)
class _Swap:
    """A parameter that the adapter replaces and PEFT doesn't switch back (trained biases)."""

    parameter: nn.Parameter
    trained: torch.Tensor
    base: torch.Tensor


@dataclass(frozen=True)
class TorchReference:
    """A Runner over the model as trained; `adapter_off` and `bfloat16` view the same weights otherwise."""

    model: Any
    vocab_size: int
    has_adapter: bool
    swaps: tuple[_Swap, ...] = ()
    adapter_on: bool = True
    autocast: bool = False

    def logits(self, tokens: Int64) -> Float32:
        """Teacher-forced logits (n, vocab_size) float32 of one sequence of n token ids."""
        with self.running():
            found = self.model(input_ids=torch.from_numpy(tokens[None]), use_cache=False).logits
            result: Float32 = found[0].float().numpy()
            return result

    def hidden(self, tokens: Int64) -> Float32:
        """An encoder's last hidden states (n, d) float32."""
        with self.running():
            found = self.model(input_ids=torch.from_numpy(tokens[None])).last_hidden_state
            result: Float32 = found[0].float().numpy()
            return result

    def embed(self, tokens: Int64) -> Float32:
        """An encoder's embedding (d,) float32: the mean of its last hidden states over the tokens."""
        found: Float32 = self.hidden(tokens).mean(axis=0)
        return found

    def classify(self, tokens: Int64) -> Float32:
        """A classifier's logits (classes,) float32, or one's of tokens (n, classes)."""
        with self.running():
            result: Float32 = self.model(input_ids=torch.from_numpy(tokens[None])).logits[0].float().numpy()
            return result

    def spans(self, tokens: Int64) -> Float32:
        """Logits (2, n) float32 of where an answer starts and ends among n tokens."""
        with self.running():
            found = self.model(input_ids=torch.from_numpy(tokens[None]))
            result: Float32 = torch.cat([found.start_logits, found.end_logits]).float().numpy()
            return result

    def greedy(self, tokens: Int64, count: int, ends: Sequence[int]) -> list[int]:
        """The `count` tokens that follow, the likeliest each time, up to one of `ends`; with a KV cache."""
        prompt = torch.from_numpy(tokens[None])
        with self.running():
            found = self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=list(ends) or None,
                pad_token_id=0,
            )
        return [int(token) for token in found[0, len(tokens) :]]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients, with the adapter and the precision that this view of the model has."""
        _forget_lengths(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.has_adapter and not self.adapter_on:
                stack.enter_context(self._without_adapter())
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    def adapter_off(self) -> TorchReference:
        """The same base without the adapter: what an artefact falls back to when the adapter is lost."""
        return replace(self, adapter_on=False)

    def bfloat16(self) -> TorchReference:
        """The same model computed in bfloat16 (autocast): the noise floor that any runtime may have."""
        return replace(self, autocast=True)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        with self.model.disable_adapter():
            for swap in self.swaps:
                swap.parameter.data = swap.base
            try:
                yield
            finally:
                for swap in self.swaps:
                    swap.parameter.data = swap.trained


def _forget_lengths(model: Any) -> None:
    """Let dynamically scaled rotary embeddings forget the longest sequence they saw.

    transformers goes on to rotate by it until a sequence is within the original context again.
    """
    for module in model.modules():
        if "dynamic" not in str(getattr(module, "rope_type", "")):
            continue
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                setattr(module, name.replace("original_", ""), buffer.clone())


def open_reference(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]] = (),
    projections: Projections | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> TorchReference:
    """The model as trained: `checkpoint` with `adapters`, each with its weight, on their `projections`.

    A weight scales an adapter's delta. Without adapters it is the base itself. `auto_class` names the
    transformers class that knows the task ("AutoModel" for an encoder).
    Raises CheckpointError when transformers doesn't know the architecture or a tensor is missing,
    MismatchError when an adapter doesn't fit, AdapterError when it holds what can't be put in place.
    """
    model = load_dense(checkpoint, auto_class)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    if not adapters:
        return TorchReference(model.eval(), vocabulary, has_adapter=False)
    if projections is None:
        raise AdapterError("a reference with an adapter needs the projections it was trained with")
    speaks = auto_class == "AutoModelForCausalLM"
    trained = [(as_loaded(adapter, model, speaks), weight) for adapter, weight in adapters]
    with quiet():
        wrapped, swaps = _with_adapters(model, trained, projections)
    return TorchReference(wrapped.eval(), vocabulary, True, tuple(swaps))


def load_dense(checkpoint: Checkpoint, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The checkpoint as a transformers model in float32, every linear dequantized exactly.

    Raises CheckpointError when transformers doesn't know the architecture or tensors are missing.
    """
    config = config_of(checkpoint)
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(f"transformers has no {auto_class} for model type {config.model_type!r}")
    tensors = {name: torch.from_numpy(values) for name, values in _dense_tensors(checkpoint)}
    cls, options = mapping[type(config)], {}
    pooled = any("pooler" in name.split(".") for name in tensors)
    if auto_class == "AutoModel" and not pooled and "add_pooling_layer" in _parameters(cls):
        # The layer behind a BERT's first token: no embedding reads it, and masked language models have none.
        options["add_pooling_layer"] = False
    return loaded(cls, config, checkpoint, tensors, **options)


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def oriented(checkpoint: Checkpoint, module: str, weight: Float32) -> torch.Tensor:
    """A weight (out, in) as transformers' model holds it: Conv1D holds (in, out)."""
    found = torch.from_numpy(weight)
    return found.T.contiguous() if checkpoint.is_conv1d(module) else found


def _dense_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every tensor as the unquantized model would store it."""
    for module in checkpoint.linears:
        weight = checkpoint.dequantize(module)
        yield f"{module}.weight", np.ascontiguousarray(weight.T) if checkpoint.is_conv1d(module) else weight
    for name in checkpoint.other_names:
        raw = checkpoint.tensors.read(name)
        yield name, raw.float32() if raw.dtype in ("F16", "BF16", "F32", "F64") else raw.array()


def _with_adapters(
    model: Any, adapters: Sequence[tuple[Adapter, float]], projections: Projections
) -> tuple[Any, list[_Swap]]:
    import peft

    names = [f"adapter{index}" for index in range(len(adapters))]
    try:
        wrapped = peft.get_peft_model(model, _peft_config(adapters[0][0]), adapter_name=names[0])
        for name, (adapter, _) in zip(names[1:], adapters[1:], strict=True):
            wrapped.add_adapter(name, _peft_config(adapter))
    except (ValueError, TypeError, RuntimeError) as cause:
        raise MismatchError(
            f"PEFT can't put {adapters[0][0].path} on this base: {first_line(cause)}"
        ) from None
    layers = {
        module.removeprefix("base_model.model."): layer
        for module, layer in wrapped.named_modules()
        if hasattr(layer, "vera_lambda_b")
    }
    a, b = (torch.from_numpy(np.array(half)) for half in (projections.a, projections.b))
    swaps: list[_Swap] = []
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        _set_vectors(layers, name, adapter, weight)
        for layer in layers.values():
            layer.vera_A[name], layer.vera_B[name] = a, b
        swaps += _set_saved_modules(wrapped.base_model.model, name, adapter)
        for module, values in adapter.biases.items():
            swaps.append(_swap(wrapped.base_model.model, f"{module}.bias", values, adapter))
    wrapped.base_model.set_adapter(names)
    return wrapped, swaps


def _peft_config(adapter: Adapter) -> Any:
    import peft

    known = set(peft.VeraConfig.__dataclass_fields__)
    facts = {key: value for key, value in adapter.config.items() if key in known}
    # The projections are overwritten in any case, and trained biases are swapped here, not by PEFT.
    changed = {"save_projection": False, "bias": "none", "base_model_name_or_path": None}
    return peft.VeraConfig(**(facts | changed | {"inference_mode": True}))


def _set_vectors(layers: Mapping[str, Any], name: str, adapter: Adapter, weight: float) -> None:
    if unfilled := next((module for module in layers if module not in adapter.vectors), None):
        raise MismatchError(f"{adapter.path} holds no vectors for {unfilled}, which its config adapts")
    for module, vectors in adapter.vectors.items():
        if module not in layers:
            raise MismatchError(f"the base has no linear layer {module}, which {adapter.path} adapts")
        layer = layers[module]
        for kind, values in (("b", np.float32(weight) * vectors.lambda_b), ("d", vectors.lambda_d)):
            parameter = getattr(layer, f"vera_lambda_{kind}")[name]
            if tuple(parameter.shape) != values.shape:
                raise MismatchError(
                    f"lambda_{kind} of {module} in {adapter.path} has {values.size} values, and the base's "
                    f"layer takes {parameter.numel()}"
                )
            parameter.data = torch.from_numpy(np.array(values, np.float32))


def _set_saved_modules(model: Any, name: str, adapter: Adapter) -> list[_Swap]:
    """Put the adapter's whole copies of modules where PEFT keeps them, so that it switches them itself.

    Returns what it won't: embeddings and heads that are saved since they are adapted, not trained whole.
    """
    swaps = []
    wrappers = {
        path: wrapper
        for path, wrapper in model.named_modules()
        if name in getattr(wrapper, "modules_to_save", ())
    }
    for key, raw in adapter.modules_to_save.items():
        path = next((path for path in wrappers if key.startswith(f"{path}.")), None)
        if path is None:
            swaps.append(_swap(model, key, raw.float32(), adapter))
            continue
        parameter = wrappers[path].modules_to_save[name].get_parameter(key.removeprefix(f"{path}."))
        if tuple(parameter.shape) != raw.shape:
            raise MismatchError(
                f"{key} of {adapter.path} has shape {list(raw.shape)}, and the base's {list(parameter.shape)}"
            )
        parameter.data = torch.from_numpy(np.array(raw.float32()))
    return swaps


def _swap(model: nn.Module, name: str, values: Float32, adapter: Adapter) -> _Swap:
    """Put a tensor that the adapter holds whole in the place of the base's."""
    module, _, last = name.rpartition(".")  # an adapted layer holds the base's as a part
    known = dict(model.named_parameters(remove_duplicate=False))
    parameter = known.get(f"{module}.base_layer.{last}", known.get(name))
    if parameter is None or tuple(parameter.shape) != values.shape:
        raise MismatchError(
            f"{adapter.path} holds {name} of shape {list(values.shape)}, where the base has none like it"
        )
    base, trained = parameter.data, torch.from_numpy(np.array(values, np.float32))
    parameter.data = trained
    return _Swap(parameter, trained, base)


def load_as_stored(checkpoint: Checkpoint, auto_class: str = "AutoModelForCausalLM") -> TorchReference:
    """The checkpoint as its users load it: transformers' own loading, bitsandbytes' own kernels, no adapter.

    Those kernels have a noise of their own (a mean KL of about 2e-4 on SmolLM2). Raises CheckpointError when
    transformers can't load it.
    """
    config = config_of(checkpoint, quantized=True)
    options = {"dtype": torch.float32, "device_map": "cpu", "use_safetensors": True, **LOCAL}
    with quiet():
        try:
            model = getattr(transformers, auto_class).from_pretrained(
                checkpoint.path, config=config, **options
            )
        except Exception as cause:  # of transformers, and of whatever package reads the format
            raise CheckpointError(f"transformers can't load {checkpoint.path}: {first_line(cause)}") from None
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    return TorchReference(model.eval(), vocabulary, has_adapter=False)
