"""OpenAI's two endpoints for generating text."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from shardline_server.generation import (
    DEFAULT_COMPLETION_TOKENS,
    Caller,
    GenerationService,
    new_request_id,
)
from shardline_server.http_api.budget_headers import HeaderBudget, with_headers
from shardline_server.http_api.delivery import deliver
from shardline_server.http_api.render import ChatRenderer, CompletionRenderer
from shardline_server.http_api.requests import ChatCompletionRequest, CompletionRequest
from shardline_server.http_api.responses import ChatCompletion, Completion
from shardline_server.prompts import encode_chat, encode_prompts

_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer or, with `stream`, server-sent events of its pieces",
        "content": {"text/event-stream": {}},
    }
}


def generation_router(service: GenerationService, tenant_of: Callable[..., Any]) -> APIRouter:
    """Completions and chat completions; `tenant_of` is the dependency that names the tenant."""
    router = APIRouter()
    Tenant = Annotated[str, Depends(tenant_of)]

    @router.post("/v1/completions", response_model=Completion, responses=_STREAMED)
    async def create_completion(
        body: CompletionRequest, request: Request, budget: HeaderBudget, tenant: Tenant
    ) -> Response:
        """Complete one prompt or several."""
        body = with_headers(body, budget)
        model = service.model
        name = model.require_name(body.model)
        special = body.add_special_tokens is not False
        prompts = await encode_prompts(model, body.prompt, add_special_tokens=special)
        generation = service.generate(
            new_request_id("cmpl"),
            prompts,
            body,
            Caller(tenant=tenant),
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
        )
        renderer = CompletionRenderer(body, generation, model.tokenizer, name)
        return await deliver(request, generation, renderer, stream=bool(body.stream))

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
    async def create_chat_completion(
        body: ChatCompletionRequest, request: Request, budget: HeaderBudget, tenant: Tenant
    ) -> Response:
        """Answer a conversation, through the model's chat template."""
        body = with_headers(body, budget)
        model = service.model
        name = model.require_name(body.model)
        prompt = await encode_chat(model, body.messages, body)
        generation = service.generate(
            new_request_id("chatcmpl"),
            [prompt],
            body,
            Caller(tenant=tenant),
            default_max_tokens=service.default_max_tokens,
        )
        renderer = ChatRenderer(body, generation, model.tokenizer, name)
        return await deliver(request, generation, renderer, stream=bool(body.stream))

    return router
