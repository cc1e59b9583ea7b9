"""A server whose answers take a known time, whatever the machine does: to compare load generators.

    python bench/paced_server.py 8000

Speaks /v1/models and streamed /v1/completions. Request i draws its time to the first token (100 to
300 ms) and between tokens (20 to 40 ms) from seed i; a text's prompt tokens are its words.
"""

import asyncio
import itertools
import json
import random
import sys
from collections.abc import AsyncIterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

seeds = itertools.count()


async def list_models(request: Request) -> JSONResponse:
    card = {"id": "paced", "object": "model", "created": 0, "owned_by": "paced"}
    return JSONResponse({"object": "list", "data": [card]})


async def complete(request: Request) -> StreamingResponse:
    body = await request.json()
    return StreamingResponse(events(body), media_type="text/event-stream")


async def events(body: dict) -> AsyncIterator[str]:
    draw, loop = random.Random(next(seeds)), asyncio.get_running_loop()
    moment, gap_s = loop.time() + draw.uniform(0.1, 0.3), draw.uniform(0.02, 0.04)
    num_tokens, prompt = body["max_tokens"], body["prompt"]
    for i in range(num_tokens):
        await asyncio.sleep(moment - loop.time())
        moment += gap_s
        reason = "length" if i == num_tokens - 1 else None
        yield event([{"index": 0, "text": f" {i}", "logprobs": None, "finish_reason": reason}])
    num_prompt = len(prompt.split() if isinstance(prompt, str) else prompt)
    total = num_prompt + num_tokens
    yield event(
        [],
        usage={
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": total,
        },
    )
    yield "data: [DONE]\n\n"


def event(choices: list, **fields: object) -> str:
    chunk = {"id": "paced", "object": "text_completion", "created": 0, "model": "paced"}
    return f"data: {json.dumps(chunk | {'choices': choices} | fields)}\n\n"


if __name__ == "__main__":
    routes = [
        Route("/v1/models", list_models),
        Route("/v1/completions", complete, methods=["POST"]),
    ]
    uvicorn.run(Starlette(routes=routes), port=int(sys.argv[1]), log_level="warning")
