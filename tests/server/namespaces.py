"""Two hosts on one machine: network namespaces with an address each, and a wire between them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.server import faulty_wire

HEAD_ADDRESS = "10.77.0.1"
NODE_ADDRESS = "10.77.0.2"
# The head's second address, which the tests' own namespace reaches; runs beside each other differ.
_DOOR_NET = f"10.78.{os.getpid() % 256}"
DOOR_ADDRESS = f"{_DOOR_NET}.2"
_CUT_RULE, _LOCAL_RULE = "1", "2"  # priorities: what a cut swallows is not looked at any more


@dataclass(frozen=True)
class Wire:
    """What is wrong with a wire, each way."""

    delay_ms: float = 0.0
    rate_mbit: float = 1000.0
    loss_percent: float = 0.0


SLOW = Wire(delay_ms=5, rate_mbit=100)
LOSSY = Wire(loss_percent=5)


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

    def on(self, namespace: str, *command: str) -> list[str]:
        """The same for a program of a host: the other node's have process ids of their own, as they
        would on another machine, so that they find nothing of the head's but over the network.
        """
        alone = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
        return self.inside(namespace, *(alone if namespace == self.node else ()), *command)

    def sent_bytes(self) -> int:
        """What the head's end of the wire has sent."""
        command = ["ip", "-n", self.head, "-json", "-stats", "link", "show", "wire0"]
        shown = subprocess.run(command, check=True, capture_output=True).stdout
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Cut the wire for a while: packets vanish on their way, and nobody is told."""
        self._swallow("add")
        try:
            yield
        finally:
            self._swallow("del")

    def _swallow(self, change: str) -> None:
        for namespace, device in ((self.head, "wire0"), (self.node, "wire1")):
            rule = ("iif", device, "blackhole", "priority", _CUT_RULE)
            ip("-n", namespace, "rule", change, *rule)

    @contextmanager
    def unplug(self) -> Iterator[None]:
        """Pull the wire for a while: both kernels see that there is none."""
        ip("-n", self.head, "link", "set", "wire0", "down")
        try:
            yield
        finally:
            ip("-n", self.head, "link", "set", "wire0", "up")

    def listening(self, namespace: str) -> set[str]:
        """The addresses at which anything in a namespace accepts TCP connections."""
        command = self.inside(namespace, "ss", "--tcp", "--listening", "--numeric", "--no-header")
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        addresses = [line.split()[3].rpartition(":")[0] for line in lines.splitlines()]
        return {address.strip("[]").removeprefix("::ffff:") for address in addresses}

    def connections(self, namespace: str) -> set[tuple[str, str]]:
        """Both ends of each TCP connection over the wire, or inside a host at its address there."""
        command = self.inside(namespace, "ss", "--tcp", "--numeric", "--no-header")
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        pairs = [line.split()[3:5] for line in lines.splitlines() if line.startswith("ESTAB")]
        return {(own, peer) for own, peer in pairs if "10.77.0." in own}

    @contextmanager
    def faulty(self, wire: Wire) -> Iterator[None]:
        """Such a wire for a while, by netem where the kernel has it, else by a relay."""
        with self._shaped(wire) if self.has_netem() else self._relayed(wire):
            yield

    def has_netem(self) -> bool:
        """Whether the kernel can delay and lose packets by itself."""
        tc = ["tc", "-n", self.head, "qdisc"]
        added = subprocess.run([*tc, "add", "dev", "lo", "root", "netem"], capture_output=True)
        if added.returncode == 0:
            subprocess.run([*tc, "del", "dev", "lo", "root"], check=True)
        return added.returncode == 0

    @contextmanager
    def _shaped(self, wire: Wire) -> Iterator[None]:
        netem = ["delay", f"{wire.delay_ms}ms", "rate", f"{wire.rate_mbit}mbit"]
        netem += ["loss", f"{wire.loss_percent}%"]
        with ExitStack() as stack:
            for namespace, device in ((self.head, "wire0"), (self.node, "wire1")):
                tc = ["tc", "-n", namespace, "qdisc"]
                where = ["dev", device, "root"]
                subprocess.run([*tc, "add", *where, "netem", *netem], check=True)
                stack.callback(subprocess.run, [*tc, "del", *where], check=True)
            yield

    @contextmanager
    def _relayed(self, wire: Wire) -> Iterator[None]:
        """Routes between the hosts lead over the devices of a relay, and vanish with it."""
        ends = ((self.head, "faulty0", NODE_ADDRESS), (self.node, "faulty1", HEAD_ADDRESS))
        faults = [str(wire.delay_ms), str(wire.rate_mbit), str(wire.loss_percent)]
        command = [sys.executable, faulty_wire.__file__, *ends[0][:2], *ends[1][:2], *faults]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
            try:
                assert relay.stdout is not None
                assert relay.stdout.readline() == "ready\n"
                for namespace, device, other in ends:
                    ip("-n", namespace, "link", "set", device, "up")
                    source = HEAD_ADDRESS if other == NODE_ADDRESS else NODE_ADDRESS
                    ip("-n", namespace, "route", "add", other, "dev", device, "src", source)
                yield
            finally:
                relay.kill()


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Needs root, and `ip` of Debian's iproute2."""
    hosts = Hosts(f"shardline-head-{os.getpid()}", f"shardline-node-{os.getpid()}")
    try:
        for namespace in (hosts.head, hosts.node):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
            ip("-n", namespace, "rule", "add", "lookup", "local", "priority", _LOCAL_RULE)
            ip("-n", namespace, "rule", "del", "priority", "0")
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
        ip("address", "add", f"{_DOOR_NET}.1/24", "dev", door)
        ip("link", "set", door, "up")
        ip("-n", hosts.head, "address", "add", f"{DOOR_ADDRESS}/24", "dev", "door0")
        ip("-n", hosts.head, "link", "set", "door0", "up")
        yield hosts
    finally:
        for namespace in (hosts.head, hosts.node):
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
