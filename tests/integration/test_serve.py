"""`vera-edge serve` as clients meet it: OpenAI's own, and raw HTTP, against a process over a tiny bundle."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vera_edge
from tests import tiny, tiny_bundle, tiny_encoder
from tests.served import Served, served
from tests.test_docs import BLOCK, ROOT, shell_lines
from tests.tiny_bundle import TinyBundles, TorchRunner
from tests.unit.bundle.test_signing import make_key
from vera_edge.bundle import signing
from vera_edge.bundle.signing import Signer
from vera_edge.device.runtime.session import Session

PROMPT = "The adapter scales each row"
MESSAGES = [{"role": "user", "content": "Merge the two."}]
ADAPTERS = {"first": "first", "second": "second", "base": None, "bundle": "first"}


@pytest.fixture(scope="module")
def folder(tiny_bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose rows may run different adapters, in a folder called bundle."""
    return shutil.copytree(tiny_bundles.rows, tmp_path_factory.mktemp("serve") / "bundle")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder, "--rows", 4, "--max-body", 65536) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return server.client()


def complete(client: Any, model: str, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(
        model=model, prompt=prompt, **{"max_tokens": 12, "temperature": 0, **options}
    )


def test_every_adapter_is_a_model_and_so_is_the_base(client: Any, server: Served) -> None:
    assert {model.id for model in client.models.list()} == set(ADAPTERS)
    assert client.models.retrieve("second").id == "second"
    assert server.said.startswith("serving first, second, base, bundle on http://127.0.0.1:")


@pytest.mark.parametrize("model", ADAPTERS)
def test_text_is_that_of_the_session(client: Any, folder: Path, model: str) -> None:
    session = Session.open(folder, ADAPTERS[model], threads=1)
    generation = session.generate(PROMPT, raw=True, max_tokens=12)
    expected = "".join(generation)
    found = complete(client, model)
    assert found.choices[0].text == expected
    assert found.usage.prompt_tokens == len(generation.prompt)
    assert found.usage.completion_tokens == len(generation.tokens)
    assert found.choices[0].finish_reason == ("length" if generation.finish == "length" else "stop")
    chat = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, temperature=0)
    assert chat.choices[0].message.content == "".join(session.generate(MESSAGES, max_tokens=12))


def test_a_prompt_may_be_token_ids(client: Any, folder: Path) -> None:
    tokens = Session.open(folder).text.tokens(PROMPT)
    assert (
        complete(client, "first", tokens.tolist()).choices[0].text
        == complete(client, "first").choices[0].text
    )


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    asked = {"model": "second", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    events = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    deltas = [event.choices[0].delta for event in events if event.choices]
    assert deltas[0].role == "assistant" and len(deltas) > 3
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and set(reasons[:-1]) == {None}
    assert events[-1].usage == whole.usage and all(event.usage is None for event in events[:-1])
    pieces = complete(client, "second", stream=True)
    assert "".join(event.choices[0].text for event in pieces) == complete(client, "second").choices[0].text


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: Any) -> None:
    text = complete(client, "first").choices[0].text
    stop = text[5:8]
    stopped = complete(client, "first", stop=[stop, "never"], logprobs=0)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    whole = complete(client, "first", logprobs=0).choices[0].logprobs
    cut = stopped.choices[0].logprobs
    assert 0 < len(cut.tokens) < len(whole.tokens)
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert cut.text_offset[-1] < len(stopped.choices[0].text) <= whole.text_offset[len(cut.tokens)]


def test_a_seed_draws_the_same_text_whatever_else_runs(client: Any) -> None:
    def draw(seed: int) -> str:
        text: str = complete(client, "first", temperature=1.5, seed=seed, max_tokens=24).choices[0].text
        return text

    alone = [draw(seed) for seed in (7, 8, -7)]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(draw, (7, 8, -7) * 3)) == alone * 3


