"""The order of imports: each module imports only from those above it, function level included."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room (a package of vera_edge, or a module beside them) imports only from rooms above it, or from within.
ORDER = (
    "import_path",
    "printable",
    "errors",
    "sizes",
    "progress",
    "cores",
    "memory",
    "arrays",
    "name_pattern",
    "divergence",
    "versions",
    "quiet",
    "parallel",
    "storage",
    "adapters",
    "formats",
    "requantize",
    "text",
    "tasks",
    "base",
    "trained",
    "plans",
    "merging",
    "combining",
    "reference",
    "training",
    "bundle",
    "device",
    "serving",
    "exporting",
    "measuring",
    "rounding",
    "precision",
    "releasing",
    "api",
    "cli",
)
DEVICE_ROOMS = {"import_path", "printable", "errors", "progress", "cores", "memory", "arrays", "divergence"}
DEVICE_ROOMS |= {"storage", "adapters", "formats", "bundle", "name_pattern"}
DEVICE_ROOMS |= {"device", "serving"}
NOT_ON_THE_DEVICE = {
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "onnx",
    "onnx_ir",
    "onnxruntime_genai",
    "optimum",
}
EXPORTERS = {"vera_edge_onnx", "vera_edge_gguf"}
OVER_EXPORTERS = {"cli", "measuring", "releasing"}
NOT_FOR_HELP = (
    NOT_ON_THE_DEVICE | EXPORTERS | {"numpy", "onnxruntime", "tokenizers", "safetensors", "rich", "jinja2"}
)
# What a command may import beside the public interface (`vera_edge`, `vera_edge.api`) and its own package.
FOR_THE_COMMAND_LINE = {
    "vera_edge.errors": "what a command's exit code comes from",
    "vera_edge.printable": "what is printed goes through it",
    "vera_edge.progress": "the type of what draws a bar",
    "vera_edge.cores": "BLAS has to hear how many threads it may use before the first import of numpy",
}
NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "common", "misc", "manager"}


@cache
def modules() -> Mapping[str, Path]:
    """Every module of the packages, by dotted name."""
    roots = [ROOT / "vera_edge", *(ROOT / "exporters").glob("vera_edge_*")]
    found = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    """A module's source, parsed once for all that looks at it."""
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """The dotted names a module imports, anywhere in it; a name of ours is given as the module it lies in."""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in modules() else base)
    return frozenset(found)


def room(module: str) -> str:
    """`vera_edge.measuring.metrics` -> `measuring`."""
    return module.split(".")[1]


def core() -> Iterator[str]:
    return (name for name in modules() if name.startswith("vera_edge.") and name != "vera_edge.__main__")


def ours(module: str) -> Iterator[str]:
    return (name for name in imports(module) if name.startswith("vera_edge."))


def test_every_room_has_its_place_in_the_order() -> None:
    unknown = {room(name) for name in core()} - set(ORDER)
    assert not unknown, f"{sorted(unknown)}: give them a place in ORDER (and in ARCHITECTURE.md)"


def test_a_module_imports_only_from_above() -> None:
    place = {name: ORDER.index(room(name)) for name in core()}
    wrong = {
        module: below
        for module in core()
        if (below := [name for name in ours(module) if ORDER.index(room(name)) > place[module]])
    }
    assert not wrong, "these import what lies below them"


