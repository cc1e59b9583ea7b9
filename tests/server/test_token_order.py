"""Every token has an index: what is lost or comes again inside the server reaches no client."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.server.endings import GRPC_WAYS, HTTP_WAYS
from tests.server.peer import delta

from shardline_server.messages import FinishReason

# Indexes of the tokens that come, and what is said of the last one.
DISORDERS = {
    "the first is missing": ([1], "missing inside the server: output token 1 came where 0"),
    "one is missing": ([0, 1, 3], "missing inside the server: output token 3 came where 2"),
    "one comes twice": ([0, 1, 1], "came again inside the server: output token 1 came where 2"),
    "all come twice": ([0, 1, 0], "came again inside the server: output token 0 came where 2"),
}


def in_disorder(indexes):
    return lambda submit: [delta(submit.request_id, i, [300 + i]) for i in indexes]


@pytest.mark.parametrize("way", HTTP_WAYS | GRPC_WAYS)
@pytest.mark.parametrize("disorder", DISORDERS)
def test_tokens_out_of_order_end_their_stream(running, peer, caplog, disorder, way):
    indexes, message = DISORDERS[disorder]
    peer.script = in_disorder(indexes)
    if way in HTTP_WAYS:
        ending = HTTP_WAYS[way](running.addresses.http_url, "completion", {})
    else:
        ending = GRPC_WAYS[way](running.addresses.grpc_target, "completion", {})
    [error] = ending.errors
    assert message in error
    assert message in caplog.text
    assert ending.num_tokens.total() == (len(indexes) - 1 if way.endswith("stream") else 0) or (
        len(indexes) == 1  # refused with a status, before anything was sent
    )
    assert peer.next_abort() == peer.next_submit().request_id


def test_tokens_that_are_missing_at_the_very_end_are_missed(running, peer):
    """The terminal record has no token, and its index says that there were three."""
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300]),
        delta(submit.request_id, 3, finish_reason=FinishReason.DEADLINE),
    ]
    ending = HTTP_WAYS["http stream"](running.addresses.http_url, "completion", {})
    assert "output token 3 came where 1 was due" in ending.errors[0]
    assert (ending.num_done, ending.reasons) == (0, {0: []})


def test_nobody_else_is_ended(running, peer, http):
    """Another stream waits meanwhile, and goes on."""
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    body = {"prompt": "the", "stream": True, "return_token_ids": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(lines := (line for line in response.iter_lines() if line))
        request_id = peer.next_submit().request_id
        peer.script = in_disorder([0, 2])
        with ThreadPoolExecutor(1) as threads:
            url = running.addresses.http_url
            ending = threads.submit(HTTP_WAYS["http stream"], url, "completion", {}).result()
        assert len(ending.errors) == 1
        end = {"finish_reason": FinishReason.LENGTH}
        peer.send_deltas(delta(request_id, 1, [301], **end))
        *_, last, done = list(lines)
    assert json.loads(last.removeprefix("data: "))["choices"][0]["token_ids"] == [301]
    assert done == "data: [DONE]"
