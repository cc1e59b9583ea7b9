"""The image's health check: status 0 when the server in this container can serve requests."""

import http.client
import os
import sys

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    """Ask `/ready` where SHARDLINE_HOST and SHARDLINE_PORT say; prints what came of it."""
    host = os.environ.get("SHARDLINE_HOST", "127.0.0.1")
    port = int(os.environ.get("SHARDLINE_PORT", "8000"))
    connection = http.client.HTTPConnection(_EVERY_ADDRESS.get(host, host), port, timeout=4)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        print(response.read().decode(errors="replace"))
    except OSError as error:
        print(f"no server at {host}:{port}: {error}")
        return 1
    finally:
        connection.close()
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
