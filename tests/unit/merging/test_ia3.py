"""IA3 merged into quantized bases: factors of outputs go into the scales, and the codes stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest

from tests import peft_adapters, tiny
from tests.conftest import Cli
from vera_edge import merging as merge
from vera_edge.base.checkpoint import Checkpoint
from vera_edge.trained.trained_model import open_model

# Format -> the tensor of codes, and how far scales are rounded: float32's, or float16's.
CODES = {"nf4": (".weight", 1e-6), "int8": (".weight", 1e-6), "w4a16": (".weight_packed", 1e-3)}


@pytest.mark.parametrize("name", CODES)
def test_factors_of_outputs_change_scales_alone(
    name: str, tiny_llama: tiny.TinyLlama, tmp_path: Path, cli: Cli
) -> None:
    settings = peft.IA3Config(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    )
    adapter = peft_adapters.save(tiny_llama.fp32, tmp_path / "ia3", settings, 0.3)
    idle = peft.LoraConfig(r=1, target_modules=["q_proj"])
    nothing = peft_adapters.save(tiny_llama.fp32, tmp_path / "nothing", idle, 0.0)
    options = {"group_size": 32} if name == "w4a16" else None
    merge.to_folder(tiny_llama.fp32, [(nothing, 1.0)], tmp_path / "base", name, options)
    done = cli("merge", tmp_path / "base", adapter, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    base, merged = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "merged")
    model, (suffix, bound) = open_model(tmp_path / "base", [(adapter, 1.0)]), CODES[name]
    for module in model.adapters[0].adapter.vectors:
        wanted, found = merge.merged_weight(model, module), merged.dequantize(module)
        assert np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted), module
        assert not np.array_equal(found, base.dequantize(module))
        before, after = (one.tensors.read(module + suffix).data for one in (base, merged))
        assert np.array_equal(before, after), module
