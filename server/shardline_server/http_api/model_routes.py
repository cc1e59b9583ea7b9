"""The models that are served, and their tokenizer."""

from fastapi import APIRouter

from shardline_server.generation import GenerationService
from shardline_server.http_api.requests import DetokenizeRequest, TokenizeRequest
from shardline_server.http_api.responses import ModelCard, ModelList, Text, Tokens
from shardline_server.prompts import encode_chat, encode_prompts
from shardline_server.sampling import check_token_ids
from shardline_server.served_model import ServedModel


def model_router(service: GenerationService) -> APIRouter:
    """Model cards, tokenizing and detokenizing."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The names that the model is served under."""
        model = service.model
        return ModelList(data=[_card(model, name) for name in model.names])

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> ModelCard:
        """One of them."""
        model = service.model
        return _card(model, model.require_name(name))

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        """Token ids of a text, or of a conversation."""
        return await _tokenize(service.model, body)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Text:
        """The text of token ids."""
        model = service.model
        model.require_name(body.model)
        check_token_ids(body.tokens, model.limits.vocab_size, param="tokens")
        return Text(prompt=model.tokenizer.decode(body.tokens))

    return router


async def _tokenize(model: ServedModel, body: TokenizeRequest) -> Tokens:
    model.require_name(body.model)
    if body.messages is not None:
        prompt = await encode_chat(model, body.messages, body)
    else:
        assert body.prompt is not None
        special = body.add_special_tokens is not False
        [prompt] = await encode_prompts(model, [body.prompt], add_special_tokens=special)
    text_of = model.tokenizer.token_text
    strings = [text_of(token_id) for token_id in prompt.token_ids]
    return Tokens(
        count=len(prompt.token_ids),
        max_model_len=model.limits.max_model_len,
        tokens=prompt.token_ids,
        token_strs=strings if body.return_token_strs else None,
    )


def _card(model: ServedModel, name: str) -> ModelCard:
    return ModelCard(id=name, created=model.created, max_model_len=model.limits.max_model_len)
