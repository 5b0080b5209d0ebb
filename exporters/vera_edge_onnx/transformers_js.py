"""What config.json tells Transformers.js of the files: which to open by itself, and what lies beside them.

A browser can't look into a folder: it fetches the data files whose number config.json gives, by their names
(`model.onnx_data`, `model.onnx_data_1`), and by itself it would fetch `model_quantized.onnx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from vera_edge_onnx.graph.storage import more_file

KEY = "transformers.js_config"


def described(config: Mapping[str, Any], graph: Path) -> dict[str, Any]:
    """`config` with what Transformers.js reads there, for a graph whose data files are beside it.

    dtype "fp32" names the file without a suffix; how weights are stored is the graph's own business.
    """
    files = [graph.with_name(f"{graph.name}_data")]
    files += takewhile(Path.is_file, (more_file(graph, number) for number in count()))
    told = {"dtype": "fp32", "use_external_data_format": {graph.name: len(files)}}
    return {**config, KEY: told}
