"""Files beside an adapter: those that win over the base's, against what transformers reads of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.conftest import Cli
from vera_edge import merging as merge
from vera_edge.base.trained_files import gather
from vera_edge.device.runtime.session import Session
from vera_edge.errors import CheckpointError, MismatchError
from vera_edge.exporting import target
from vera_edge.measuring.assess import DriftRequest, assess
from vera_edge.rounding.weight_rounding import Rounding
from vera_edge.storage import side_files

TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


def _tokenizer(folder: Path, **changes: Any) -> None:
    """The tiny tokenizer in `folder`, its tokenizer_config.json changed."""
    tiny.save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def base(tiny_llama: tiny.TinyLlama, tmp_path: Path) -> Path:
    """The tiny Llama, whose tokenizer has no chat template and ends text with <|endoftext|>."""
    folder = Path(shutil.copytree(tiny_llama.fp32, tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    _tokenizer(folder, eos_token="<|endoftext|>")
    (folder / "chat_template.jinja").unlink()
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0, "pad_token_id": 0}))
    return folder


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def test_nothing_is_said_of_files_that_are_the_bases(base: Path, adapter: Path) -> None:
    for name in side_files.copy(base, adapter, ["tokenizer.json", "tokenizer_config.json"]):
        (adapter / name).write_text(json.dumps(json.loads((adapter / name).read_text()), indent=7))
    files = gather(base, [adapter])
    assert files.notes == () and files.folders["tokenizer.json"] == adapter
    assert gather(base).folders.keys() == set(side_files.find(base))


def test_template_and_end_token_of_the_adapter_win(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    _tokenizer(adapter, eos_token="<|im_end|>")
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    (adapter / "README.md").write_text("the adapter's own card")
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert any("chat_template.jinja" in note and "adapter" in note for note in made.notes)
    assert any("text ends at '<|im_end|>' (id 2) too" in note for note in made.notes)
    session = Session.open(made.folder)
    assert session.text.render([{"role": "user", "content": "hi"}]) == "[hi]"
    assert {0, 2} <= set(session.decoder.ends)
    config = json.loads((made.folder / "genai_config.json").read_text())
    assert set(config["model"]["eos_token_id"]) == {0, 2}
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [0, 2]
    assert "card" not in (tmp_path / "m" / "README.md").read_text()


def test_a_setting_alone_changes_that_alone(base: Path, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    """A trainer's folder may have nothing but the template and the token that ends an answer."""
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    session = Session.open(made.folder)
    text = "The adapter scales each row."
    expected = gather(base).read("tokenizer.json")
    from tokenizers import Tokenizer

    assert session.text.tokens(text).tolist() == Tokenizer.from_str(expected.decode()).encode(text).ids
    assert session.text.special["bos_token"] == "<|im_start|>" and {0, 2} <= set(session.decoder.ends)
    assert cli("run", made.folder, "hi", "--max-tokens", 2).exit_code == 0


