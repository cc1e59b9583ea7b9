"""Each of clients/examples runs as it stands and prints what the server says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardline_client import Client

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"
PROMPT = "The capital of France is"
CHAT = [{"role": "user", "content": "Name three rivers."}]


def run(interpreter: str, name: str, *arguments: str) -> str:
    command = [interpreter, str(EXAMPLES / name), *arguments]
    beside_python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # grpcurl
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | beside_python
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def completion(server):
    with Client(server["http"]) as client:
        return client.complete(PROMPT, max_tokens=8, temperature=0).text


@pytest.fixture(scope="module")
def answer(server):
    with Client(server["http"]) as client:
        return client.chat(CHAT, max_tokens=32, temperature=0).text


def test_openai(server, completion, answer):
    printed = run(sys.executable, "openai_sdk.py", server["http"])
    assert printed == f"{completion}\n{answer}\n"


def test_our_own(url, completion, answer):
    assert run(sys.executable, "shardline_sdk.py", url) == f"{completion}\n{answer}\n"


def test_our_own_in_asyncio(url, completion):
    printed = run(sys.executable, "shardline_async.py", url)
    assert printed.startswith(f"{completion}\n")


def test_curl(server, completion, answer):
    first, *events = run("sh", "curl.sh", server["http"]).split("\n", 1)
    assert json.loads(first)["choices"][0]["text"] == completion
    *records, done = [
        line.removeprefix("data: ") for line in events[0].split("\n\n") if line.strip()
    ]
    assert done == "[DONE]"
    deltas = [json.loads(record)["choices"][0]["delta"] for record in records]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer


def test_fetch(server, answer):
    assert run("node", "fetch.mjs", server["http"]) == f"{answer}\n"


def test_grpcurl(server, completion, answer):
    printed = run("sh", "grpcurl.sh", server["grpc"].removeprefix("grpc://"))
    whole, *pieces = decode_all(printed)
    assert whole["choices"][0]["text"] == completion
    assert "".join(piece.get("text", "") for piece in pieces) == answer
    assert pieces[-1]["usage"]


def decode_all(text: str) -> list[dict]:
    """JSON objects one after another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


def test_no_example_is_left_out():
    tests = Path(__file__).read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.is_file()]
    assert len(names) == 6
    assert all(f'"{name}"' in tests for name in names)