def test_log_probabilities_are_those_of_torch(client: Any, folder: Path, tiny_bundles: TinyBundles) -> None:
    import torch

    found = complete(client, "second", logprobs=3, temperature=0.8, seed=3)
    tokens = found.choices[0].logprobs
    generation = Session.open(folder, "second").generate(
        PROMPT, raw=True, max_tokens=12, temperature=0.8, seed=3
    )
    assert "".join(generation) == found.choices[0].text
    prompt, answer = generation.prompt, generation.tokens
    reference = TorchRunner(tiny_bundle.with_delta(tiny_bundles.base, tiny_bundle.vectors(2)))
    logits = reference.logits(np.array([*prompt, *answer], np.int64))
    expected = torch.log_softmax(torch.tensor(logits), -1)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(tokens.token_logprobs, expected[range(len(answer)), answer].numpy(), atol=2e-4)
    for row, top in zip(expected, tokens.top_logprobs, strict=True):
        np.testing.assert_allclose(sorted(top.values()), sorted(row.topk(3).values.tolist()), atol=2e-4)
    chat = client.chat.completions.create(
        model="second", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    content = chat.logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode("utf-8", "replace") == chat.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob for each in content)
    streamed = client.chat.completions.create(
        model="second", messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, stream=True
    )
    parts = [event.choices[0].logprobs for event in streamed]
    assert [each.logprob for part in parts if part for each in part.content] == [
        each.logprob for each in content
    ]


def test_adapters_together_give_what_each_gives_alone(client: Any) -> None:
    """To the last digit of each probability: the rows of one batch know nothing of each other."""
    prompts = [PROMPT, "Merge", "A small delta may fall between the grid points", "Base"]
    asked = [(model, prompt) for model in ADAPTERS for prompt in prompts]

    def ask(pair: tuple[str, str]) -> tuple[str, list[float]]:
        choice = complete(client, *pair, max_tokens=20, logprobs=0).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    alone = [ask(pair) for pair in asked]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert len({text for text, _ in alone}) > 8