def test_generation_settings_of_the_adapter_win(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "top_k": 7}))
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out")
    settings = json.loads((made.folder / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [2, 5], "top_k": 7}
    assert {2, 5} <= set(Session.open(made.folder).decoder.ends)


def test_a_base_without_generation_settings_keeps_its_tokens(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    _tokenizer(adapter, eos_token="<|im_end|>")
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    settings = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [0, 2]}


def test_a_template_in_the_settings_is_neither_lost_nor_hidden(base: Path, adapter: Path) -> None:
    """Older trainers write the template into tokenizer_config.json, which a file of the base's would hide."""
    (base / "chat_template.jinja").write_text("base's")
    _tokenizer(adapter, chat_template=TEMPLATE)
    (adapter / "chat_template.jinja").unlink()
    assert "chat_template.jinja" not in gather(base, [adapter])
    (base / "chat_template.jinja").unlink()
    _tokenizer(base, chat_template="inline")
    (base / "chat_template.jinja").unlink()
    _tokenizer(adapter)
    (adapter / "chat_template.jinja").unlink()
    assert gather(base, [adapter]).read("chat_template.jinja") == b"inline"
    named = [{"name": "default", "template": "first"}, {"name": "tool", "template": "second"}]
    _tokenizer(base, chat_template=named)
    (base / "chat_template.jinja").unlink()
    files = gather(base, [adapter])
    assert files.read("chat_template.jinja") == b"first"
    assert files.read("additional_chat_templates/tool.jinja") == b"second"


def test_a_vocabulary_is_taken_whole(base: Path, adapter: Path) -> None:
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (base / name).write_text("{}")
    _tokenizer(adapter)
    names = gather(base, [adapter]).folders
    assert {"vocab.json", "merges.txt", "added_tokens.json"}.isdisjoint(names)
    (adapter / "tokenizer.json").unlink()
    (adapter / "added_tokens.json").write_text("{}")  # of a vocabulary that isn't there
    assert gather(base, [adapter]).folders["added_tokens.json"] == base


def test_two_adapters_with_two_tokenizers_need_a_word(
    base: Path, adapter: Path, tmp_path: Path, cli: Cli
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    _tokenizer(adapter, eos_token="<|im_end|>")
    assert gather(base, [adapter, other]).folders["tokenizer_config.json"] == adapter
    _tokenizer(other, eos_token="<|im_start|>")
    words = ("merge", base, adapter, "--adapter", f"{other}=1.0", "--to", "fp32", "-o", tmp_path / "m")
    result = cli(*words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "bring another tokenizer_config.json each" in result.stderr and "--tokenizer" in result.stderr
    result = cli(*words, "--tokenizer", other)
    assert result.exit_code == 0, result.stderr
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_start|>"


def test_a_folder_can_be_named_instead(base: Path, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    _tokenizer(adapter, eos_token="<|im_end|>")
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    result = cli("export", base, adapter, "-o", tmp_path / "out", "--tokenizer", base)
    assert result.exit_code == 0, result.stderr
    assert Session.open(tmp_path / "out").decoder.ends == {0}
    assert not Session.open(tmp_path / "out").text.has_template
    result = cli("drift", adapter, tmp_path / "out", "--base", base, "--tokenizer", base)
    assert result.exit_code == 0, result.stderr
    (tmp_path / "empty").mkdir()
    result = cli("export", base, adapter, "-o", tmp_path / "no", "--tokenizer", tmp_path / "empty")
    assert result.exit_code == 2 and "holds no tokenizer" in result.stderr


def test_each_of_many_adapters_has_its_own(base: Path, adapter: Path, tmp_path: Path, cli: Cli) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    _tokenizer(adapter, eos_token="<|im_end|>")
    _tokenizer(other, eos_token="<|im_start|>")
    result = cli("merge", base, adapter, other, "--each", "--to", "fp32", "-o", tmp_path / "m")
    assert result.exit_code == 0, result.stderr
    for name, token in (("adapter", "<|im_end|>"), ("other", "<|im_start|>")):
        settings = json.loads((tmp_path / "m" / name / "tokenizer_config.json").read_text())
        assert settings["eos_token"] == token


def _with_token(folder: Path, token: str, number: int) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    value["added_tokens"].append({"id": number, "content": token, **flags})
    path.write_text(json.dumps(value))


def test_a_token_without_a_row_is_no_matter_until_it_occurs(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """As in published models, whose last added token is beyond the embeddings."""
    _with_token(base, "<|beyond|>", tiny.VOCABULARY)
    rounding = Rounding("gptq", tokens=512)
    made = target.export(base, [(adapter, 1.0)], tmp_path / "out", weights="int4", rounding=rounding)
    assert any("1 tokens beyond the model's 384" in note for note in made.notes)
    merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    found = assess(DriftRequest(adapter, tmp_path / "m", base=base, tokens=256))
    assert found.fidelity.kl.mean.value < 1e-9
    assert any("beyond the model's 384" in note for note in found.notes)
    (tmp_path / "text").write_text(tiny.TEXT * 9 + "<|beyond|>")
    with pytest.raises(MismatchError, match=r"holds the token '<\|beyond\|>' of id 384") as caught:
        assess(DriftRequest(adapter, tmp_path / "m", base=base, tokens=256, data=str(tmp_path / "text")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("token", "number", "message"),
    [
        ("<|new|>", 384, "'<|new|>' the id 384, and the model has embeddings for 384"),
        ("the", 7, "another model"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    base: Path, adapter: Path, tmp_path: Path, token: str, number: int, message: str, cli: Cli
) -> None:
    _tokenizer(adapter)
    if number < 384:
        path = adapter / "tokenizer.json"
        value = json.loads(path.read_text())
        vocabulary = value["model"]["vocab"]
        here, there = (name for name, at in vocabulary.items() if at in (300, 301))
        vocabulary[here], vocabulary[there] = vocabulary[there], vocabulary[here]
        path.write_text(json.dumps(value))
    else:
        _with_token(adapter, token, number)
    result = cli("merge", base, adapter, "-o", tmp_path / "m", "--to", "fp32")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert message in result.stderr and "--tokenizer" in result.stderr
    assert (
        cli("merge", base, adapter, "-o", tmp_path / "m", "--to", "fp32", "--tokenizer", base).exit_code == 0
    )


def test_a_padding_token_beyond_the_rows_is_let_be(base: Path, adapter: Path) -> None:
    _tokenizer(adapter, pad_token="<pad>")
    _with_token(adapter, "<pad>", 384)
    from vera_edge.trained import model as trained_base

    checkpoint, _ = trained_base.read(base, [(adapter, 1.0)])
    assert checkpoint.files.folders["tokenizer.json"] == adapter


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_file_beside_the_adapter_is_refused(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    _tokenizer(adapter)
    (adapter / name).write_text("{")
    with pytest.raises(CheckpointError, match=name) as caught:
        target.export(base, [(adapter, 1.0)], tmp_path / "out")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_a_link_out_of_the_adapters_folder_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of"):
        merge.to_folder(base, [(adapter, 1.0)], tmp_path / "m", to="fp32")
    assert not (tmp_path / "m").exists()
