"""The reference: the model as it was trained, in torch.

Its base weights are the checkpoint's exact values, dequantized in float32 by our own readers and never by a
live quantized module (bitsandbytes repacks those in place at their first forward on a CPU). Its adapter stays
unmerged, in PEFT's own layers, with the projections it was trained with put in place of those that the
installed PEFT and torch would draw. Everything else, the architecture first, is transformers' own.

Memory is the model in float32 plus one tensor, or where that is too much (room.py) one layer, for models that
can be run so (streamed.py). Nothing is looked up on a network and no code of the checkpoint is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers

from vera_edge.adapters.adapter import Adapter
from vera_edge.adapters.projection import Projections
from vera_edge.arrays import Float32, Int64
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.errors import AdapterError, CheckpointError
from vera_edge.progress import Progress, silent
from vera_edge.quiet import first_line, quiet
from vera_edge.reference.adapted import Swap, with_adapters
from vera_edge.reference.bfloat16 import in_bfloat16
from vera_edge.reference.dense import dense_names, dense_tensor, matrices_of
from vera_edge.reference.layers import forward
from vera_edge.reference.loading import LOCAL, config_of, loaded
from vera_edge.reference.rotary import forget_lengths
from vera_edge.reference.stand_ins import StandIns
from vera_edge.reference.streamed import LayerStream
from vera_edge.trained.alignment import as_loaded


@dataclass(frozen=True)
class TorchReference:
    """A Runner over the model as trained; `adapter_off` and `bfloat16` view the same weights otherwise.

    stream: what runs the model layer by layer, where its weights aren't all in memory.
    """

    model: Any
    vocab_size: int
    has_adapter: bool
    swaps: tuple[Swap, ...] = ()
    adapter_on: bool = True
    autocast: bool = False
    stream: LayerStream | None = None

    @property
    def layer_by_layer(self) -> bool:
        """Whether its weights are read at every pass, a layer's at a time."""
        return self.stream is not None

    def logits(self, tokens: Int64) -> Float32:
        """Teacher-forced logits (n, vocab_size) float32 of one sequence of n token ids."""
        return next(self.logits_of([tokens]))

    def logits_of(self, windows: Sequence[Int64]) -> Iterator[Float32]:
        """`logits` of each window, one at a time: where weights are streamed, in one pass over them."""
        return (found for (found,) in self.logits_together([self], windows))

    @staticmethod
    def logits_together(
        views: Sequence[TorchReference],
        windows: Sequence[Int64],
        first: Sequence[int | None] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[Float32, ...]]:
        """Of each window the logits of several views of one model, for which its weights are read once.

        first: on how many of the windows each view is run, None or nothing for all; later tuples lack it.
        """
        return _together(views, windows, _logits, first, progress)

    def hidden(self, tokens: Int64) -> Float32:
        """An encoder's last hidden states (n, d) float32."""
        return next(self.hidden_of([tokens]))

    def hidden_of(self, texts: Sequence[Int64]) -> Iterator[Float32]:
        """`hidden` of each text, one at a time."""
        return self._outputs_of(texts, lambda found: _array(found.last_hidden_state[0]))

    def embed(self, tokens: Int64) -> Float32:
        """An encoder's embedding (d,) float32: the mean of its last hidden states over the tokens."""
        found: Float32 = self.hidden(tokens).mean(axis=0)
        return found

    def classify(self, tokens: Int64) -> Float32:
        """A classifier's logits (classes,) float32, or one's of tokens (n, classes)."""
        return next(self.classify_of([tokens]))

    def classify_of(self, texts: Sequence[Int64]) -> Iterator[Float32]:
        """`classify` of each text, one at a time."""
        return self._outputs_of(texts, _logits)

    def spans(self, tokens: Int64) -> Float32:
        """Logits (2, n) float32 of where an answer starts and ends among n tokens."""
        return next(self.spans_of([tokens]))

    def spans_of(self, texts: Sequence[Int64]) -> Iterator[Float32]:
        """`spans` of each text, one at a time."""
        return self._outputs_of(
            texts, lambda found: _array(torch.cat([found.start_logits, found.end_logits]))
        )

    def _outputs_of(self, texts: Sequence[Int64], take: Callable[[Any], Float32]) -> Iterator[Float32]:
        return (found for (found,) in _together([self], texts, take))

    def greedy(self, tokens: Int64, count: int, ends: Sequence[int]) -> list[int]:
        """The `count` tokens that follow, the likeliest each time, up to one of `ends`."""
        return self.greedy_of([tokens], count, ends)[0]

    def greedy_of(self, prompts: Sequence[Int64], count: int, ends: Sequence[int]) -> list[list[int]]:
        """`greedy` of each prompt: with a KV cache, or a token at a time of all where weights are streamed.

        Then each token costs a pass over all of the weights, and all of the texts.
        """
        if self.stream is None:
            return [self._greedy(prompt, count, ends) for prompt in prompts]
        texts, going = list(prompts), list(range(len(prompts)))
        for _ in range(count):
            last = self._outputs_of([texts[row] for row in going], lambda found: _array(found.logits[0, -1:]))
            for row, logits in zip(tuple(going), last, strict=True):
                texts[row] = np.append(texts[row], np.int64(logits[0].argmax()))
            going = [row for row in going if int(texts[row][-1]) not in ends]
            if not going:
                break
        return [
            [int(token) for token in text[len(prompt) :]] for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _greedy(self, tokens: Int64, count: int, ends: Sequence[int]) -> list[int]:
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
        forget_lengths(self.model)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if self.has_adapter and not self.adapter_on:
                stack.enter_context(self._without_adapter())
            if self.autocast:
                stack.enter_context(in_bfloat16())
            yield

    def adapter_off(self) -> TorchReference:
        """The same base without the adapter: what an artefact falls back to when the adapter is lost."""
        return replace(self, adapter_on=False)

    def bfloat16(self) -> TorchReference:
        """The same model computed in bfloat16 (bfloat16.py): the noise floor that any runtime may have."""
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


def _together(
    views: Sequence[TorchReference],
    windows: Sequence[Int64],
    take: Callable[[Any], Float32],
    first: Sequence[int | None] = (),
    progress: Progress = silent,
) -> Iterator[tuple[Float32, ...]]:
    """What `take` makes of the model's output for each window, by view; see `logits_together`."""
    bounds = [*first, *(None for _ in range(len(views) - len(first)))]
    stream = views[0].stream
    if any(view.stream is not stream for view in views):
        alone = [_together([view], windows[:count], take) for view, count in zip(views, bounds, strict=True)]
        for _ in windows:
            yield tuple(found for runs in alone for found in next(runs, ()))
        return
    if stream is not None:
        yield from stream.outputs(views, windows, take, bounds, progress)
        return
    for row, window in enumerate(windows):
        found = []
        for view, count in zip(views, bounds, strict=True):
            if count is None or row < count:
                with view.running():
                    found.append(take(forward(view.model, window)))
        yield tuple(found)


def _logits(output: Any) -> Float32:
    return _array(output.logits[0])


def _array(values: torch.Tensor) -> Float32:
    found: Float32 = values.float().numpy()
    return found


def open_reference(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]] = (),
    projections: Projections | None = None,
    auto_class: str = "AutoModelForCausalLM",
    layer_by_layer: bool = False,
) -> TorchReference:
    """The model as trained: `checkpoint` with `adapters`, each with its weight, on their `projections`.

    A weight scales an adapter's delta. Without adapters it is the base itself. `auto_class` names the
    transformers class that knows the task ("AutoModel" for an encoder). layer_by_layer: read the weights at
    every pass, a layer's at a time, where the model can be run so (see `room.fits`); its `model` holds none.
    Raises CheckpointError when transformers doesn't know the architecture or a tensor is missing,
    MismatchError when an adapter doesn't fit, AdapterError when it holds what can't be put in place.
    """
    if not (adapters and adapters[0][0].is_vera):
        projections = None  # of others that stand beside the same base
    elif projections is None:
        raise AdapterError("a reference with an adapter needs the projections it was trained with")
    if layer_by_layer:
        light = load_light(checkpoint, auto_class)
        if light is not None:
            model, weights = light
            found = _as_trained(model, adapters, projections, auto_class)
            stream = LayerStream.of(found.model, weights, [found, found.adapter_off()])
            if stream is not None:
                return replace(found, stream=stream)
    return _as_trained(load_dense(checkpoint, auto_class), adapters, projections, auto_class)


