"""`vera-edge run` as a person meets it: no torch, text as it comes, one sentence on bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_bundle
from tests.conftest import Cli, CliProcess
from tests.tiny_bundle import TinyBundles, rewrite
from vera_edge.bundle import contents as bundle
from vera_edge.device.runtime.session import Session

PROMPT = "The adapter scales each row"
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "peft", "bitsandbytes", "onnxruntime_genai", "scipy"}


def test_it_prints_what_the_session_generates(tiny_bundles: TinyBundles, cli: Cli) -> None:
    expected = "".join(Session.open(tiny_bundles.fp32).generate(PROMPT, raw=True, max_tokens=12))
    result = cli("run", tiny_bundles.fp32, PROMPT, "--raw", "--max-tokens", 12)
    assert result.exit_code == 0 and result.stdout == expected + "\n"
    result = cli("run", tiny_bundles.fp32, PROMPT, "--raw", "--max-tokens", 12, "--json")
    found = json.loads(result.stdout)
    assert found["text"] == expected and found["finish"] in ("length", "end")
    assert len(found["tokens"]) <= 12 and found["prompt_tokens"] > 3
    assert found["verified"]["files"] == len(bundle.read(tiny_bundles.fp32).files)
    refused = cli("run", tiny_bundles.fp32, PROMPT, "--fast", "--reread")
    assert refused.exit_code == 2 and "contradict" in refused.stderr


def test_looking_ahead_changes_nothing_and_is_refused_where_it_would(
    tiny_bundles: TinyBundles, cli: Cli
) -> None:
    plain = cli("run", tiny_bundles.int4, PROMPT, "--raw", "--max-tokens", 12)
    ahead = cli("run", tiny_bundles.int4, PROMPT, "--raw", "--max-tokens", 12, "--speculate", 3)
    assert (ahead.exit_code, ahead.stdout) == (0, plain.stdout)
    refused = cli("run", tiny_bundles.fp32, PROMPT, "--raw", "--speculate", 3)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "blocks of 32" in refused.stderr


def test_the_adapter_is_chosen_by_name_file_or_none(tiny_bundles: TinyBundles, cli: Cli) -> None:
    file = tiny_bundles.branch / "adapters" / "second.onnx_adapter"
    choices: dict[str, list[object]] = {
        "default": [],
        "first": ["--adapter", "first"],
        "second": ["--adapter", "second"],
        "file": ["--adapter", file],
        "none": ["--adapter", "none"],
    }
    texts = {
        word: cli("run", tiny_bundles.branch, PROMPT, "--raw", "--max-tokens", 12, *words).stdout
        for word, words in choices.items()
    }
    assert texts["default"] == texts["first"] and texts["second"] == texts["file"]
    assert len({texts["first"], texts["second"], texts["none"]}) == 3


def test_a_system_message_reaches_the_template(tiny_bundles: TinyBundles, cli: Cli) -> None:
    with_system = cli("run", tiny_bundles.fp32, "Hi", "--system", "Be brief.", "--json", "--max-tokens", 2)
    without = cli("run", tiny_bundles.fp32, "Hi", "--json", "--max-tokens", 2)
    assert json.loads(with_system.stdout)["prompt_tokens"] > json.loads(without.stdout)["prompt_tokens"]


def test_arguments_reach_the_template(tiny_bundles: TinyBundles, tmp_path: Path, cli: Cli) -> None:
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "b")
    template = "{{ flag is false }}|{{ count }}|{{ name }}|{{ parts | length }}|{{ void is none }}|{{ text }}"
    (folder / "chat_template.jinja").write_text(template)
    rewrite(folder)
    given = {"flag": "False", "count": "3", "name": "x=y", "parts": '["a", 2]', "void": "null", "text": '"3"'}
    words = [part for name, value in given.items() for part in ("--template-arg", f"{name}={value}")]
    shown = json.loads(cli("run", folder, "Hi", *words, "--json", "--max-tokens", 1).stdout)
    expected = Session.open(folder).text.tokens("True|3|x=y|2|True|3", special=False)
    assert shown["prompt_tokens"] == len(expected)
    for wrong, says in (
        (
            ["--template-arg", "flags=1"],
            "doesn't read 'flags'; it reads: count, flag, name, parts, text, void",
        ),
        (["--template-arg", "flag=1", "--raw"], "flag is for a chat template, and this prompt goes without"),
        (["--template-arg", "tools=5"], "tools must be a list of objects"),
        (["--template-arg", "messages=[]"], "messages aren't a template argument"),
    ):
        refused = cli("run", folder, "Hi", *wrong)
        assert refused.exit_code == 2 and says in refused.stderr and refused.stderr.count("\n") == 1
    for wrong in (["flag"], ["=1"], ["a b=1"], ["flag=1", "flag=2"]):
        words = [part for word in wrong for part in ("--template-arg", word)]
        refused = cli("run", folder, "Hi", *words)
        assert refused.exit_code == 2 and "isn't NAME=VALUE" in refused.stderr


def test_no_framework_is_in_the_process(tiny_bundles: TinyBundles) -> None:
    code = (
        "import sys\n"
        "from vera_edge.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print('modules:', *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    words = ["run", str(tiny_bundles.branch), PROMPT, "--max-tokens", "4"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.rsplit("modules:", 1)[1].split())
    assert {"numpy", "onnxruntime", "tokenizers", "jinja2"} <= loaded
    assert not loaded & (HEAVY | {"rich", "asyncio"}), "a start is quicker without"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "x"], "isn't a folder"),
        (["{branch}", "x", "--adapter", "third"], "has no adapter named 'third'"),
        (["{branch}", "x", "--adapter", "./no.onnx_adapter"], "is missing"),
        (
            ["{fp32}", "x", "--temperature", "-1"],
            "temperature is -1.0",
        ),
        (["{branch}", "x", "--max-tokens", "-1"], "max_tokens is -1"),
        (["{branch}", "", "--raw"], "the prompt is empty"),
    ],
)
def test_bad_input_is_one_sentence(tiny_bundles: TinyBundles, cli: Cli, words: list[str], says: str) -> None:
    filled = [word.format(branch=tiny_bundles.branch, fp32=tiny_bundles.fp32) for word in words]
    result = cli("run", *filled)
    assert result.exit_code == 2 and says in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_a_damaged_bundle_is_refused_before_it_opens(
    tiny_bundles: TinyBundles, tmp_path: Path, cli_process: CliProcess
) -> None:
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "b")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("a", "b", 1))
    result = cli_process("run", folder, "x")
    assert result.returncode == 2 and "tokenizer.json is damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_the_system_refuses_is_one_sentence(tiny_bundles: TinyBundles, cli: Cli) -> None:
    result = cli("run", "x" * 5000, "x")
    assert result.exit_code == 2 and result.stderr.startswith("vera-edge: the system refuses xxx")
    assert result.stderr.count("\n") == 1
    program = [sys.executable, "-m", "vera_edge"]
    command = [*program, "run", str(tiny_bundles.fp32), "x", "--max-tokens", "1"]
    for words in (command, [*program, "--version"], [*program, "--help"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "refuses the standard output: No space left" in done.stderr
    closed = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command[:5], "-"], capture_output=True, text=True, check=False
    )
    assert closed.returncode == 2 and "no standard input" in closed.stderr


def test_a_token_that_the_model_lacks_is_one_sentence(
    tiny_bundles: TinyBundles, tmp_path: Path, cli_process: CliProcess
) -> None:
    """ONNX Runtime would write its own lines beside it, in colour."""
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "b")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 384, "content": "<|new|>", "special": True, **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    bundle.write(folder, bundle.change(bundle.read(folder)))
    done = cli_process("run", folder, "<|new|>", "--raw", "--max-tokens", 1)
    assert done.returncode == 2 and "ONNX Runtime fails on" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_adapter_that_is_called_none_is_not_taken_for_the_base(
    tiny_bundles: TinyBundles, tmp_path: Path, cli: Cli
) -> None:
    """A bundle from elsewhere may have one: exports don't (see test_export_decoder)."""
    folder = shutil.copytree(tiny_bundles.branch, tmp_path / "b")
    (folder / "adapters" / "second.onnx_adapter").rename(folder / "adapters" / "none.onnx_adapter")
    entry = {"file": "adapters/none.onnx_adapter", "digest": tiny_bundle.DIGEST}
    tiny_bundle.rewrite(folder, adapters={"first": bundle.read(folder).adapters["first"], "none": entry})
    words = ("run", folder, PROMPT, "--raw", "--max-tokens", 4, "--adapter")
    refused = cli(*words, "none")
    assert refused.exit_code == 2 and "give its file" in refused.stderr
    named = cli(*words, folder / "adapters" / "none.onnx_adapter")
    assert (
        named.exit_code == 0
        and named.stdout == cli(*words[:1], tiny_bundles.branch, *words[2:], "second").stdout
    )
