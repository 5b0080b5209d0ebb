"""Chat templates and detokenization, against transformers and the tokenizers package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from vera_edge.device.runtime.chat import BundleText, TextStream
from vera_edge.errors import BundleError, DataError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "é <b>" & {{ nothing }}'},
    {"role": "assistant", "content": "é"},
    {"role": "user", "content": "Again."},
]
TEMPLATES = {
    "plain": tiny.CHAT_TEMPLATE,
    "blocks": "{% for m in messages %}\n    {% if m.role == 'user' %}\nU:{{ m['content'] | trim }}\n"
    "    {% endif %}\n{% endfor %}\n{{ eos_token }}",
    "json": "{{ bos_token }}{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "unset": "{% if tools is defined and tools %}T{% endif %}{% if not documents %}D{% endif %}"
    "{{ add_generation_prompt }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    tiny.save_tokenizer(folder)
    return folder


def with_template(folder: Path, target: Path, template: str) -> Path:
    shutil.copytree(folder, target)
    (target / "chat_template.jinja").write_text(template)
    return target


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(folder: Path, tmp_path: Path, name: str) -> None:
    target = with_template(folder, tmp_path / "t", TEMPLATES[name])
    expected = transformers_tokenizer(target).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert BundleText(target).render(MESSAGES) == expected


def test_the_clock_is_the_templates(folder: Path, tmp_path: Path) -> None:
    text = BundleText(with_template(folder, tmp_path / "t", "{{ strftime_now('%Y') }}"))
    assert 2024 <= int(text.render([])) < 2200


def test_prompts_become_transformers_tokens(folder: Path) -> None:
    text, reference = BundleText(folder), transformers_tokenizer(folder)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert text.prompt(MESSAGES).tolist() == list(expected)
    assert text.prompt("The adapter", raw=True).tolist() == reference("The adapter")["input_ids"]
    assert text.prompt("Hi").tolist() == text.prompt([{"role": "user", "content": "Hi"}]).tolist()


def test_a_template_that_refuses_or_fails_says_so(folder: Path, tmp_path: Path) -> None:
    refusing = BundleText(
        with_template(folder, tmp_path / "r", "{{ raise_exception('roles must alternate') }}")
    )
    with pytest.raises(DataError, match="refuses these messages: roles must alternate"):
        refusing.render(MESSAGES)
    for index, broken in enumerate(
        ("{% for %}", "{{ 1 / 0 }}", "{{ nothing.at.all }}", "{{ messages[9].x.y }}")
    ):
        text = BundleText(with_template(folder, tmp_path / str(index), broken))
        with pytest.raises(BundleError, match="chat template fails"):
            text.render(MESSAGES)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/owned') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_the_sandbox_holds(folder: Path, tmp_path: Path, attack: str) -> None:
    text = BundleText(with_template(folder, tmp_path / "t", attack))
    with pytest.raises(BundleError, match="chat template fails"):
        text.render(list(MESSAGES))


def test_older_folders_have_the_template_in_the_config(folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(folder, tmp_path / "old")
    (target / "chat_template.jinja").unlink()
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert not BundleText(target).has_template
    with pytest.raises(BundleError, match="no chat template"):
        BundleText(target).render(MESSAGES)
    path.write_text(json.dumps(config | {"chat_template": "A{{ eos_token }}"}))
    assert BundleText(target).render([]) == "A<|im_end|>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "B"}]
    eos = {"content": "<|im_end|>", "lstrip": False}
    path.write_text(json.dumps(config | {"chat_template": named, "eos_token": eos}))
    assert BundleText(target).render([]) == "B"


def test_an_empty_prompt_and_a_half_character_are_refused(folder: Path) -> None:
    text = BundleText(folder)
    with pytest.raises(DataError, match="prompt is empty"):
        text.prompt("", raw=True)
    with pytest.raises(DataError, match="surrogate"):
        text.prompt("\ud83d", raw=True)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        BundleText(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json isn't a tokenizer"):
        BundleText(tmp_path)


def streamed(text: BundleText, tokens: list[int]) -> list[str]:
    stream = TextStream(text)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@given(sample=st.text(min_size=1, max_size=40))
def test_text_comes_back_whole_and_in_whole_characters(folder: Path, sample: str) -> None:
    text = BundleText(folder)
    try:
        tokens = text.tokens(sample).tolist()
    except DataError:
        return
    pieces = streamed(text, tokens)
    assert "".join(pieces) == text.text(tokens)
    if "�" not in sample:
        assert not any("�" in piece for piece in pieces)


@given(tokens=st.lists(st.integers(0, tiny.VOCABULARY - 1), max_size=60))
def test_any_tokens_stream_to_what_they_decode_to(folder: Path, tokens: list[int]) -> None:
    text = BundleText(folder)
    assert "".join(streamed(text, tokens)) == text.text(tokens)
    assert text.text(tokens) == transformers_tokenizer(folder).decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
def test_other_decoders_stream_too(tmp_path: Path, kind: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]
        )
        trainer: Any = trainers.BpeTrainer(
            vocab_size=500,
            show_progress=False,
            special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))],
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, show_progress=False, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(tiny.TEXT.splitlines(), trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = BundleText(tmp_path)
    for sample in (tiny.TEXT, "The adapter, and the base 日本 🙂!"):
        tokens = text.tokens(sample).tolist()
        assert "".join(streamed(text, tokens)) == text.text(tokens)
