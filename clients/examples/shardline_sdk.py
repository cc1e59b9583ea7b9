"""Our own client, over either door: python shardline_sdk.py [http://… or grpc://…]"""

import sys

from shardline_client import Client, Overloaded

url = sys.argv[1] if len(sys.argv) > 1 else "grpc://127.0.0.1:50051"
with Client(url, timeout_s=120) as client:
    print(client.complete("The capital of France is", max_tokens=8, temperature=0).text)

    chat = [{"role": "user", "content": "Name three rivers."}]
    try:
        stream = client.stream_chat(chat, max_tokens=32, temperature=0)
        for piece in stream:  # leaving the loop would end the request
            print(piece.text, end="", flush=True)
        print()
        print(stream.usage, file=sys.stderr)
    except Overloaded as error:
        sys.exit(f"The server is full; try again in {error.retry_after_s} s.")
