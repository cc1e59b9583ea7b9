"""Our own client in asyncio, several requests at a time: python shardline_async.py [URL]"""

import asyncio
import sys

from shardline_client import AsyncClient

PROMPTS = ["The capital of France is", "The capital of Japan is", "The capital of Peru is"]


async def main(url: str) -> None:
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(
            *(client.complete(prompt, max_tokens=8, temperature=0) for prompt in PROMPTS)
        )
    for answer in answers:
        print(answer.text)


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
