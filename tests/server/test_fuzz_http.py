"""Thousands of odd requests, made after the API's own description and against it: every answer is
one that the description names, wrong data is refused, and the server is as before at the end.
"""

from http import HTTPStatus

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from tests.server.conftest import running_engine_process
from tests.server.running import running_frontend

KEY = {"Authorization": "Bearer fuzz"}
NUM_CASES = {
    "POST /v1/completions": 950,
    "POST /v1/chat/completions": 950,
    "POST /tokenize": 200,
    "POST /detokenize": 150,
}
# Rules over several fields (either prompt or messages, lengths in tokens) stand in no schema, and
# whoever checks keys by sending odd ones must not do so behind a header that holds a good one.
NOT_HELD = [positive_data_acceptance, ignored_auth]


@pytest.fixture(scope="module")
def door(tiny_model):
    with (
        running_engine_process(tiny_model, max_model_len=32) as engine,
        running_frontend(engine.read_address(), tiny_model, api_keys=("fuzz",)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def operations(door):
    schema = schemathesis.openapi.from_url(f"{door.addresses.http_url}/openapi.json")
    return {operation.label: operation for operation in map(_ok, schema.get_all_operations())}


def _ok(result):
    return result.ok()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", NUM_CASES)
def test_every_answer_is_a_documented_one(door, operations, label, mode):
    operation = operations[label]

    @given(case=operation.as_strategy(generation_mode=mode, headers=KEY))
    @settings(
        max_examples=NUM_CASES[label],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def answers(case):
        case.call_and_validate(excluded_checks=NOT_HELD)

    answers()
    assert httpx.get(f"{door.addresses.http_url}/ready").status_code == HTTPStatus.OK
