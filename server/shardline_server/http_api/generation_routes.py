"""OpenAI's two endpoints for generating text."""

from fastapi import APIRouter, Request, Response

from shardline_server.generation import (
    DEFAULT_COMPLETION_TOKENS,
    GenerationService,
    new_request_id,
)
from shardline_server.http_api.delivery import deliver
from shardline_server.http_api.render import ChatRenderer, CompletionRenderer
from shardline_server.http_api.requests import ChatCompletionRequest, CompletionRequest
from shardline_server.http_api.responses import ChatCompletion, Completion
from shardline_server.prompts import encode_chat, encode_prompts


def generation_router(service: GenerationService) -> APIRouter:
    """Completions and chat completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=Completion)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Complete one prompt or several."""
        model = service.model
        name = model.require_name(body.model)
        special = body.add_special_tokens is not False
        prompts = await encode_prompts(model, body.prompt, add_special_tokens=special)
        generation = service.generate(
            new_request_id("cmpl"), prompts, body, default_max_tokens=DEFAULT_COMPLETION_TOKENS
        )
        renderer = CompletionRenderer(body, generation, model.tokenizer, name)
        return await deliver(request, generation, renderer, stream=bool(body.stream))

    @router.post("/v1/chat/completions", response_model=ChatCompletion)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, through the model's chat template."""
        model = service.model
        name = model.require_name(body.model)
        prompt = await encode_chat(model, body.messages, body)
        generation = service.generate(
            new_request_id("chatcmpl"),
            [prompt],
            body,
            default_max_tokens=service.default_max_tokens,
        )
        renderer = ChatRenderer(body, generation, model.tokenizer, name)
        return await deliver(request, generation, renderer, stream=bool(body.stream))

    return router