def test_a_graph_that_takes_one_adapter_at_a_time_serves_them_all(tiny_bundles: TinyBundles) -> None:
    with served(tiny_bundles.branch, "--rows", 4) as running:
        client = running.client()

        def ask(model: str) -> str:
            text: str = complete(client, model, max_tokens=40).choices[0].text
            return text

        alone = {model: ask(model) for model in ("first", "second", "base")}
        assert len(set(alone.values())) == 3
        with ThreadPoolExecutor(9) as pool:
            names = list(alone) * 4
            assert list(pool.map(ask, names)) == [alone[name] for name in names]


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        (TEXT, b"{not json", 400, "isn't valid JSON"),
        (TEXT, b"[1]", 400, "isn't a JSON object"),
        (TEXT, b"\xff\xfe", 400, "isn't valid JSON"),
        (TEXT, b"[" * 60000, 400, "JSON values"),
        (TEXT, b'{"model": "' + b"x" * 70000, 413, "over 65536 bytes"),
        (TEXT, {"prompt": "x"}, 400, "model is missing"),
        (TEXT, {"model": "third", "prompt": "x"}, 404, "there is no model 'third' here, only: base, bundle"),
        (TEXT, {"model": "base"}, 400, "prompt must be one text"),
        (TEXT, {"model": "base", "prompt": ["a", "b"]}, 400, "prompt must be one text"),
        (TEXT, {"model": "base", "prompt": [99999]}, 400, "outside the vocabulary"),
        (TEXT, {"model": "base", "prompt": [-1]}, 400, "no token id"),
        (TEXT, {"model": "base", "prompt": ""}, 400, "the prompt is empty"),
        (TEXT, {"model": "base", "prompt": "x", "n": 2}, 400, "n must be 1"),
        (TEXT, {"model": "base", "prompt": "x", "echo": True}, 400, "echo isn't done here"),
        (TEXT, {"model": "base", "prompt": "x", "max_tokens": 0}, 400, "max_tokens must be a whole number"),
        (TEXT, {"model": "base", "prompt": "x", "max_tokens": True}, 400, "max_tokens must be"),
        (TEXT, {"model": "base", "prompt": "x", "temperature": "hot"}, 400, "temperature must be a number"),
        (TEXT, b'{"model": "base", "prompt": "x", "temperature": NaN}', 400, "temperature must be a number"),
        (TEXT, {"model": "base", "prompt": "x", "stop": [1]}, 400, "stop must be"),
        (TEXT, {"model": "base", "prompt": "x", "stop": ["a"] * 17}, 400, "stop must be"),
        (TEXT, {"model": "base", "prompt": "x", "logprobs": 21}, 400, "logprobs must be"),
        (TEXT, {"model": "base", "prompt": "x", "seed": 1.5}, 400, "seed must be a whole number"),
        (TEXT, {"model": "base", "prompt": "x", "presence_penalty": 1}, 400, "presence_penalty must be 0"),
        (TEXT, {"model": "base", "prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias must be empty"),
        (TEXT, {"model": "base", "prompt": "x", "typo": 1}, 400, "'typo' isn't known here"),
        (TEXT, {"model": "base", "prompt": "x " * 300}, 400, "and 256 fit with the answer"),
        (CHAT, {"model": "base", "messages": []}, 400, "messages must be a list"),
        (CHAT, {"model": "base", "messages": [{"role": "user"}]}, 400, "messages[0].content must be"),
        (CHAT, {"model": "base", "messages": [{"role": "x", "content": "y"}]}, 400, "messages[0].role"),
        (CHAT, {"model": "base", "messages": MESSAGES, "tools": [{}]}, 400, "tools can't be called here"),
        (CHAT, {"model": "base", "messages": MESSAGES, "top_logprobs": 2}, 400, "needs logprobs: true"),
        (CHAT, {"model": "base", "messages": MESSAGES, "stream_options": {"a": 1}}, 400, "needs stream"),
        (
            CHAT,
            {"model": "base", "messages": MESSAGES, "response_format": {"type": "json_object"}},
            400,
            "response_format can't be kept to",
        ),
        (
            CHAT,
            {"model": "base", "messages": MESSAGES, "chat_template_kwargs": {"typo": 1}},
            400,
            "the chat template doesn't read 'typo'",
        ),
        ("/v1/embeddings", {"model": "base", "input": "x"}, 400, "this model gives text"),
        ("/v1/nothing", {}, 404, "there is no POST /v1/nothing here"),
        ("/v1/models", {}, 405, "there is no POST /v1/models here"),
        ("/v1/adapters", {"name": "x", "path": "y"}, 403, "start with --adapters-from FOLDER"),
    ],
)
def test_a_wrong_request_gets_an_error_object_and_the_server_stays(
    server: Served, client: Any, path: str, body: Any, status: int, says: str
) -> None:
    found, answer, _ = server.ask("POST", path, body)
    assert (found, set(answer)) == (status, {"error"})
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert says in answer["error"]["message"]
    assert complete(client, "first", max_tokens=1).choices[0].finish_reason == "length"


# What may stand where something else belongs.
ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 3, 1e308, 10**20, -(2**63), 0.5, "", "x", "\0", "\u2028", "x" * 3000),
    *([], [1], [[1]], ["a"], ["a", "b"], [None], [3, 400], {}, {"type": "text"}, {"include_usage": 1}),
    *([{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "system"}], "first"),
)
MEMBERS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "repetition_penalty", "seed", "stop", "n", "stream", "stream_options", "logprobs", "tools"),
    *("top_logprobs", "chat_template_kwargs", "logit_bias", "echo", "suffix", "user", "response_format"),
)


def test_no_request_makes_the_server_fail(server: Served, client: Any) -> None:
    """Requests with two members that are something else than what belongs there."""
    draw = random.Random(0)
    seen = set()
    for number in range(300):
        path = (TEXT, CHAT, "/v1/embeddings", "/v1/adapters")[number % 4 if number < 40 else number % 2]
        body: dict[str, Any] = {"model": "second", "max_tokens": 2}
        body |= {"messages": MESSAGES} if path == CHAT else {"prompt": PROMPT}
        body |= {draw.choice(MEMBERS): draw.choice(ODD) for _ in range(2)}
        status = server.status("POST", path, body)
        assert status in (200, 400, 403, 404), (path, body, status)
        seen.add(status)
    assert seen >= {200, 400, 403}
    assert complete(client, "first", max_tokens=1).choices[0].finish_reason == "length"


def test_errors_are_what_the_client_has_classes_for(client: Any) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="there is no model"):
        complete(client, "third")
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "first", "x " * 300)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"


