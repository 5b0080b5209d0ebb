"""Nothing in a bundle, a base or an adapter runs as code, wherever one stands, and no command asks a hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests import foreign_code, tiny, tiny_encoder
from tests.conftest import ROOT
from tests.unit.bundle.test_signing import make_key
from vera_edge.bundle import contents as bundle
from vera_edge.cli import COMMANDS
from vera_edge.device.deploy import install
from vera_edge.exporting import golden_vectors, target

RECIPE = """
[release]
name = "tiny"
golden = false
[[base]]
id = "tiny"
path = "base"
[[adapter]]
id = "a"
base = "tiny"
path = "adapter"
[[adapter]]
id = "b"
base = "tiny"
path = "adapter"
[[variant]]
mode = "branch"
weights = "nf4"
[limits]
data = "text.txt"
min_retained = -9
tokens = 512
window = 32
"""
QUICK = "--tokens 512 --window 32"
PROMPTS = ("The adapter", "Merge the two")


# What the interpreter itself imports from a folder would leave compiled files there, which no manifest lists.
CLEAN = {"PYTHONDONTWRITEBYTECODE": "1"}
# Several commands in one process that looks for modules where `python -m vera_edge` does: what they share is
# loaded once, and there. It imports only what an interpreter has loaded, and says how each command ended.
SEVERAL = """
import os, sys
if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    from vera_edge.__main__ import main
    for line in sys.argv[1:]:
        sys.argv[1:], code = line.split(), 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        print(f"== {code}", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Hostile:
    """A base, an adapter and a branch bundle of theirs, each with foreign Python files in it."""

    root: Path

    @property
    def marks(self) -> Path:
        return self.root / "marks"

    def folder(self, name: str) -> Path:
        return self.root / name

    @cached_property
    def script(self) -> Path:
        """The `vera-edge` command, as an installer writes it from the project's entry point."""
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["vera-edge"]
        module, _, name = declared.partition(":")
        path = self.root / "bin" / "vera-edge"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"import sys\nfrom {module} import {name}\nsys.exit({name}())\n")
        return path

    def several(self, folder: Path, lines: Sequence[str]) -> list[tuple[int, str]]:
        """Commands in one process that stands in `folder`: how each ended, and what it said on stderr."""
        path = self.root / "bin" / "several.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(SEVERAL)
        # Were a question asked, this would be a yes to it.
        done = subprocess.run(
            [sys.executable, str(path), *lines], cwd=folder, env={**os.environ, **CLEAN}, input="y\n" * 8,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert "[y/N]" not in done.stdout + done.stderr
        *parts, rest = re.split(r"^== (\d+)\n", done.stderr, flags=re.MULTILINE)
        assert done.returncode == 0 and not rest and len(parts) == 2 * len(lines), done.stderr
        return [(int(code), said) for said, code in zip(parts[::2], parts[1::2], strict=True)]


@pytest.fixture(scope="module")
def hostile(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Hostile:
    made = Hostile(tmp_path_factory.mktemp("hostile"))
    base = foreign_code.name_own_code(shutil.copytree(tiny_llama.nf4, made.folder("base")))
    adapter = shutil.copytree(tiny_adapter, made.folder("adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    own = {"base_model_name_or_path": str(base), "auto_mapping": {"parent_library": "modeling_x"}}
    (adapter / "adapter_config.json").write_text(json.dumps(config | own))
    floats = foreign_code.name_own_code(shutil.copytree(tiny_llama.fp32, made.folder("float")))
    out = made.folder("bundle")
    target.export(base, [(adapter, 1.0)], out, mode="branch", weights="nf4")
    golden_vectors.ask(out, base, [(adapter, 1.0)], {"max_kl": 1e-3}, PROMPTS)
    for folder in (base, floats, adapter, out):
        foreign_code.plant(folder, made.marks)
    bundle.write(out, bundle.change(bundle.read(out)))
    (made.root / "text.txt").write_text(tiny.TEXT * 16)
    (made.root / "release.toml").write_text(RECIPE)
    make_key(made.root, "key")
    other = shutil.copytree(out, made.folder("other"))
    bundle.write(other, bundle.change(bundle.read(other), limits={"max_kl": 2e-3}))
    for name in ("installed", "twice"):
        install.install(out, made.folder(name))
    install.install(other, made.folder("twice"))
    install.make_patch(out, other, made.folder("patch"))
    foreign_code.plant(made.folder("patch"), made.marks)
    return made


# By command: the folder that one stands in, and the words. "copy" is a copy of the bundle; a word with braces
# is the path of something else. What stands in one folder is run in this order.
COMMAND_LINES: Mapping[str, tuple[str, str]] = {
    "inspect": ("adapter", ". --base {root}/base"),
    "projections": ("adapter", ". --base {root}/base"),
    "quantize": ("float", ". -o {new} --to nf4 --like {root}/adapter"),
    "plan": ("base", ". {root}/adapter -o {new}.json --max-size 10MB --method rtn --formats int8,fp32"),
    "merge": ("base", ". {root}/adapter -o {new} --to fp32"),
    "adapt": (
        "base",
        ". {root}/adapter --onto {root}/float -o {new} --calibration {root}/text.txt --steps 2",
    ),
    "export": ("base", ". {root}/adapter -o {new} --weights int8"),
    "drift": ("bundle", "{root}/adapter . --base {root}/base --data {root}/text.txt " + QUICK),
    "run": ("bundle", ". prompt --max-tokens 2"),
    "chat": ("bundle", ". --max-tokens 2"),
    "serve": ("bundle", ". --port 0"),
    "verify": ("bundle", "."),
    "install": ("bundle", ". {new} --validate"),
    "update": ("patch", ". {own}/installed"),
    "rollback": ("bundle", "{own}/twice"),
    "patch": ("bundle", ". {root}/other -o {new}"),
    "golden": ("copy", ". {root}/base {root}/adapter"),
    "validate": ("bundle", "."),
    "bench": ("bundle", ". --rounds 1 --prompt 2 --new 2"),
    "adapter pack": ("bundle", "{root}/adapter --for . -o {new}.onnx_adapter"),
    "adapter freeze": ("copy", "default --for . --name frozen"),
    "sign": ("copy", ". --key {root}/key.key"),
    "adapter list": ("bundle", "."),
    "adapter diff": ("adapter", ". ."),
    "adapter to-lora": ("adapter", ". --base {root}/base -o {new}"),
    "fetch": ("bundle", ". -o {new}"),
    "diff": ("bundle", ". {root}/other"),
    "release": ("base", "{root}/release.toml -o {new} --store {new}-store --workers 2"),
    "doctor": ("bundle", ""),
    "completion": ("bundle", "bash"),
}


def words_of(hostile: Hostile, command: str, own: Path) -> tuple[Path, list[str]]:
    """The folder that a command stands in, and its words; `own` is what it may write to."""
    folder, words = COMMAND_LINES[command]
    own.mkdir(exist_ok=True)
    stands = hostile.root / folder
    if folder == "copy":
        stands = shutil.copytree(hostile.root / "bundle", own / "copy")
    if "{own}" in words:
        for name in ("installed", "twice"):
            shutil.copytree(hostile.root / name, own / name, symlinks=True)
    return stands, words.format(root=hostile.root, new=own / "new", own=own).split()


def run(
    hostile: Hostile, command: str, tmp_path: Path, launcher: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """One command as a process of its own, from within the folder that holds foreign code."""
    stands, filled = words_of(hostile, command, tmp_path)
    launch = {"script": [sys.executable, str(hostile.script)], "module": [sys.executable, "-m", "vera_edge"]}
    whole, every = [*launch[launcher], *command.split(), *filled], {**os.environ, **CLEAN, **environment}
    if command == "serve":
        return until_it_serves(whole, stands, every)
    # Were a question asked, this would be a yes to it.
    return subprocess.run(
        whole, cwd=stands, env=every, input="y\n" * 8,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def until_it_serves(
    command: list[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by Ctrl-C only, which comes once it has said that it serves."""
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.readline()
    if "serving" in said:
        process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=600)[1]
    return subprocess.CompletedProcess(command, process.returncode, "", said + rest)


def test_every_command_is_among_them() -> None:
    assert {line.split()[0] for line in COMMAND_LINES} == set(COMMANDS)


# With -m Python looks in the working folder before anything else. As the installed script it doesn't, but the
# processes that some commands start might. These have a process each; a release as a module is below.
AS_SCRIPT = ("verify", "merge", "bench", "release")
AS_MODULE = ("verify", "bench", "chat", "serve")


@pytest.mark.parametrize(
    ("launcher", "command"),
    [*(("module", one) for one in AS_MODULE), *(("script", one) for one in AS_SCRIPT)],
)
def test_no_command_runs_code_of_the_folder_it_stands_in(
    hostile: Hostile, tmp_path: Path, launcher: str, command: str
) -> None:
    done = run(hostile, command, tmp_path, launcher, {})
    assert foreign_code.marks_in(hostile.marks) == []
    assert done.returncode == 0, done.stdout + done.stderr


TOGETHER = [name for name in COMMAND_LINES if name not in (*AS_MODULE, "release")]


@pytest.mark.parametrize("folder", sorted({COMMAND_LINES[name][0] for name in TOGETHER}))
def test_no_other_command_of_a_folder_runs_its_code(hostile: Hostile, tmp_path: Path, folder: str) -> None:
    names = [name for name in TOGETHER if COMMAND_LINES[name][0] == folder]
    filled = [words_of(hostile, name, tmp_path / str(at)) for at, name in enumerate(names)]
    found = hostile.several(
        filled[0][0], [" ".join([name, *words]) for name, (_, words) in zip(names, filled, strict=True)]
    )
    assert foreign_code.marks_in(hostile.marks) == []
    assert {name: said for name, (code, said) in zip(names, found, strict=True) if code} == {}


@pytest.mark.parametrize("command", ["bench", "adapter freeze"])
@pytest.mark.parametrize(("launcher", "entry"), [("script", ""), ("script", "./"), ("module", ".")])
def test_an_entry_of_pythonpath_that_leads_here_is_left_out(
    hostile: Hostile, tmp_path: Path, command: str, launcher: str, entry: str
) -> None:
    path = os.pathsep.join([entry, os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [entry, ""])
    done = run(hostile, command, tmp_path, launcher, {"PYTHONPATH": path})
    # These two the interpreter itself imports, before a command begins.
    ran = set(foreign_code.marks_in(hostile.marks)) - {"sitecustomize", "usercustomize"}
    for name in foreign_code.marks_in(hostile.marks):
        (hostile.marks / name).unlink()
    assert not ran
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_release_is_made_again_without_code_of_its_bundle(hostile: Hostile, tmp_path: Path) -> None:
    made = run(hostile, "release", tmp_path, "module", {})
    assert foreign_code.marks_in(hostile.marks) == []
    assert made.returncode == 0, made.stdout + made.stderr
    released = shutil.copytree(tmp_path / "new" / "a" / "onnx-branch-nf4", tmp_path / "released")
    foreign_code.plant(released, hostile.marks)
    manifest = bundle.read(released)
    (released / bundle.MANIFEST).unlink()
    bundle.write(released, bundle.change(manifest))
    words = [sys.executable, "-m", "vera_edge", "release", "rebuild", ".", "--inputs", str(hostile.root)]
    done = subprocess.run(words, cwd=released, capture_output=True, text=True, check=False)
    assert foreign_code.marks_in(hostile.marks) == []
    assert done.returncode == 3 and "click.py" in done.stderr, done.stderr  # what was planted is told


@pytest.mark.parametrize("stored", [False, True])
def test_a_model_that_is_its_own_code_is_refused_without_a_question(
    hostile: Hostile, tiny_llama: tiny.TinyLlama, tmp_path: Path, stored: bool
) -> None:
    """stored: as drift runs a base in its own kernels, and not its exact values."""
    base = shutil.copytree(tiny_llama.int8 if stored else hostile.root / "base", tmp_path / "base")
    foreign_code.plant(foreign_code.name_own_code(base), hostile.marks)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "x", "architectures": ["XModel"]}))
    adapter, out = hostile.root / "adapter", tmp_path / "out"
    lines = [f"export . {adapter} -o {tmp_path / 'graph'}", "drift . ."]
    if stored:
        lines = [f"drift {adapter} . --base {hostile.root / 'base'}"]
    else:
        lines.append(f"merge . {adapter} -o {out} --to int8")
    found = hostile.several(base, lines)
    assert foreign_code.marks_in(hostile.marks) == []
    if not stored:  # weights alone, of which all is known
        assert found.pop()[0] == 0 and out.is_dir() and not list(out.glob("*.py"))
    for code, said in found:
        assert code == 2 and said.count("\n") == 1, said


def test_a_model_that_asks_for_kernels_of_a_repository_runs_without_them(
    hostile: Hostile, tmp_path: Path
) -> None:
    """transformers fetches and runs what `attn_implementation` names, where the package kernels is there."""
    base = shutil.copytree(hostile.root / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    asked = config | {"attn_implementation": "kernels-community/x", "_attn_implementation": "x/y"}
    (base / "config.json").write_text(json.dumps(asked))
    adapter, text, out = hostile.root / "adapter", hostile.root / "text.txt", tmp_path / "out"
    lines = [
        f"export . {adapter} -o {out} --mode branch --weights fp32",
        f"drift {adapter} {out} --base . --data {text} {QUICK}",
        f"drift . . --data {text} {QUICK}",
    ]
    assert [said for code, said in hostile.several(base, lines) if code] == []
    assert "implementation" not in (out / "config.json").read_text()


NO_NETWORK = """
import json, socket, sys, traceback
def refused(*words, **more):
    with open({log!r}, "a") as stream:
        stream.write("".join(traceback.format_stack()))
    raise OSError("this test has no network")
socket.socket.connect = socket.socket.connect_ex = refused
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refused
from vera_edge.cli import main
for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_encoder.make(tiny_encoder.classifier(), tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_no_command_looks_anything_up_on_a_network(
    hostile: Hostile, classifier: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """With hubs' variables unset and every connection refused, and logged where it is swallowed."""
    base, adapter = classifier if kind == "encoder" else (hostile.root / "base", hostile.root / "adapter")
    shown = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in shown}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": "hf_x"}
    log, out = tmp_path / "connections", tmp_path / "out"
    script = tmp_path / "start.py"
    script.write_text(NO_NETWORK.format(log=str(log)))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join([*tiny.TEXT.splitlines(), *tiny_encoder.TEXTS] * 4))
    quick = ["--data", text, "--tokens", 512, "--window", 32]
    lines: list[list[object]] = [
        ["export", base, adapter, "-o", out, "--mode", "branch", "--weights", "fp32"],
        ["export", base, adapter, "-o", tmp_path / "int4", "--weights", "int4"],
        ["merge", base, adapter, "-o", tmp_path / "merged", "--to", "fp32"],
        ["golden", out, base, adapter],
        ["drift", adapter, out, "--base", base, *quick],
        ["drift", adapter, tmp_path / "merged", "--base", base, *quick],
        ["drift", base, base, *quick],
        ["validate", out],
    ]
    words = json.dumps([[str(word) for word in line] for line in lines])
    done = subprocess.run(
        [sys.executable, str(script), words], env=environment, capture_output=True, text=True, check=False
    )
    assert not log.exists(), log.read_text()[-3000:]
    assert done.returncode == 0, done.stdout + done.stderr
