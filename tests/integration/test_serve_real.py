"""The server on the real model in int8: the trained adapter and the base in one batch."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.prepare_demo import Demo
from tests.served import Served, served
from vera_edge.device.runtime.decoding import Steps
from vera_edge.device.runtime.rows import Rows
from vera_edge.device.runtime.session import Session
from vera_edge.exporting import target

pytestmark = pytest.mark.real
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Who wrote Hamlet?")


@pytest.fixture(scope="module")
def bundle(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in int8 with the trained adapter as a side-branch."""
    out = tmp_path_factory.mktemp("serve-real") / "smollm2"
    target.export(demo.base, [(demo.adapter, 1.0)], out, mode="branch", weights="int8")
    return out


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Served]:
    with served(bundle, "--rows", 6, "--threads", 2) as running:
        yield running


def ask(server: Served, model: str, question: str, **options: Any) -> tuple[str, list[float]]:
    """The text, and the log probability of each of its tokens."""
    found = server.client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        logprobs=True,
        **{"max_tokens": 24, "temperature": 0, **options},
    )
    choice = found.choices[0]
    return choice.message.content, [each.logprob for each in choice.logprobs.content]


def test_adapter_and_base_in_one_batch_answer_as_each_does_alone(server: Served) -> None:
    asked = [(model, question) for question in QUESTIONS for model in ("default", "base")]
    alone = [ask(server, *pair) for pair in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda pair: ask(server, *pair), asked)) == alone
    assert all(alone[at][1] != alone[at + 1][1] for at in range(0, 6, 2))


def test_rows_of_int8_products_are_the_same_bits_whatever_is_beside_them(bundle: Path) -> None:
    session = Session.open(bundle, threads=1)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(100, 1000, count) for count in (20, 33, 7, 50, 12)]
    vectors = [session.vectors_of(adapter) for adapter in ("default", None, "default", None, "default")]

    def run(numbers: list[int]) -> dict[int, list[Any]]:
        rows = Rows(session.decoder, 64, 5)
        for number in numbers:
            cache = session.decoder.cache(len(prompts[number]))
            Steps(session.decoder, cache, vectors[number]).prefill(prompts[number])
            rows.join(cache, len(prompts[number]), vectors[number])
        steps = [rows.feed([100 + at] * len(numbers)).copy() for at in range(4)]
        return {number: [step[place] for step in steps] for place, number in enumerate(numbers)}

    together = run([0, 1, 2, 3, 4])
    for number in range(5):
        np.testing.assert_array_equal(together[number], run([number])[number])


def test_who_goes_away_mid_stream_frees_a_row(server: Served) -> None:
    message = {"role": "user", "content": "Tell a long story of a river."}
    body = {"model": "default", "messages": [message], "max_tokens": 2000, "stream": True, "seed": 1}
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
        wire.sendall(head.encode() + data)
        assert wire.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert server.ask("GET", "/health")[1]["requests"] == 1
    until = time.monotonic() + 60
    while server.ask("GET", "/health")[1]["requests"]:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert ask(server, "base", QUESTIONS[0], max_tokens=4)[0]


def test_ctrl_c_ends_a_stream_with_a_word_and_no_traceback(bundle: Path) -> None:
    """`served` ends the server by Ctrl-C, and holds what it writes and how it exits."""
    body = {
        "model": "default",
        "prompt": "one two " * 8,
        "max_tokens": 8000,
        "stream": True,
        "temperature": 0,
    }
    with served(bundle, "--fast", "--context", 8192) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: {")
    rest = answer.read()
    connection.close()
    assert b"the server ends" in rest and rest.endswith(b"data: [DONE]\n\n")
