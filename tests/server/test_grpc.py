"""The gRPC door before a scripted engine: keys, health, reflection, abort, cancel, failures."""

import threading

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tests.server.peer import delta, made_up_logprobs, silence
from tests.server.running import running_frontend

from shardline_server.door_config import DoorConfig
from shardline_server.messages import EngineFailed, FinishReason
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub

SERVICE = "shardline.v1.Generation"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request(text="the fox", request_id="", **sampling):
    params = pb.SamplingParams(**sampling)
    return pb.GenerateRequest(request_id=request_id, text=text, sampling=params)


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def statuses(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    names = ("", SERVICE)
    return [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in names]


def test_the_whole_answer(stub, tokenizer):
    answer = stub.Generate(request(max_tokens=4, request_id="mine"))
    assert (answer.request_id, answer.model) == ("mine", "tiny")
    [choice] = answer.choices
    assert choice.text == "the foxthe fox"
    assert list(choice.token_ids) == tokenizer.encode("the fox").ids * 2
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert answer.usage == pb.Usage(prompt_tokens=2, completion_tokens=4, cached_tokens=1)


def test_the_answer_in_pieces(stub):
    pieces = list(stub.GenerateStream(request(max_tokens=3, n=2, seed=3)))
    for choice in (0, 1):
        own = [piece for piece in pieces if piece.choice == choice]
        assert [piece.index for piece in own] == [0, 1, 2]
        assert "".join(piece.text for piece in own) == "the foxthe"
        assert [bool(piece.finish_reason) for piece in own] == [False, False, True]
    assert [piece.HasField("usage") for piece in pieces] == [False] * 5 + [True]
    assert pieces[-1].usage == pb.Usage(prompt_tokens=2, completion_tokens=6, cached_tokens=1)


def test_chat_and_template_variables(stub, peer, tokenizer):
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
    chat.chat_template_kwargs["enable_thinking"] = False
    stub.Generate(pb.GenerateRequest(chat=chat))
    submit = peer.next_submit()
    prompt = "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert submit.token_ids == tokenizer.encode(prompt).ids
    assert submit.sampling.max_tokens == 64 - len(submit.token_ids)


def test_models_and_tokenize(stub, tokenizer):
    models = stub.ListModels(pb.ListModelsRequest()).models
    assert [(model.name, model.max_model_len) for model in models] == [
        ("tiny", 64),
        ("tiny-alias", 64),
    ]
    tokens = stub.Tokenize(pb.TokenizeRequest(text="the 🎉"))
    assert list(tokens.token_ids) == tokenizer.encode("the 🎉").ids
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])
    tokens = stub.Tokenize(pb.TokenizeRequest(chat=chat))
    assert tokenizer.decode(tokens.token_ids).endswith("<|start|>assistant\n")


def test_abort_ends_the_stream_with_its_reason(stub, peer):
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    pieces = stub.GenerateStream(request(request_id="mine", n=2))
    next(pieces)
    assert stub.Abort(pb.AbortRequest(request_id="mine")).was_running
    rest = list(pieces)
    reasons = [piece.finish_reason for piece in rest if piece.finish_reason]
    assert reasons == [pb.FINISH_REASON_ABORT] * 2
    assert rest[-1].HasField("usage")
    assert {peer.next_abort(), peer.next_abort()} == {"mine-0", "mine-1"}
    assert not stub.Abort(pb.AbortRequest(request_id="mine")).was_running


