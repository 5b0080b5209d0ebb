"""What a model does, by its class: text, classes, embeddings; and which class an adapter was trained on.

A base's config.json names the class it was saved as. PEFT wraps what the trainer loaded, which may be another
class of the same family: a classifier on a base of a masked or a causal language model, say. The adapter's
config tells: `task_type`, or `auto_mapping` where no task type was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vera_edge.adapters.adapter import Adapter
from vera_edge.errors import MismatchError

# What ends the names of the classes that generate text.
DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
TEXT, CLASSES, TOKEN_CLASSES, SPANS, EMBEDDINGS = (
    "text",
    "classes",
    "classes of tokens",
    "spans",
    "embeddings",
)


@dataclass(frozen=True)
class Task:
    """What a model does.

    name: as Optimum and the Hugging Face hub call it, empty for an unknown one. auto_class: what loads it in
    transformers. endings: of its classes' names. gives: one of TEXT, CLASSES, TOKEN_CLASSES, SPANS and
    EMBEDDINGS. mapping: where transformers lists its classes by model type. peft: what PEFT calls it.
    """

    name: str
    auto_class: str
    endings: tuple[str, ...]
    gives: str
    mapping: str
    peft: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether its head has a row for each label."""
        return self.gives in (CLASSES, TOKEN_CLASSES)


TEXT_GENERATION = Task(
    "text-generation",
    "AutoModelForCausalLM",
    DECODERS,
    TEXT,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM",
)
_FEATURES = Task(
    "feature-extraction",
    "AutoModel",
    ("Model",),
    EMBEDDINGS,
    "MODEL_MAPPING_NAMES",
    "FEATURE_EXTRACTION",
)
_TASKS = (
    TEXT_GENERATION,
    Task("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), TEXT, "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
        CLASSES,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "SEQ_CLS",
    ),
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        ("ForTokenClassification",),
        TOKEN_CLASSES,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "TOKEN_CLS",
    ),
    Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        SPANS,
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        "QUESTION_ANS",
    ),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        ("ForImageClassification",),
        CLASSES,
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "audio-classification",
        "AutoModelForAudioClassification",
        ("ForAudioClassification",),
        CLASSES,
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    ),
    _FEATURES,
)
# A class of none of these endings: its words, where it has some, are asked as a decoder's are.
_OTHER = Task("", "AutoModelForCausalLM", (), TEXT, "")
_TWO_HALVES = Task(
    "text2text-generation",
    "AutoModelForSeq2SeqLM",
    (),
    TEXT,
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM",
)
_BY_PEFT = {task.peft: task for task in (*_TASKS, _TWO_HALVES) if task.peft}


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a config.json names, empty when it names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def of(config: Mapping[str, Any]) -> Task:
    """What the model of a config.json does."""
    return of_class(architecture(config))


def of_class(name: str) -> Task:
    """What the models of a class do, by its name."""
    return next((task for task in _TASKS if name.endswith(task.endings)), _OTHER)


def main_input(config: Mapping[str, Any]) -> str:
    """What the model reads: "input_ids" where it takes text, or where transformers doesn't know it."""
    import transformers

    name = architecture(config)
    found = getattr(getattr(transformers, name, None), "main_input_name", "input_ids")
    return "input_ids" if "text_config" in config else str(found)


def is_decoder(name: str) -> bool:
    """Whether the models of a class generate text."""
    return name.endswith(DECODERS)


def class_of_all(config: Mapping[str, Any], adapters: Sequence[Adapter], pooled: bool) -> str:
    """The class that `adapters` were trained on, on a base of this config; the base's own without adapters.

    pooled: the folders say how embeddings are made (modules.json). Then what generates text by its name is
    meant to give embeddings.
    Raises MismatchError when two adapters were trained on two classes, or transformers has none for the task.
    """
    found: dict[str, Adapter] = {}
    for adapter in adapters:
        found.setdefault(_class_of(config, adapter), adapter)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise MismatchError(
            f"{first.path} was trained on a {one or 'model of no class'} and {second.path} on a {other}, "
            "which one model can't be; take one of them"
        )
    name = next(iter(found), architecture(config))
    if pooled and is_decoder(name) and not _trained_head(adapters):
        return _class_for(_FEATURES, config, "modules.json asks for embeddings")
    return name


def _trained_head(adapters: Sequence[Adapter]) -> bool:
    names = [name for adapter in adapters for name in (*adapter.vectors, *adapter.modules_to_save)]
    return any("lm_head" in name.split(".") for name in names)


def _class_of(config: Mapping[str, Any], adapter: Adapter) -> str:
    base = architecture(config)
    mapping, kind = adapter.config.get("auto_mapping"), adapter.config.get("task_type")
    if isinstance(mapping, Mapping):
        name, library = mapping.get("base_model_class"), str(mapping.get("parent_library"))
        if isinstance(name, str) and library.startswith("transformers.models."):
            # A decoder may have been loaded without the eyes and ears that its checkpoint has.
            return base if is_decoder(name) and is_decoder(base) else name
    task = _BY_PEFT.get(str(kind).removeprefix("TaskType."))
    if task is None or _does(base, task) or _is_of_another_type(base, config):
        return base
    if task.gives == TEXT and not _is_known(config):
        return base  # a model of its own code, whose weights can be merged all the same
    return _class_for(task, config, f"{adapter.path} was trained for {task.name} (task_type {task.peft})")


def _does(base: str, task: Task) -> bool:
    """Whether a base's class does a task as it is; heads over the vocabulary are the same in all of those."""
    if task.gives == TEXT:
        return of_class(base).gives == TEXT
    return base.endswith(task.endings) and not is_decoder(base)


def _is_of_another_type(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a config.json names a class of another model type than its own: then it decides nothing."""
    import transformers

    found = getattr(getattr(transformers, name, None), "config_class", None)
    return found is not None and found.model_type != config.get("model_type")


def _is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has models of this type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def _class_for(task: Task, config: Mapping[str, Any], why: str) -> str:
    from transformers.models.auto import modeling_auto  # imports torch

    model_type = config.get("model_type")
    name = getattr(modeling_auto, task.mapping).get(model_type)
    if isinstance(name, tuple):  # several, the usual one first
        name = name[0]
    if name is None:
        raise MismatchError(
            f"{why}, and transformers has no {task.auto_class} for model type {model_type!r}; give the base "
            "it was trained on"
        )
    return str(name)