def test_a_body_of_unknown_length_is_bounded_too(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        wire.sendall(head + (b"2000\r\n" + b"x" * 8192 + b"\r\n") * 9)
        assert wire.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_away_leaves_its_place(server: Served) -> None:
    body = json.dumps(
        {"model": "first", "prompt": PROMPT, "max_tokens": 200, "stream": True, "logprobs": 20}
    ).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(12):  # more than rows
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as wire:
            wire.sendall(head + body)
            assert wire.recv(30).startswith(b"HTTP/1.1 200 ")
    until = time.monotonic() + 30
    while server.ask("GET", "/health")[1]["requests"]:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    with served(folder, "--rows", 1, "--queue", 0) as running:
        body = {"model": "first", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: running.ask("POST", TEXT, body), range(48)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    texts = {answer["choices"][0]["text"] for status, answer, _ in answers if status == 200}
    assert len(texts) == 1
    refused = next((answer, headers) for status, answer, headers in answers if status == 429)
    assert refused[0]["error"]["code"] == "queue_full" and int(refused[1]["Retry-After"]) >= 1


def test_a_request_may_not_take_for_ever(folder: Path) -> None:
    with served(folder, "--timeout", 0.001) as running:
        status, answer, _ = running.ask("POST", TEXT, {"model": "first", "prompt": PROMPT, "max_tokens": 200})
        assert status == 504 and "time-out" in answer["error"]["message"]
        assert running.ask("GET", "/health")[0] == 200


def test_without_a_key_only_this_machine_is_answered(server: Served) -> None:
    for headers in ({"Host": "attacker.example"}, {"Origin": "https://attacker.example"}, {"Host": "[::1"}):
        status, answer, _ = server.ask("GET", "/v1/models", headers=headers)
        assert status == 403 and answer["error"]["type"] == "permission_error"
    for headers in ({"Host": "localhost:1"}, {"Host": "[::1]:1"}, {"Origin": "http://localhost:3000"}):
        assert server.ask("GET", "/v1/models", headers=headers)[0] == 200


def test_a_key_is_asked_for_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    import openai

    (tmp_path / "key").write_text("secret\n")
    with served(folder, "--api-key-file", tmp_path / "key") as running:
        assert {model.id for model in running.client(api_key="secret").models.list()} == set(ADAPTERS)
        with pytest.raises(openai.AuthenticationError, match="API key"):
            running.client(api_key="wrong").models.list()
        assert running.ask("POST", TEXT, b"{")[0] == 401  # before anything else is looked at
        assert running.ask("GET", "/health")[0] == 200


def test_others_than_this_machine_need_a_key_and_a_port_may_be_taken(folder: Path) -> None:
    def ends(*words: object) -> str:
        command = [sys.executable, "-m", "vera_edge", "serve", str(folder), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "an API key is needed" in ends("--host", "0.0.0.0", "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in ends("--port", port)
    assert "rows is 0" in ends("--rows", 0, "--port", 0)
    assert "can't be read" in ends("--api-key-file", "nowhere", "--port", 0)
    assert "isn't a folder" in ends("--adapters-from", "nowhere", "--port", 0)


def test_adapters_come_and_go_while_it_runs(folder: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    (shelf / "deep").mkdir(parents=True)
    tiny_bundle.write_adapter(shelf / "third.onnx_adapter", tiny_bundle.vectors(3))
    tiny_bundle.write_adapter(shelf / "foreign.onnx_adapter", tiny_bundle.vectors(3), model_version=9)
    (shelf / "noise.onnx_adapter").write_bytes(b"noise" * 9)
    shutil.copytree(folder, shelf / "whole")
    shutil.copy(folder / "adapters" / "first.onnx_adapter", tmp_path / "outside.onnx_adapter")
    (shelf / "link.onnx_adapter").symlink_to(tmp_path / "outside.onnx_adapter")
    expected = "".join(
        Session.open(folder, shelf / "third.onnx_adapter", threads=1).generate(
            PROMPT, raw=True, max_tokens=12
        )
    )
    with served(folder, "--adapters-from", shelf) as running:

        def add(name: str, path: str) -> tuple[int, dict[str, Any]]:
            return running.ask("POST", "/v1/adapters", {"name": name, "path": path})[:2]

        client = running.client()
        assert add("new", "third.onnx_adapter")[0] == 201
        assert complete(client, "new").choices[0].text == expected
        assert add("whole", "whole")[0] == 201  # a bundle: its own default
        assert complete(client, "whole").choices[0].text == complete(client, "first").choices[0].text
        refused = {
            ("new", "third.onnx_adapter"): "there is a model 'new' already",
            ("base", "third.onnx_adapter"): "already",
            ("a/b", "third.onnx_adapter"): "letters, digits",
            ("x", "../outside.onnx_adapter"): "isn't among",
            ("x", str(tmp_path / "outside.onnx_adapter")): "isn't among",
            ("x", "link.onnx_adapter"): "isn't among",
            ("x", "."): "isn't among",
            ("x", "nothing"): "there is no 'nothing'",
            ("x", "\0"): "there is no",
            ("x", "noise.onnx_adapter"): "noise.onnx_adapter isn't an .onnx_adapter",
            ("x", "foreign.onnx_adapter"): "was made for another base",
            ("x", "deep"): "holds 0 .onnx_adapter files",
        }
        for (name, path), says in refused.items():
            status, answer = add(name, path)
            assert status in (400, 409) and says in answer["error"]["message"], (name, path, answer)
            assert str(shelf) not in answer["error"]["message"]
        assert running.ask("DELETE", "/v1/adapters/new")[1]["deleted"] is True
        assert running.ask("DELETE", "/v1/adapters/new")[0] == 404
        assert running.ask("DELETE", "/v1/adapters/first")[0] == 400
        assert {model.id for model in client.models.list()} == {*ADAPTERS, "whole"}


def test_an_adapter_that_is_added_is_signed_as_install_asks(folder: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    private, public = make_key(tmp_path, "publisher")
    other, _ = make_key(tmp_path, "other")
    for name, key in (("ours", private), ("theirs", other), ("unsigned", None)):
        (shelf / name).mkdir(parents=True)
        tiny_bundle.write_adapter(shelf / name / "a.onnx_adapter", tiny_bundle.vectors(3))
        if key is not None:
            signing.sign(shelf / name, Signer(key))
    shutil.copytree(shelf / "ours", shelf / "changed")
    tiny_bundle.write_adapter(shelf / "changed" / "a.onnx_adapter", tiny_bundle.vectors(4))
    shutil.copy(shelf / "ours" / "a.onnx_adapter", shelf / "lone.onnx_adapter")
    signed = shutil.copytree(folder, tmp_path / "signed")
    signing.sign(signed, Signer(private))
    with served(signed, "--adapters-from", shelf, "--trusted-keys", public) as running:
        assert "signed by publisher.pem" in running.said
        refused = {
            "theirs": "none of the 1 trusted keys",
            "unsigned": "a signature is required",
            "changed": "isn't what was signed",
            "lone.onnx_adapter": "carries no signature",
        }
        for path, says in refused.items():
            status, answer, _ = running.ask("POST", "/v1/adapters", {"name": "x", "path": path})
            assert status == 400 and says in answer["error"]["message"], answer
        status, answer, _ = running.ask("POST", "/v1/adapters", {"name": "x", "path": "ours"})
        assert status == 201 and answer["signed_by"] == "publisher.pem"


def test_eight_clients_at_once_take_no_more_memory_in_the_end(server: Served, client: Any) -> None:
    def ask(number: int) -> str:
        model = list(ADAPTERS)[number % len(ADAPTERS)]
        events = complete(client, model, f"Row {number % 7}", max_tokens=60, stream=True, logprobs=5)
        return "".join(event.choices[0].text for event in events)

    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(ask, range(84)))
        before = server.memory()
        for _ in range(4):
            assert list(pool.map(ask, range(84))) == first
    assert server.memory() < 1.1 * before


def test_a_merged_bundle_has_the_name_that_it_is_given(tiny_bundles: TinyBundles) -> None:
    with served(tiny_bundles.fp32, "--name", "merged", "--varying") as running:
        client = running.client()
        assert [model.id for model in client.models.list()] == ["merged"]
        session = Session.open(tiny_bundles.fp32, threads=1)
        expected = "".join(session.generate(PROMPT, raw=True, max_tokens=12))
        assert complete(client, "merged").choices[0].text == expected


def test_a_bundle_without_a_chat_template_completes(tiny_bundles: TinyBundles, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundles.fp32, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    tiny_bundle.rewrite(folder)
    with served(folder) as running:
        status, answer, _ = running.ask("POST", CHAT, {"model": "plain", "messages": MESSAGES})
        assert status == 400 and "no chat template; ask /v1/completions" in answer["error"]["message"]
        assert complete(running.client(), "plain").choices[0].text


def test_embeddings_are_those_of_the_encoder(tmp_path: Path) -> None:
    base, adapter = tiny_encoder.make(tiny_encoder.EMBEDDINGS, tmp_path)
    vera_edge.export(base, adapter, out=tmp_path / "embedder", mode="branch")
    texts = list(tiny_encoder.TEXTS)
    with served(tmp_path / "embedder") as running:
        client = running.client()
        for model, choice in (("default", "default"), ("base", None)):
            encoder = vera_edge.Encoder.open(tmp_path / "embedder", choice, threads=1)
            expected = encoder.embed(texts)
            found = client.embeddings.create(model=model, input=texts)
            np.testing.assert_array_equal([each.embedding for each in found.data], expected)
            plain = client.embeddings.create(model=model, input=texts[0], encoding_format="float")
            np.testing.assert_array_equal(
                np.array(plain.data[0].embedding, np.float32), encoder.embed(texts[:1])[0]
            )
            assert found.usage.total_tokens == sum(len(one.ids) for one in encoder.encode(texts))
        for body, says in (
            ({"model": "base", "input": []}, "input must be"),
            ({"model": "base", "input": ["a", ""]}, "empty text"),
            ({"model": "base", "input": [[1, 2]]}, "must hold texts"),
            ({"model": "base", "input": "a", "dimensions": 3}, "dimensions must be"),
        ):
            status, answer, _ = running.ask("POST", "/v1/embeddings", body)
            assert status == 400 and says in answer["error"]["message"]
        status, answer, _ = running.ask("POST", CHAT, {"model": "base", "messages": MESSAGES})
        assert status == 400 and "ask /v1/embeddings" in answer["error"]["message"]


def test_no_framework_is_in_the_process(server: Served) -> None:
    held = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in held
    assert not [name for name in ("libtorch", "transformers", "onnx_cpp2py") if name in held]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl isn't installed")
def test_curl_is_answered(server: Served) -> None:
    body = json.dumps({"model": "first", "prompt": PROMPT, "max_tokens": 4, "stream": True})
    done = subprocess.run(
        ["curl", "-sN", f"{server.url}/completions", "-d", body], capture_output=True, text=True, check=True
    )
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert events[-1] == "[DONE]" and all(json.loads(event)["object"] for event in events[:-1])


def test_the_recipes_of_the_manual_run(
    tiny_llama: tiny.TinyLlama, tiny_adapter: Path, tmp_path: Path
) -> None:
    """Every curl line and every Python block of docs/serve.md, in order, against one server."""
    vera_edge.export(tiny_llama.nf4, tiny_adapter, out=tmp_path / "bundle", mode="branch")
    (tmp_path / "shelf").mkdir()
    shutil.copy(
        tmp_path / "bundle" / "adapters" / "default.onnx_adapter",
        tmp_path / "shelf" / "french.onnx_adapter",
    )
    page = ROOT / "docs" / "serve.md"
    asked = [line for line in shell_lines(page) if line.startswith("curl ")]
    blocks = [text for kind, text in BLOCK.findall(page.read_text("utf-8")) if kind == "python"]
    assert len(asked) >= 6 and len(blocks) == 2
    with served(tmp_path / "bundle", "--adapters-from", tmp_path / "shelf") as running:
        here = f"127.0.0.1:{running.port}"
        for line in asked if shutil.which("curl") else ():
            words = shlex.split(line.replace("127.0.0.1:8000", here))
            done = subprocess.run([*words, "-sS"], capture_output=True, text=True, check=True)
            assert done.stdout and '"error"' not in done.stdout, line
        for block in blocks:
            code = block.replace("127.0.0.1:8000", here)
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0 and done.stdout, done.stderr
