"""What tests share: the real demo (prepared once, cached), tiny models, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings

from scripts.prepare_demo import Demo, prepare
from tests import tiny, tiny_bundle

# Before any of them is imported: no look at a hub, no bars and no advice in the tests' output.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Speed is no test's business, and a machine may be busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

SHOWN = (
    "numpy",
    "onnxruntime",
    "onnxruntime-genai",
    "onnx",
    "onnx-ir",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
)

ROOT = Path(__file__).resolve().parent.parent
Cli = Callable[..., Result]
CliProcess = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_report_header() -> str:
    """The versions a failure has to be read with."""
    found = []
    for name in SHOWN:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return f"python {sys.version.split()[0]}, " + ", ".join(found)


@pytest.fixture(scope="session")
def demo() -> Demo:
    """SmolLM2-135M-Instruct in float32 and NF4, a trained VeRA adapter, and text. Made on the first run."""
    return prepare()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tiny.TinyLlama:
    """A two-layer Llama; `.fp32`, `.bf16`, `.fp16`, `.sharded`, `.nf4`, `.fp4`, `.int8` are its folders."""
    return tiny.TinyLlama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_adapter(tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VeRA adapter, rank 8, on all seven linears of the tiny Llama's NF4 base; projections not saved."""
    return tiny.make_adapter(tiny_llama.nf4, tmp_path_factory.mktemp("tiny-adapter") / "adapter")


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer GPT-2 in fp32 (Conv1D weights)."""
    return tiny.make_gpt2(tmp_path_factory.mktemp("tiny-gpt2") / "fp32")


@pytest.fixture(scope="session")
def tiny_gpt2_adapter(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VeRA adapter on the Conv1D layers of the tiny GPT-2."""
    folder = tmp_path_factory.mktemp("tiny-gpt2-adapter") / "adapter"
    return tiny.make_adapter(tiny_gpt2, folder, targets=tiny.GPT2_LINEARS, fan_in_fan_out=True)


@pytest.fixture(scope="session")
def tiny_bundles(
    tiny_llama: tiny.TinyLlama, tmp_path_factory: pytest.TempPathFactory
) -> tiny_bundle.TinyBundles:
    """Bundles of the tiny Llama for the device; `.fp32`, `.int4`, `.branch`, `.rows` are their folders."""
    return tiny_bundle.TinyBundles(tiny_llama.fp32, tmp_path_factory.mktemp("tiny-bundles"))


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What would be published, as scripts/package makes it: a source distribution, and the wheel of that."""
    folder = tmp_path_factory.mktemp("published")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def wheel(published: Path) -> Path:
    """The project's wheel."""
    (built,) = published.glob("vera_edge-*.whl")
    return built


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and its plain dependencies, as on a device."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = str(ROOT / "constraints.txt")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
    subprocess.run([*install, "-c", constraints], check=True)
    return folder / "bin"


@pytest.fixture
def cli() -> Cli:
    """Runs `vera-edge WORDS...` in this process; the result has exit_code, stdout and stderr.

    An exception that isn't a VeraEdgeError goes through: a traceback is a bug.
    """
    from vera_edge.cli import main

    def run(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)

    return run


@pytest.fixture
def cli_process() -> CliProcess:
    """Runs `vera-edge WORDS...` in a process of its own."""

    def run(*words: object, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vera_edge", *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run
