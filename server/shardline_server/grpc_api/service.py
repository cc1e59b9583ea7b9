"""`shardline.v1.Generation`: the same service as over HTTP, in protobuf."""

from collections.abc import AsyncIterator

from shardline_server.api_keys import ApiKeys
from shardline_server.errors import InvalidRequest
from shardline_server.generation import (
    DEFAULT_COMPLETION_TOKENS,
    Caller,
    Generation,
    GenerationService,
    new_request_id,
)
from shardline_server.grpc_api import convert
from shardline_server.grpc_api.guard import Context, tenant_of
from shardline_server.prompts import Prompt, encode_chat, encode_prompts
from shardline_server.protos.shardline.v1 import generation_pb2 as pb
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationServicer


class GenerationRpc(GenerationServicer):
    """Methods raise our exceptions; `Guard` maps them to status codes."""

    def __init__(self, service: GenerationService, keys: ApiKeys) -> None:
        self._service = service
        self._keys = keys

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        """The whole answer at once."""
        model = self._service.model
        name = model.require_name(request.model)
        with await self._start(request, context) as generation:
            pieces = await generation.collect()
            request_id = generation.request_id
            outcome = generation.outcome
            assert outcome is not None
            return pb.GenerateResponse(
                request_id=request_id,
                model=name,
                choices=[convert.delta(request_id, piece, model.tokenizer) for piece in pieces],
                usage=convert.usage(generation.usage),
                latency_budget=convert.outcome(outcome),
            )

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateDelta]:
        """The answer in pieces."""
        model = self._service.model
        model.require_name(request.model)
        with await self._start(request, context) as generation:
            async for piece in generation.pieces():
                message = convert.delta(generation.request_id, piece, model.tokenizer)
                if (outcome := generation.outcome) is not None:
                    message.usage.CopyFrom(convert.usage(generation.usage))
                    message.latency_budget.CopyFrom(convert.outcome(outcome))
                yield message

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """The names that the model is served under."""
        model = self._service.model
        limits = model.limits
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=name, max_model_len=limits.max_model_len, vocab_size=limits.vocab_size
                )
                for name in model.names
            ]
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Token ids of a text, or of a conversation."""
        model = self._service.model
        model.require_name(request.model)
        prompt = await self._prompt(request)
        return pb.TokenizeResponse(
            token_ids=prompt.token_ids, max_model_len=model.limits.max_model_len
        )

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """End a running request by its id."""
        return pb.AbortResponse(was_running=self._service.abort(request.request_id))

    async def _start(self, request: pb.GenerateRequest, context: Context) -> Generation:
        fields = convert.request_fields(request)
        prompt = await self._prompt(request)
        is_chat = request.WhichOneof("prompt") == "chat"
        return self._service.generate(
            request.request_id or new_request_id("gen"),
            [prompt],
            fields,
            self._caller(context),
            default_max_tokens=(
                self._service.default_max_tokens if is_chat else DEFAULT_COMPLETION_TOKENS
            ),
        )

    def _caller(self, context: Context) -> Caller:
        remaining_s = context.time_remaining()
        return Caller(
            tenant=tenant_of(self._keys, dict(context.invocation_metadata() or ())),
            deadline_ms=None if remaining_s is None else remaining_s * 1000,
        )

    async def _prompt(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
        model = self._service.model
        special = request.add_special_tokens if request.HasField("add_special_tokens") else None
        match request.WhichOneof("prompt"):
            case "chat":
                chat = convert.chat_prompt(request.chat, special)
                return await encode_chat(model, chat.messages, chat)
            case "text":
                given: list[str] | list[list[int]] = [request.text]
            case "token_ids" if isinstance(request, pb.GenerateRequest):
                given = [list(request.token_ids.ids)]
            case _:
                raise InvalidRequest("The request has no prompt.", param="prompt")
        [prompt] = await encode_prompts(model, given, add_special_tokens=special is not False)
        return prompt