def test_an_id_in_use_is_refused(stub, peer):
    peer.script = lambda submit: [delta(submit.request_id, 0, [300])]
    pieces = stub.GenerateStream(request(request_id="mine"))
    next(pieces)
    error = refused(lambda: stub.Generate(request(request_id="mine")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "in use" in error.details()
    pieces.cancel()
    peer.next_abort()


@pytest.mark.parametrize("script", [silence, lambda submit: [delta(submit.request_id, 0, [300])]])
def test_cancelling_a_stream_aborts_the_request(stub, peer, script):
    peer.script = script
    pieces = stub.GenerateStream(request(n=2))
    submitted = {peer.next_submit().request_id, peer.next_submit().request_id}
    pieces.cancel()
    assert {peer.next_abort(), peer.next_abort()} == submitted


def test_cancelling_or_outliving_a_unary_call_aborts_the_request(stub, peer):
    peer.script = silence
    call = stub.Generate.future(request())
    submitted = peer.next_submit().request_id
    call.cancel()
    assert peer.next_abort() == submitted
    error = refused(lambda: stub.Generate(request(), timeout=1.0))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert peer.next_abort() == peer.next_submit().request_id


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("QueueFull", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("PromptTooLong", grpc.StatusCode.INVALID_ARGUMENT),
        ("RequestFailed", grpc.StatusCode.INTERNAL),
    ],
)
def test_what_the_engine_refuses_is_a_status(stub, peer, name, code):
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300]),
        delta(
            submit.request_id,
            1,
            finish_reason=FinishReason.ERROR,
            error_code=name,
            error_message="it is so",
        ),
    ]
    for call in (stub.Generate, lambda request: list(stub.GenerateStream(request))):
        error = refused(lambda call=call: call(request()))
        assert (error.code(), error.details()) == (code, "it is so")


def test_what_nobody_expected_is_logged_and_told_in_general_words(stub, peer, caplog):
    peer.script = lambda submit: [
        delta(submit.request_id, 0, [300], prompt_logprobs=[made_up_logprobs(5)] * 7)
    ]
    for call in (stub.Generate, lambda request: list(stub.GenerateStream(request))):
        error = refused(lambda call=call: call(request(echo=True, logprobs=1)))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details().startswith("An internal error")
        assert "zip()" in caplog.text
        assert peer.next_abort() == peer.next_submit().request_id


def test_health_follows_the_engine(own_peer, tokenizer_folder):
    own_peer._is_ready = False
    with (
        running_frontend(own_peer.endpoint, tokenizer_folder, wait_ready=False) as running,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        assert statuses(channel) == [NOT_SERVING, NOT_SERVING]
        assert refused(lambda: stub.Generate(request())).code() is grpc.StatusCode.UNAVAILABLE
        own_peer.send(own_peer.ready)
        running.call(running.frontend.wait_ready())
        assert statuses(channel) == [SERVING, SERVING]

        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        own_peer.script = silence
        call = stub.Generate.future(request())
        own_peer.next_submit()
        own_peer.send(EngineFailed("rank 1 is gone"))
        assert next(watch).status == NOT_SERVING
        watch.cancel()
        error = call.exception()
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "rank 1 is gone" in error.details()
        assert statuses(channel) == [NOT_SERVING, NOT_SERVING]


def test_reflection_lists_and_describes_the_service(running):
    with grpc.insecure_channel(running.addresses.grpc_target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName(SERVICE)
    assert [method.name for method in service.methods] == [
        "Generate",
        "GenerateStream",
        "ListModels",
        "Tokenize",
        "Abort",
    ]


def test_keys_guard_the_service_but_not_health(own_peer, tokenizer_folder):
    with (
        running_frontend(
            own_peer.endpoint, tokenizer_folder, door=DoorConfig(api_keys=("key",))
        ) as running,
        grpc.insecure_channel(running.addresses.grpc_target) as channel,
    ):
        stub = GenerationStub(channel)
        for metadata in ((), (("authorization", "Bearer other"),)):
            for call in (
                lambda metadata: stub.Generate(request(), metadata=metadata),
                lambda metadata: list(stub.GenerateStream(request(), metadata=metadata)),
                lambda metadata: stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                lambda metadata: stub.Abort(pb.AbortRequest(), metadata=metadata),
            ):
                error = refused(lambda call=call, metadata=metadata: call(metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert own_peer.submits.empty()
        key = (("authorization", "Bearer key"),)
        assert stub.Generate(request(max_tokens=1), metadata=key).choices[0].text == "the"
        assert statuses(channel) == [SERVING, SERVING]


def test_many_calls_at_once(stub):
    answers = [stub.Generate.future(request(max_tokens=8)) for _ in range(50)]
    assert {answer.result().choices[0].text for answer in answers} == {"the fox" * 4}
    assert threading.active_count() < 50
