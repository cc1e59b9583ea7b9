"""Thousands of odd requests over both doors, over HTTP made after the API's own description and
against it: every answer is a documented one, wrong data is refused, and the server is as before.
"""

from http import HTTPStatus

import grpc
import httpx
import pytest
import schemathesis
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance
from tests.server.conftest import running_engine_process
from tests.server.running import running_frontend

from shardline_server.door_config import DoorConfig
from shardline_server.protos.shardline.v1 import generation_pb2 as pb

KEY = {"Authorization": "Bearer fuzz"}
NUM_CASES = {
    "POST /v1/completions": 950,
    "POST /v1/chat/completions": 950,
    "POST /tokenize": 200,
    "POST /detokenize": 150,
}
# Rules over several fields (either prompt or messages, lengths in tokens) stand in no schema, and
# whoever checks keys by sending odd ones must not do so behind a header that holds a good one.
NOT_HELD = [positive_data_acceptance, ignored_auth, not_a_server_error]
# A latency budget that cannot be kept, now or any more, is no failure of the server's.
BUDGET_LOST = {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}

NUM_CALLS = 300
DOCUMENTED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def door(tiny_model):
    with (
        running_engine_process(tiny_model, max_model_len=32) as engine,
        running_frontend(
            engine.wait_begun(), tiny_model, door=DoorConfig(api_keys=("fuzz",))
        ) as running,
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
    @settings(SETTINGS, max_examples=NUM_CASES[label])
    def answers(case):
        response = case.call_and_validate(excluded_checks=NOT_HELD)
        assert response.status_code < 500 or response.status_code in BUDGET_LOST

    answers()
    assert_ready(door)


def assert_ready(door) -> None:
    assert httpx.get(f"{door.addresses.http_url}/ready").status_code == HTTPStatus.OK


def message_of(descriptor: Descriptor) -> st.SearchStrategy[dict[str, object]]:
    """Any subset of a message's fields, with values that its types allow, as keyword arguments."""
    fields = {field.name: value_of(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(_one_of_each_oneof(descriptor))


def _one_of_each_oneof(descriptor: Descriptor):
    def drop(values: dict[str, object]) -> dict[str, object]:
        for oneof in descriptor.oneofs:
            for name in [field.name for field in oneof.fields if field.name in values][1:]:
                del values[name]
        return values

    return drop


def value_of(field: FieldDescriptor) -> st.SearchStrategy[object]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        key, value = kind.fields_by_name["key"], kind.fields_by_name["value"]
        if value.message_type is not None:
            return st.just({})
        return st.dictionaries(scalar_of(key), scalar_of(value), max_size=3)
    one = scalar_of(field) if kind is None else message_of(kind)
    return st.lists(one, max_size=3) if field.is_repeated else one


def scalar_of(field: FieldDescriptor) -> st.SearchStrategy[object]:
    small = st.integers(-2, 40)
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            roles = st.sampled_from(["user", "assistant", "batch", "reject", "tiny"])
            return st.text(max_size=20) | roles
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return st.floats(0, 2) | st.floats()
        case FieldDescriptor.CPPTYPE_UINT32:
            return st.integers(0, 400) | st.integers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_INT64:
            return small | st.integers(-(2**63), 2**63 - 1)
        case _:
            raise AssertionError(f"no values for {field.full_name}")


def code_of(call) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize", "Abort"])
def test_every_message_gets_a_documented_code(door, method):
    service = pb.DESCRIPTOR.services_by_name["Generation"].methods_by_name[method]
    seen = set()

    with grpc.insecure_channel(door.addresses.grpc_target) as channel:

        @given(values=message_of(service.input_type))
        @settings(SETTINGS, max_examples=NUM_CALLS)
        def answers(values):
            request = getattr(pb, service.input_type.name)(**values)
            seen.add(code := code_of(lambda: call(channel, service, request.SerializeToString())))
            assert code in DOCUMENTED, f"{code} for {request}"

        answers()
    assert "OK" in seen, f"nothing got through: {seen}"
    assert_ready(door)


def test_bytes_that_are_no_message_end_their_call_alone(door):
    service = pb.DESCRIPTOR.services_by_name["Generation"].methods_by_name["Generate"]
    with grpc.insecure_channel(door.addresses.grpc_target) as channel:

        @given(payload=st.binary(max_size=200))
        @settings(SETTINGS, max_examples=NUM_CALLS)
        def answers(payload):
            assert code_of(lambda: call(channel, service, payload)) in DOCUMENTED

        answers()
    assert_ready(door)


def call(channel: grpc.Channel, method, payload: bytes) -> list[Message]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    metadata = [("authorization", "Bearer fuzz")]
    if method.server_streaming:
        return list(channel.unary_stream(path)(payload, metadata=metadata, timeout=60))
    return [channel.unary_unary(path)(payload, metadata=metadata, timeout=60)]
