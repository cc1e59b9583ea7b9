"""What encryption costs on the channels between our processes: a message there, and 100 bytes back.

    python bench/channel.py

A ROUTER here and a DEALER in another process, over loopback, with the launch's keys and without.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

import msgspec
import zmq
from machine import machine_facts
from tables import markdown

from shardline_shards.channel import Endpoint, connect
from shardline_shards.gate import Gate, LaunchKeys

SIZES = (200, 2_000, 20_000, 200_000)
NUM_WARM, NUM_TIMED = 300, 3000


def answer(endpoint: Endpoint, is_encrypted: bool) -> None:
    """The other process: 100 bytes for every message, until an empty one."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.linger = 0
    if is_encrypted:
        connect(socket, endpoint)
    else:
        socket.connect(endpoint.address)
    socket.send(b"here")
    while payload := socket.recv():
        socket.send(payload[:100])


def round_trips(is_encrypted: bool) -> list[float]:
    """Microseconds for each size, the median."""
    gate = Gate(LaunchKeys.create())
    socket = gate.context.socket(zmq.ROUTER)
    socket.linger = 0
    if is_encrypted:
        socket.curve_server = True
        socket.curve_secretkey = gate.keys.server_secret.encode()
    socket.bind("tcp://127.0.0.1:*")
    address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    endpoint = msgspec.json.encode(Endpoint(address=address, keys=gate.keys.client))
    command = [sys.executable, __file__, "--answer", "encrypted" if is_encrypted else "plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        assert other.stdin is not None
        other.stdin.write(endpoint + b"\n")
        other.stdin.flush()
        name, _ = socket.recv_multipart()
        found = [median(time_messages(socket, name, size)) * 1e6 for size in SIZES]
        socket.send_multipart([name, b""])
    socket.close()
    gate.close()
    return found


def time_messages(socket: zmq.Socket[bytes], name: bytes, size: int) -> list[float]:
    payload, times = bytes(size), []
    for _ in range(NUM_WARM + NUM_TIMED):
        start = time.perf_counter()
        socket.send_multipart([name, payload])
        socket.recv_multipart()
        times.append(time.perf_counter() - start)
    return times[NUM_WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answer", choices=("encrypted", "plain"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        line = sys.stdin.buffer.readline()
        answer(msgspec.json.decode(line, type=Endpoint), given.answer == "encrypted")
        return
    plain, encrypted = round_trips(False), round_trips(True)
    rows = [
        [f"{size} bytes", f"{a:.0f} us", f"{b:.0f} us"]
        for size, a, b in zip(SIZES, plain, encrypted, strict=True)
    ]
    print(", ".join(f"{name}: {value}" for name, value in machine_facts().items()), end="\n\n")
    print(markdown(["message", "plain", "encrypted"], rows))


if __name__ == "__main__":
    main()
