"""Reads a LoRA that Olive wrote as an `.onnx_adapter` (`olive convert-adapters`), to be packed anew.

Its tensors are `MODULE.lora_A.weight` (in, r) and `MODULE.lora_B.weight` (r, out), PEFT's transposed, with
the scale in B. The names and the missing batch axis are those of Olive's own graphs, so the file itself fits
no other one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vera_edge.adapters.adapter import LORA, Adapter
from vera_edge.adapters.lora import LoraPair
from vera_edge.arrays import Array, Float32
from vera_edge.device.runtime.adapters import read_file
from vera_edge.errors import AdapterError
from vera_edge.storage.files import sha256_file

_A, _B = ".lora_A.weight", ".lora_B.weight"


def read(path: Path) -> Adapter:
    """The adapter in an `.onnx_adapter` of Olive's, in float32.

    Raises AdapterError when it can't be read, isn't Olive's, or is quantized.
    """
    arrays, _ = read_file(path)
    if quantized := [name for name in arrays if ".quant." in name]:
        raise AdapterError(
            f"{path} holds {quantized[0]}, an integer matrix; let Olive convert the adapter without "
            "--quantize_int4, or pack the PEFT folder itself"
        )
    strange = [name for name in arrays if not name.endswith((_A, _B))]
    if strange or not arrays:
        raise AdapterError(
            f"{path} holds {strange[0] if strange else 'nothing'}, and a LoRA of Olive's holds pairs named "
            f"MODULE{_A} and MODULE{_B}; pack the PEFT folder itself"
        )
    modules = sorted({name.removesuffix(_A).removesuffix(_B) for name in arrays})
    pairs = {module: _pair(arrays, module, path) for module in modules}
    return Adapter(
        path=path,
        name=path.stem,
        base_name=None,
        rank=max(pair.rank for pair in pairs.values()),
        seed=0,
        vectors=pairs,
        saved=None,
        biases={},
        modules_to_save={},
        config={},
        peft_version=None,
        digest=sha256_file(path),
        method=LORA,
    )


def _pair(arrays: dict[str, Array], module: str, path: Path) -> LoraPair:
    a, b = arrays.get(module + _A), arrays.get(module + _B)
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        shapes = [None if one is None else list(one.shape) for one in (a, b)]
        raise AdapterError(f"{path} holds no pair for {module}: {shapes} where (in, r) and (r, out) belong")
    return LoraPair(_turned(a, module, path), _turned(b, module, path), 1.0)


def _turned(matrix: Array, module: str, path: Path) -> Float32:
    if not np.isfinite(matrix).all():
        raise AdapterError(f"the pair of {module} in {path} holds NaN or infinity; the adapter is broken")
    return np.ascontiguousarray(matrix.T, np.float32)
