"""Every stream ends with exactly one terminal record, on every door, whatever ends it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.server.endings import GRPC_WAYS, HTTP_WAYS, MESSAGES, PROMPT, Ending
from tests.server.peer import EnginePeer, delta, silence
from tests.server.running import RunningFrontend

from shardline_server.messages import Delta, FinishReason, Submit

WAYS = HTTP_WAYS | GRPC_WAYS
NUM_CACHED = 2
Script = Callable[[Submit], list[Delta]]


def tokens(submit: Submit, num: int) -> list[Delta]:
    name = submit.request_id
    return [delta(name, i, [300 + i], num_cached_tokens=NUM_CACHED) for i in range(num)]


def ends_with(reason: FinishReason, num_tokens: int) -> Script:
    """The reason comes with the last token, or alone where there is none."""

    def script(submit: Submit) -> list[Delta]:
        *rest, last = tokens(submit, num_tokens) or [delta(submit.request_id)]
        end = {"finish_reason": reason, "num_cached_tokens": NUM_CACHED}
        return [*rest, delta(submit.request_id, last.index, last.token_ids, **end)]

    return script


def ends_alone_with(reason: FinishReason, num_tokens: int, **values: object) -> Script:
    """The reason comes after the last token, without one."""
    end = {"finish_reason": reason, "num_cached_tokens": NUM_CACHED}

    def script(submit: Submit) -> list[Delta]:
        return [*tokens(submit, num_tokens), delta(submit.request_id, num_tokens, **end, **values)]

    return script


def loses_a_token(submit: Submit) -> list[Delta]:
    first, _, third = tokens(submit, 3)
    return [first, third]


FAILURE = {"error_code": "RequestFailed", "error_message": "a worker died"}
FINISHES: dict[str, Script] = {
    "stop": ends_with(FinishReason.STOP, 3),
    "length": ends_with(FinishReason.LENGTH, 3),
    "deadline": ends_alone_with(FinishReason.DEADLINE, 2),
}
FAILURES: dict[str, Script] = {
    "deadline before the first token": ends_alone_with(FinishReason.DEADLINE, 0),
    "error": ends_alone_with(FinishReason.ERROR, 2, **FAILURE),
    "error at once": ends_alone_with(FinishReason.ERROR, 0, **FAILURE),
    "a lost token": loses_a_token,
}


@pytest.fixture(params=WAYS)
def send(request, running: RunningFrontend) -> Callable[..., Ending]:
    """One of the ways to send a request of one kind."""
    addresses = running.addresses
    where = addresses.http_url if request.param in HTTP_WAYS else addresses.grpc_target
    return lambda kind, **fields: WAYS[request.param](where, kind, fields)


@pytest.fixture(params=["completion", "chat"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def num_prompt_tokens(tokenizer, kind: str) -> int:
    chat = f"<|start|>user\n{MESSAGES[0]['content']}<|end|>\n<|start|>assistant\n"
    return len(tokenizer.encode(PROMPT if kind == "completion" else chat).ids)


def check_finish(ending: Ending, n: int, reason: str, num_prompt_tokens: int) -> None:
    """Each choice has its reason once, then come the usage and the end, once each."""
    assert ending.reasons == {choice: [reason] for choice in range(n)}
    assert not ending.errors
    [(prompt, completion, cached)] = ending.usages
    assert (prompt, completion) == (num_prompt_tokens, ending.num_tokens.total())
    assert cached in (0, NUM_CACHED) if reason == "abort" else cached == NUM_CACHED


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("reason", FINISHES)
def test_a_finished_request_says_why_once(
    send, peer: EnginePeer, kind, num_prompt_tokens, reason, n
) -> None:
    peer.script = FINISHES[reason]
    ending = send(kind, n=n)
    check_finish(ending, n, reason, num_prompt_tokens)
    assert ending.num_tokens.total() == n * (2 if reason == "deadline" else 3)
    assert (ending.num_done, ending.last) in ((0, "usage"), (1, "done"))


@pytest.mark.parametrize("n", [1, 3])
def test_so_does_one_that_a_stop_string_ends(
    send, peer: EnginePeer, kind, num_prompt_tokens, tokenizer, n
) -> None:
    """The front end ends it, and what the engine sends afterwards is not heard any more."""
    peer.script = ends_with(FinishReason.LENGTH, 3)
    stop = tokenizer.decode([301])
    ending = send(kind, n=n, stop=[stop])
    check_finish(ending, n, "stop", num_prompt_tokens)
    assert ending.num_tokens.total() == 2 * n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("has_begun", [False, True])
def test_so_does_an_aborted_one(
    send, peer: EnginePeer, running: RunningFrontend, kind, num_prompt_tokens, n, has_begun
) -> None:
    peer.script = (lambda submit: tokens(submit, 1)) if has_begun else silence
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(send, kind, n=n)
        [one, *_] = [peer.next_submit().request_id for _ in range(n)]
        abort = running.frontend.service.abort
        running.loop.call_soon_threadsafe(abort, one.rpartition("-")[0])
        check_finish(answer.result(), n, "abort", num_prompt_tokens)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_request_says_so_once_and_is_not_done(
    send, peer: EnginePeer, kind, failure, n
) -> None:
    """With several choices the first may end well before another fails; then it said why, once."""

    def script(submit: Submit) -> list[Delta]:
        is_fine = n > 1 and submit.request_id.endswith("-0") and failure == "error"
        return (FINISHES["length"] if is_fine else FAILURES[failure])(submit)

    peer.script = script
    ending = send(kind, n=n)
    assert len(ending.errors) == 1
    assert (ending.num_done, ending.usages) == (0, [])
    assert ending.last in ("error", "")
    assert all(reasons in ([], ["length"]) for reasons in ending.reasons.values())


@pytest.mark.parametrize("n", [1, 3])
def test_so_does_one_whose_engine_is_lost(
    own_running: RunningFrontend, own_peer: EnginePeer, kind, n
) -> None:
    own_peer.script = lambda submit: tokens(submit, 1)
    addresses = own_running.addresses
    with ThreadPoolExecutor(len(WAYS)) as threads:
        answers = [
            threads.submit(WAYS[way], where, kind, {"n": n})
            for ways, where in (
                (HTTP_WAYS, addresses.http_url),
                (GRPC_WAYS, addresses.grpc_target),
            )
            for way in ways
        ]
        for _ in range(n * len(WAYS)):
            own_peer.next_submit()
        own_running.loop.call_soon_threadsafe(own_running.frontend.lose, "it was killed")
        for answer in answers:
            ending = answer.result()
            [message] = ending.errors
            assert "it was killed" in message
            assert (ending.num_done, ending.usages) == (0, [])
            assert not any(ending.reasons.values())
