"""Two hosts on one machine: network namespaces with an address each, and a wire between them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HEAD_ADDRESS = "10.77.0.1"
NODE_ADDRESS = "10.77.0.2"
DOOR_ADDRESS = "10.78.0.2"  # the head's second address, which the tests' own namespace reaches


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass(frozen=True)
class Hosts:
    """Names of the namespaces; commands run inside one by `inside`."""

    head: str
    node: str

    @staticmethod
    def inside(namespace: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", namespace, *command]

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Take the wire away for a while: packets vanish, nobody is told."""
        ip("-n", self.head, "link", "set", "wire0", "down")
        try:
            yield
        finally:
            ip("-n", self.head, "link", "set", "wire0", "up")

    def narrow(self) -> None:
        """From now on 1 Mbit/s each way."""
        shape = ("tbf", "rate", "1mbit", "burst", "4kb", "latency", "1s")
        for namespace, device in ((self.head, "wire0"), (self.node, "wire1")):
            command = ("tc", "qdisc", "replace", "dev", device, "root", *shape)
            subprocess.run(self.inside(namespace, *command), check=True)

    def widen(self) -> None:
        """As fast as it goes."""
        for namespace, device in ((self.head, "wire0"), (self.node, "wire1")):
            command = ("tc", "qdisc", "delete", "dev", device, "root")
            subprocess.run(self.inside(namespace, *command), check=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Needs root, and `ip` of Debian's iproute2."""
    hosts = Hosts(f"shardline-head-{os.getpid()}", f"shardline-node-{os.getpid()}")
    try:
        for namespace in (hosts.head, hosts.node):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", hosts.head, "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
        ip("-n", hosts.head, "link", "set", "wire1", "netns", hosts.node)
        for namespace, device, address in (
            (hosts.head, "wire0", HEAD_ADDRESS),
            (hosts.node, "wire1", NODE_ADDRESS),
        ):
            ip("-n", namespace, "address", "add", f"{address}/24", "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
        door = f"sl{os.getpid()}"
        ip("link", "add", door, "type", "veth", "peer", "name", "door0", "netns", hosts.head)
        ip("address", "add", "10.78.0.1/24", "dev", door)
        ip("link", "set", door, "up")
        ip("-n", hosts.head, "address", "add", f"{DOOR_ADDRESS}/24", "dev", "door0")
        ip("-n", hosts.head, "link", "set", "door0", "up")
        yield hosts
    finally:
        for namespace in (hosts.head, hosts.node):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
