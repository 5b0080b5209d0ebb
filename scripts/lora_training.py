"""Train the three LoRA adapters of examples/lora, each on another kind of base, as people train them.

    python -m scripts.lora_training [NAME ...]      every one, or those named, into examples/lora/NAME

They learn what the demo's VeRA adapter learns, to answer in the style of the Python reference, from the same
windows, in half a minute each on one thread. Fixed seeds, so that the same machine and versions give the
same tensors. The bases are those of `scripts.prepare_demo`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts import prepare_demo
from scripts.demo_text import QUESTION, split
from scripts.demo_training import Recipe, figures, fit, held_out, in_order, load_in_floats, settle
from vera_edge.progress import Progress, silent

FOLDER = prepare_demo.ROOT / "examples" / "lora"
ASKED = QUESTION.format(title='The "import" statement')
SPOKEN = 40  # tokens of the samples


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """Everything that decides what the training gives. base: its folder's name in the demo's folder."""

    rank: int = 4
    steps: int = 32
    warmup: int = 4
    learning_rate: float = 3e-3
    window: int = 96
    threads: int = 1
    judged: int = 8
    base: str = "smollm2-nf4"
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    alpha: int = 16
    rslora: bool = False
    dora: bool = False


RECIPES = {
    "qlora-nf4": LoraRecipe(rank=8),
    "lora-gptq": LoraRecipe(base="smollm2-gptq", targets=("v_proj", "down_proj"), alpha=8, rslora=True),
    "dora-bf16": LoraRecipe(base="smollm2-bf16", targets=("v_proj", "o_proj"), alpha=8, dora=True),
}


def train(base: Path, folder: Path, recipe: LoraRecipe, progress: Progress = silent) -> dict[str, Any]:
    """Train on `base`; write the adapter as PEFT saves it, with training.json and a card beside it."""
    model, tokenizer = prepared(base, recipe)
    started = time.process_time()
    losses = fit(model, in_order(split().train, tokenizer, recipe), recipe, progress)
    facts = figures(model, held_out(tokenizer, recipe), losses)
    model.save_pretrained(folder)
    facts["sample_adapter"] = _sample(model, tokenizer)
    with model.disable_adapter():
        facts["sample_base"] = _sample(model, tokenizer)
    facts["cpu_minutes"] = round((time.process_time() - started) / 60, 2)
    (folder / "README.md").write_text(_card(recipe, facts), encoding="utf-8")
    text = json.dumps({**asdict(recipe), **facts}, indent=2, ensure_ascii=False)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    return facts


def prepared(base: Path, recipe: LoraRecipe) -> tuple[Any, Any]:
    """The model as its training begins, in float32 beside the base's stored values, and its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    settle(recipe)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(_model(base), config), AutoTokenizer.from_pretrained(base)


def _model(base: Path) -> Any:
    """NF4 by bitsandbytes itself, which is what QLoRA means; the other bases by vera-edge's exact values."""
    from vera_edge.training import load

    settings = json.loads((base / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    return load_in_floats(base) if settings.get("quant_method") == "bitsandbytes" else load(base)


def _sample(model: Any, tokenizer: Any) -> str:
    """What the model answers to ASKED, greedily."""
    import torch

    chat = [{"role": "user", "content": ASKED}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=SPOKEN, do_sample=False, pad_token_id=0
        )
    return str(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True))


def _card(recipe: LoraRecipe, facts: dict[str, Any]) -> str:
    kind = "a DoRA" if recipe.dora else "an rsLoRA" if recipe.rslora else "a LoRA"
    return f"""\
---
base_model: SmolLM2-135M-Instruct
library_name: peft
license: apache-2.0
---
# Python reference style, as {kind} adapter

Rank {recipe.rank} on {", ".join(recipe.targets)} of `{recipe.base}`; trained by `scripts/lora_training.py`,
seed {recipe.seed}, for {recipe.steps} windows of {recipe.window} tokens on Python's language reference
(PSF License Version 2). Held-out perplexity: {facts["held_out_perplexity_base"]} without it,
{facts["held_out_perplexity_adapter"]} with it.
"""


def main() -> None:
    prepare_demo.hush()
    demo = prepare_demo.prepare()
    for name in sys.argv[1:] or RECIPES:
        recipe, folder = RECIPES[name], FOLDER / name
        folder.mkdir(parents=True, exist_ok=True)
        with prepare_demo.working_in(demo.folder):  # so that the adapter names its base, not a local path
            facts = train(Path(recipe.base), folder, recipe, prepare_demo.report)
        print(name, json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