def _as_trained(
    model: Any,
    adapters: Sequence[tuple[Adapter, float]],
    projections: Projections | None,
    auto_class: str,
) -> TorchReference:
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
    if not adapters:
        return TorchReference(model.eval(), vocabulary, has_adapter=False)
    speaks = auto_class == "AutoModelForCausalLM"
    trained = [(as_loaded(adapter, model, speaks), weight) for adapter, weight in adapters]
    with quiet():
        wrapped, swaps = with_adapters(model, trained, projections)
    return TorchReference(wrapped.eval(), vocabulary, True, tuple(swaps))


def load_dense(checkpoint: Checkpoint, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The checkpoint as a transformers model in float32, every linear dequantized exactly.

    Raises CheckpointError when transformers doesn't know the architecture or tensors are missing.
    """
    names = dense_names(checkpoint)
    return _loaded(checkpoint, auto_class, {name: dense_tensor(checkpoint, name) for name in names})


def load_from(
    checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], auto_class: str = "AutoModelForCausalLM"
) -> Any:
    """The same of tensors that are given, by their names in the checkpoint."""
    return _loaded(checkpoint, auto_class, tensors)


def load_light(
    checkpoint: Checkpoint,
    auto_class: str = "AutoModelForCausalLM",
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, values: values,
) -> tuple[Any, StandIns] | None:
    """The same with stand-ins for its matrices, which it takes no memory for; and what gives their values.

    change: gives what a matrix has instead, of its name in the checkpoint and its values. None where
    transformers makes the model's matrices of more than one of the checkpoint's, or of a part.
    """
    weights = StandIns(matrices_of(checkpoint), lambda name: change(name, dense_tensor(checkpoint, name)))
    tensors = {
        name: weights.tensors[name] if name in weights.tensors else dense_tensor(checkpoint, name)
        for name in dense_names(checkpoint)
    }
    try:
        model = _loaded(checkpoint, auto_class, tensors)
    except CheckpointError:  # said again, of the tensors themselves, when they are loaded
        return None
    return (model, weights) if weights.all_in(model) else None


def _loaded(checkpoint: Checkpoint, auto_class: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    config = config_of(checkpoint)
    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise CheckpointError(f"transformers has no {auto_class} for model type {config.model_type!r}")
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
