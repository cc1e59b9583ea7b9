"""The image's health check: status 0 when the server in this container can serve requests."""

import http.client
import os
import ssl
import sys

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    """Ask `/ready` where the server's own variables say; prints what came of it."""
    host = os.environ.get("SHARDLINE_HOST", "127.0.0.1")
    port = int(os.environ.get("SHARDLINE_PORT", "8000"))
    connection = _connect(_EVERY_ADDRESS.get(host, host), port)
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


def _connect(host: str, port: int) -> http.client.HTTPConnection:
    cert, key = os.environ.get("SHARDLINE_TLS_CERT"), os.environ.get("SHARDLINE_TLS_KEY")
    if cert is None:
        return http.client.HTTPConnection(host, port, timeout=4)
    context = ssl.create_default_context()
    context.check_hostname = False  # it asks itself, at an address that no certificate names
    context.verify_mode = ssl.CERT_NONE
    if "SHARDLINE_TLS_CLIENT_CA" in os.environ:
        context.load_cert_chain(cert, key)
    return http.client.HTTPSConnection(host, port, timeout=4, context=context)


if __name__ == "__main__":
    sys.exit(main())
