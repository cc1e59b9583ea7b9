"""`shardline complete` and `shardline chat`, as processes and before a scripted engine."""

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console
from tests.clients.bad_servers import HttpBadServer, Refuse, Say
from tests.server.peer import delta

from shardline_client import Client
from shardline_client.chat import TerminalView, split_blocks

COMMAND = [sys.executable, "-m", "shardline_server"]
GREEDY = ("--temperature", "0", "--max-tokens", "6")


def run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=text, capture_output=True, text=True)


def test_complete_writes_the_text_and_nothing_else(url):
    with Client(url) as client:
        expected = client.complete("The quick", temperature=0, max_tokens=6).text
    for arguments, text in (
        (["The quick"], None),
        ([], "The quick"),
        (["-"], "The quick"),
    ):
        done = run("complete", url, *arguments, *GREEDY, text=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["URL", "x", "--temperature", "9"], 1, "temperature"),
        (["URL", "x", "--model", "other"], 1, "not served"),
        (["http://127.0.0.1:1", "x"], 1, "127.0.0.1:1"),
        (["grpc://127.0.0.1:1", "x"], 1, "127.0.0.1:1"),
        (["ftp://127.0.0.1:1", "x"], 2, "is not an address"),
        (["https://127.0.0.1:1", "x", "--ca-file", "/none"], 2, "No such file"),
        (["URL", "x", "--max-tokens", "many"], 2, "not a valid integer"),
    ],
)
def test_mistakes_are_told_on_stderr(server, arguments, status, message):
    arguments = [server["http"] if argument == "URL" else argument for argument in arguments]
    done = run("complete", *arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_answer_has_a_status():
    with HttpBadServer() as server:
        server.answers = [Say(2, then="error")]
        done = run("complete", server.url, "x")
    assert (done.returncode, done.stdout) == (1, "0,1,")
    assert done.stderr == "Error: The engine died.\n"


def test_a_reader_that_has_had_enough(url):
    process = subprocess.Popen(
        [*COMMAND, "complete", url, "The", "--max-tokens", "300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() != 0
    process.stderr.close()


def test_another_servers_chat_sends_only_openais_fields():
    with HttpBadServer() as server:
        done = run("chat", server.url, "--system", "Be brief.", text="Hello\nAgain\n/exit\n")
    assert done.stdout == "0,\n0,\n"
    first, second = server.bodies
    assert first == {
        "model": "bad",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "0,"},
        {"role": "user", "content": "Again"},
    ]


def test_reset_unknown_commands_and_errors_do_not_end_a_chat():
    with HttpBadServer() as server:
        server.answers = [Say(1), Refuse("failed"), Say(2)]
        done = run("chat", server.url, text="One\n/reset\n/what\nTwo\nThree\n")
    assert (done.returncode, done.stdout) == (0, "0,\n\n0,1,\n")
    assert "I am failed" in done.stderr and "/what is not known" in done.stderr
    assert [len(body["messages"]) for body in server.bodies] == [1, 1, 1]


def test_chat_over_the_real_server(url):
    done = run("chat", url, "--seed", "3", *GREEDY, text="Hi\n")
    with Client(url) as client:
        message = {"role": "user", "content": "Hi"}
        expected = client.chat([message], temperature=0, max_tokens=6, seed=3).text
    assert done.stdout == f"{expected}\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(peer, frontend_url, tokenizer_folder):
    peer.script = lambda submit: [delta(submit.request_id, 0, submit.token_ids[1:2])]
    environment = os.environ | {"SHARDLINE_API_KEY": "right"}
    with subprocess.Popen(
        [*COMMAND, "chat", frontend_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"fox\n")
        process.stdin.flush()
        submit = peer.next_submit()
        assert process.stdout.read(1) != b""
        process.send_signal(signal.SIGINT)
        assert peer.next_abort() == submit.request_id
        process.stdin.write(b"dog\n")
        process.stdin.flush()
        second = peer.next_submit()
        process.send_signal(signal.SIGINT)
        assert peer.next_abort() == second.request_id
        _, errors = process.communicate(b"/exit\n")
    assert process.returncode == 0
    assert errors.count(b"Stopped.") == 2
    assert len(second.token_ids) > 2 * len(submit.token_ids), "what was said is sent again"


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("one", ""),
        ("one\n\ntwo", "one\n\n"),
        ("one\n\ntwo\n\nthree", "one\n\ntwo\n\n"),
        ("```\na\n\nb", ""),
        ("one\n\n```\na\n\nb\n```\n\nend", "one\n\n```\na\n\nb\n```\n\n"),
    ],
)
def test_blocks_of_markdown(text, finished):
    assert split_blocks(text) == (finished, text.removeprefix(finished))


def test_markdown_is_drawn_in_a_terminal():
    screen = io.StringIO()
    view = TerminalView(Console(file=screen, force_terminal=True, width=40))
    view.show(["# Head", "ing\n\n", "a **bo", "ld** word\n\n* it", "em"])
    assert "Heading" in screen.getvalue() and "item" in screen.getvalue()
    assert "\x1b[1mbold\x1b[0m word" in screen.getvalue()
