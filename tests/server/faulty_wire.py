"""A wire that delays and loses, for kernels without netem: two TUN devices in two network
namespaces.

Run as `python faulty_wire.py NAMESPACE DEVICE NAMESPACE DEVICE DELAY_MS RATE_MBIT LOSS_PERCENT`.
What the kernel sends into one device comes out of the other after the time that it takes at the
rate, and the delay, or is lost. Says `ready` when both devices are there; they vanish with the
process.
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress

LONGEST_QUEUE = 1000  # packets, as a device would hold
LONGEST_PACKET = 65536

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000


def open_device(namespace: str, name: str) -> int:
    """A new TUN device in a namespace; this thread stays there."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class Direction:
    """Packets on their way from one device to the other."""

    def __init__(self, source: int, target: int, faults: tuple[float, float, float]) -> None:
        self.source = source
        self._target = target
        delay_ms, rate_mbit, loss_percent = faults
        self._delay_s = delay_ms / 1e3
        self._bits_per_s = rate_mbit * 1e6
        self._loss = loss_percent / 100
        self._under_way: deque[tuple[float, bytes]] = deque()
        self._free_at = 0.0

    def take(self) -> None:
        """One packet from the source, unless it is lost or too many wait already."""
        packet = os.read(self.source, LONGEST_PACKET)
        if len(self._under_way) < LONGEST_QUEUE and random.random() >= self._loss:
            start = max(time.monotonic(), self._free_at)
            self._free_at = start + len(packet) * 8 / self._bits_per_s
            self._under_way.append((self._free_at + self._delay_s, packet))

    def give(self) -> float:
        """Deliver what is due; returns the seconds until more is."""
        while self._under_way:
            wait_s = self._under_way[0][0] - time.monotonic()
            if wait_s > 0:
                return wait_s
            with suppress(OSError):  # a device that is not up yet loses its packets
                os.write(self._target, self._under_way.popleft()[1])
        return 3600.0


def main() -> None:
    first, second = open_device(*sys.argv[1:3]), open_device(*sys.argv[3:5])
    delay_ms, rate_mbit, loss_percent = map(float, sys.argv[5:])
    faults = (delay_ms, rate_mbit, loss_percent)
    directions = [Direction(first, second, faults), Direction(second, first, faults)]
    print("ready", flush=True)
    while True:
        wait_s = min(direction.give() for direction in directions)
        readable, _, _ = select.select([first, second], [], [], wait_s)
        for direction in directions:
            if direction.source in readable:
                direction.take()


if __name__ == "__main__":
    main()
