"""Train the demo's VeRA adapter: it teaches SmolLM2 to answer in the style of the Python reference.

Rank 256 on all seven linears of each layer, on the NF4 base itself, on the CPU. Two threads and fixed seeds,
so that the same machine and versions give the same adapter. What this gave once is kept in examples/adapter.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.demo_text import Topic, split
from vera_edge.progress import Progress, silent

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
END = "<|im_end|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the training gives."""

    rank: int = 256
    seed: int = 20240117
    steps: int = 160
    warmup: int = 8
    learning_rate: float = 2e-2
    window: int = 256  # tokens of one step
    threads: int = 2
    judged: int = 24  # held-out windows whose loss is measured before and after


def load_in_floats(base: Path) -> Any:
    """A base as transformers loads it, which computes in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype="float32")


def train(
    base: Path,
    folder: Path,
    recipe: Recipe,
    progress: Progress,
    load: Callable[[Path], Any] = load_in_floats,
) -> None:
    """Train on `base` and write the adapter as PEFT saves it, with training.json beside it.

    load: gives the model of a base, in float32.
    """
    model, tokenizer = _prepared(base, recipe, load)
    started = time.monotonic()
    losses = fit(model, in_order(split().train, tokenizer, recipe), recipe, progress)
    facts = figures(model, held_out(tokenizer, recipe), losses)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_card(recipe, facts), encoding="utf-8")
    facts["text_sha256"] = split().digest
    facts["minutes"] = round((time.monotonic() - started) / 60, 2)
    (folder / "training.json").write_text(json.dumps({**asdict(recipe), **facts}, indent=2) + "\n")


def first_losses(base: Path, recipe: Recipe, steps: int) -> list[float]:
    """The losses of the first steps of that training, and no more of it."""
    model, tokenizer = _prepared(base, recipe)
    return fit(model, in_order(split().train, tokenizer, recipe), recipe, silent, steps)


def held_out_losses(base: Path, adapter: Path, recipe: Recipe, every: int = 1) -> list[float]:
    """A trained adapter's loss on every `every`th held-out window, on `base`; nats per predicted token."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    judged = held_out(AutoTokenizer.from_pretrained(base), recipe)[::every]
    return _losses(PeftModel.from_pretrained(load_in_floats(base), adapter), judged)


def settle(recipe: Recipe) -> None:
    """Give torch the recipe's seed and threads, and operations that give the same twice."""
    import torch

    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)


def _prepared(base: Path, recipe: Recipe, load: Callable[[Path], Any] = load_in_floats) -> tuple[Any, Any]:
    """The model as its training begins, and its tokenizer."""
    from transformers import AutoTokenizer

    return adapted(base, recipe, load), AutoTokenizer.from_pretrained(base)


def adapted(base: Path, recipe: Recipe, load: Callable[[Path], Any] = load_in_floats) -> Any:
    """The model with a new VeRA adapter on all linears."""
    from peft import VeraConfig, get_peft_model

    settle(recipe)
    config = VeraConfig(
        r=recipe.rank,
        target_modules=list(LINEARS),
        projection_prng_key=recipe.seed,
        save_projection=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(load(base), config)


def held_out(tokenizer: Any, recipe: Recipe) -> list[list[int]]:
    """The held-out windows whose loss is measured."""
    every = [w for topic in split().evaluation for w in windows(topic, tokenizer, recipe.window)]
    return every[:: max(1, len(every) // recipe.judged)][: recipe.judged]


def windows(topic: Topic, tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Token windows of one topic: the question as a chat, the topic as its answer, cut every `length`."""
    chat = [{"role": "user", "content": topic.question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    tokens: list[int] = tokenizer(asked + topic.text + END)["input_ids"]
    for start in range(0, len(tokens), length):
        if len(tokens) - start > length // 8 or start == 0:
            yield tokens[start : start + length]


def in_order(topics: Sequence[Topic], tokenizer: Any, recipe: Recipe) -> list[list[int]]:
    """The windows in training order; a topic's first window, which holds the question, comes thrice."""
    cut = [list(windows(topic, tokenizer, recipe.window)) for topic in topics]
    pool = [window for topic in cut for window in topic] + [topic[0] for topic in cut] * 2
    chance = random.Random(recipe.seed)
    order: list[list[int]] = []
    while len(order) < recipe.steps:
        chance.shuffle(pool)
        order += pool
    return order[: recipe.steps]


def fit(
    model: Any,
    order: Sequence[Sequence[int]],
    recipe: Recipe,
    progress: Progress,
    steps: int | None = None,
) -> list[float]:
    """AdamW, linear warm-up, cosine decay, one window a step. Returns the loss of each step.

    steps: after how many to stop; all by default.
    """
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for step, window in enumerate(order[:steps]):
        rise = min(1.0, (step + 1) / recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rise * (0.5 + 0.5 * math.cos(math.pi * step / len(order)))
        batch = torch.tensor([list(window)])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        progress("training the adapter", step + 1, len(order))
    return losses


def figures(model: Any, judged: Sequence[Sequence[int]], losses: Sequence[float]) -> dict[str, Any]:
    with model.disable_adapter():
        without = _losses(model, judged)
    with_it = _losses(model, judged)
    return {
        "first_losses": [round(loss, 4) for loss in losses[:4]],
        "first_loss": round(sum(losses[:20]) / 20, 4),
        "last_loss": round(sum(losses[-20:]) / 20, 4),
        "held_out_losses": [round(loss, 4) for loss in with_it],
        "held_out_perplexity_base": round(_perplexity(without, judged), 4),
        "held_out_perplexity_adapter": round(_perplexity(with_it, judged), 4),
    }


def _losses(model: Any, judged: Sequence[Sequence[int]]) -> list[float]:
    """The mean negative log-likelihood per predicted token of each window, in nats."""
    import torch

    model.eval()
    losses = []
    with torch.no_grad():
        for window in judged:
            batch = torch.tensor([list(window)])
            losses.append(float(model(input_ids=batch, labels=batch).loss))
    return losses


def _perplexity(losses: Sequence[float], judged: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood per predicted token of all windows together."""
    counts = [len(window) - 1 for window in judged]
    return math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))


def _card(recipe: Recipe, facts: dict[str, Any]) -> str:
    return f"""\
---
base_model: SmolLM2-135M-Instruct
library_name: peft
license: apache-2.0
---
# Python reference style, as a VeRA adapter

Rank {recipe.rank} on {", ".join(LINEARS)}; trained by `scripts/demo_training.py` for {recipe.steps}
windows of {recipe.window} tokens on Python's language reference (PSF License Version 2), on the NF4 base.
Held-out perplexity: {facts["held_out_perplexity_base"]} without it,
{facts["held_out_perplexity_adapter"]} with it.
"""