def test_no_two_modules_import_each_other() -> None:
    """But for `vera_edge` itself, whose imports only type checkers see."""
    graph = {name: set(imports(name)) & set(modules()) - {name, "vera_edge"} for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as cycle:
        pytest.fail(f"these import each other: {' -> '.join(cycle.args[1])}")


def importing(names: Iterable[str], packages: Collection[str]) -> dict[str, set[str]]:
    """Those of the modules that import one of the packages, with what they import of them."""
    found = {name: {one.split(".")[0] for one in imports(name)} & {*packages} for name in names}
    return {name: wrong for name, wrong in found.items() if wrong}


def test_only_the_command_line_imports_click() -> None:
    others = (name for name in modules() if not name.startswith("vera_edge.cli"))
    assert not importing(others, ("click", "rich"))


def test_what_runs_on_the_device_reaches_nothing_heavy() -> None:
    device = [name for name in core() if room(name) in DEVICE_ROOMS]
    assert not importing(device, NOT_ON_THE_DEVICE)
    assert not {name: there for name in device if (there := {room(one) for one in ours(name)} - DEVICE_ROOMS)}


def test_the_core_never_imports_an_exporter() -> None:
    assert not importing(core(), EXPORTERS)


def test_an_exporter_leaves_the_command_line_and_what_measures_alone() -> None:
    exporters = [name for name in modules() if name.startswith("vera_edge_")]
    rooms = {name: {room(one) for one in ours(name)} for name in exporters}
    assert not {name: wrong for name, used in rooms.items() if (wrong := used & OVER_EXPORTERS)}


def test_the_command_line_calls_the_public_interface_and_nothing_else() -> None:
    allowed = FOR_THE_COMMAND_LINE.keys() | {"vera_edge"}
    wrong = {
        (module, name)
        for module in core()
        if room(module) == "cli"
        for name in imports(module)
        if name.split(".")[0].startswith("vera_edge")
        and name not in allowed
        and not name.startswith(("vera_edge.api", "vera_edge.cli"))
    }
    assert not wrong, "give the public interface what these need"


def test_nothing_below_the_command_line_imports_the_public_interface() -> None:
    """It is made of them; what they share with it is the version alone."""
    asked = {
        (module, alias.name)
        for module in modules()
        if "vera_edge.cli" not in module
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.module == "vera_edge"
        for alias in node.names
        if f"vera_edge.{alias.name}" not in modules()
    }
    assert {name for _, name in asked} <= {"__version__"}, asked


def test_a_file_name_says_what_the_file_does() -> None:
    assert not [name for name in modules() if set(name.split(".")) & NAMES_THAT_SAY_NOTHING]


def loaded_by(code: str) -> set[str]:
    """The top-level modules a fresh interpreter holds after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(n.split('.')[0] for n in sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_vera_edge_loads_nothing() -> None:
    """Not one module more than an interpreter has: that is what keeps it in a millisecond."""
    assert loaded_by("import vera_edge") - loaded_by("") == {"vera_edge"}


def test_the_public_interface_of_the_device_loads_nothing_heavy() -> None:
    names = ("Encoder", "Session", "bench", "fetch", "install", "open_bundle", "sign", "validate", "verify")
    assert not loaded_by(f"from vera_edge import {', '.join(names)}") & NOT_ON_THE_DEVICE


def test_help_loads_no_library_that_takes_time() -> None:
    code = "from vera_edge.cli import main\nmain(['--help'], standalone_mode=False)"
    assert not loaded_by(code) & NOT_FOR_HELP


def test_importing_the_device_part_loads_nothing_heavy() -> None:
    """All of it in one process, as each module in its own would load numpy and onnxruntime again."""
    device = sorted(name for name in core() if room(name) == "device")
    told = "import importlib, sys\n"
    told += f"for name in {device}:\n    importlib.import_module(name)\n"
    told += f"    heavy = {NOT_ON_THE_DEVICE} & set(sys.modules)\n    assert not heavy, (name, heavy)"
    assert "onnxruntime" in loaded_by(told)


def test_a_class_has_its_name_to_itself() -> None:
    places: dict[str, list[str]] = {}
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_the_table_of_rooms_is_what_the_rooms_say() -> None:
    from scripts.make_rooms_table import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run scripts/make_rooms_table.py"


PLACES = re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def test_the_places_that_the_architecture_names_are_there() -> None:
    missing = [place for place in sorted(set(PLACES)) if not _is_there(*place)]
    assert PLACES and not missing


def _is_there(file: str, name: str) -> bool:
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for part in filter(None, name.split(".")):
        inner = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == part
        ]
        if not inner:
            return False
        body = inner[0].body
    return True
