"""What the channels between our processes cost: a message there, and 100 bytes back.

    python bench/channel.py

A ROUTER here and a DEALER in another process, over loopback, with the launch's keys and without;
and a wire to a child. By default messages follow each other at once; with `--pause-ms` the
processes have gone to sleep meanwhile, as between steps.
"""

import argparse
import socket as sockets
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import msgspec
import zmq
from machine import machine_facts
from tables import markdown

from shardline_shards.channel import Endpoint, connect
from shardline_shards.gate import Gate, LaunchKeys
from shardline_shards.wire import Wire, wire_pair

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


def answer_wire(descriptor: int) -> None:
    """The same at the other end of a wire."""
    wire = Wire(sockets.socket(fileno=descriptor))
    while payload := wire.wait_received():
        wire.send(payload[:100])


def wire_round_trips(pause_s: float) -> list[float]:
    """As `round_trips`, over a wire."""
    ours, theirs = wire_pair()
    command = [sys.executable, __file__, "--answer", str(theirs.fileno())]

    def there_and_back(payload: bytes) -> None:
        ours.send(payload)
        ours.wait_sent()
        ours.wait_received()

    with subprocess.Popen(command, pass_fds=[theirs.fileno()]):
        theirs.close()
        found = [time_messages(there_and_back, size, pause_s) for size in SIZES]
        ours.send(b"")
    ours.close()
    return found


def round_trips(is_encrypted: bool, pause_s: float) -> list[float]:
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

        def there_and_back(payload: bytes) -> None:
            socket.send_multipart([name, payload])
            socket.recv_multipart()

        found = [time_messages(there_and_back, size, pause_s) for size in SIZES]
        socket.send_multipart([name, b""])
    socket.close()
    gate.close()
    return found


def time_messages(there_and_back: Callable[[bytes], None], size: int, pause_s: float) -> float:
    payload, times = bytes(size), []
    for _ in range(NUM_WARM + NUM_TIMED):
        start = time.perf_counter()
        there_and_back(payload)
        times.append(time.perf_counter() - start)
        if pause_s:
            time.sleep(pause_s)
    return median(times[NUM_WARM:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pause-ms", type=float, default=0.0)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer and given.answer.isdigit():
        answer_wire(int(given.answer))
        return
    if given.answer:
        line = sys.stdin.buffer.readline()
        answer(msgspec.json.decode(line, type=Endpoint), given.answer == "encrypted")
        return
    pause_s = given.pause_ms / 1e3
    columns = round_trips(False, pause_s), round_trips(True, pause_s), wire_round_trips(pause_s)
    rows = [
        [f"{size} bytes", *(f"{time_us:.0f} us" for time_us in times)]
        for size, *times in zip(SIZES, *columns, strict=True)
    ]
    print(", ".join(f"{name}: {value}" for name, value in machine_facts().items()), end="\n\n")
    print(markdown(["message", "plain", "encrypted", "wire"], rows))


if __name__ == "__main__":
    main()
