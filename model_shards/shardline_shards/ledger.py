"""What a worker is doing, written where its parent can read it even after it has died.

A page of memory that both have mapped. The worker writes an operation before it begins it, and a
checksum of what a step was when it has done it; that costs microseconds and no message. A parent
names by it what a dead worker was at, who of several is stuck, and who has done something else than
the others.
"""

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self
from zlib import crc32

_HEAD = struct.Struct("<6q")  # step_id, is_running, num_operations, operation, two sizes
_WHAT = struct.Struct("<3q")
_DONE = struct.Struct("<3q")  # step_id, checksum of the plan, checksum of the operations
_NUM_DONE = 256
_SIZE = _HEAD.size + _NUM_DONE * _DONE.size


class Operation(IntEnum):
    """What a worker can be at."""

    COMPUTE = 1
    RECEIVE = 2
    ALL_REDUCE = 3
    GATHER = 4
    SEND = 5
    DRAW = 6
    LOAD = 7


@dataclass(frozen=True, slots=True)
class Entry:
    """What a worker is at; `num_operations` counts those of the step, this one included."""

    step_id: int
    is_running: bool
    num_operations: int
    operation: Operation
    shape: tuple[int, int]

    def __str__(self) -> str:
        if not self.is_running:
            return "idle" if self.step_id < 0 else f"idle after step {self.step_id}"
        if self.operation is Operation.LOAD:
            return f"loading its weights, tensor {self.num_operations}: {[*self.shape]}"
        name = self.operation.name.lower()
        return f"at step {self.step_id}, operation {self.num_operations}: {name} {[*self.shape]}"


class Ledger:
    """One worker's page, seen from either side."""

    def __init__(self, descriptor: int) -> None:
        """Of a descriptor that `create` made, here or in the parent."""
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, _SIZE)
        self._step_id = -1
        self._num_operations = self._plan = self._operations = 0

    @classmethod
    def create(cls) -> Self:
        """A new page, without a name in any file system; a child may inherit its descriptor."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("shardline-ledger")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def close(self) -> None:
        """Give the page back."""
        self._page.close()
        os.close(self.descriptor)

    def begin(self, step_id: int, plan: int, num_tokens: int) -> None:
        """A step begins; `plan` is a checksum of what was asked for."""
        self._step_id, self._plan = step_id, plan
        self._num_operations = self._operations = 0
        self.note(Operation.COMPUTE, (num_tokens, 0))

    def note(self, operation: Operation, shape: Sequence[int], *, is_shared: bool = True) -> None:
        """An operation begins, on a tensor of this shape (all dims but the last are multiplied).

        Of those that are not shared, the other ranks of the stage know nothing.
        """
        self._num_operations += 1
        last = shape[-1] if shape else 0
        first = 1
        for size in shape[:-1]:
            first *= size
        head = _HEAD.pack(self._step_id, 1, self._num_operations, operation, first, last)
        if is_shared:
            self._operations = crc32(_WHAT.pack(operation, first, last), self._operations)
        self._page[: _HEAD.size] = head

    def finish(self) -> None:
        """The step is done."""
        slot = _HEAD.size + self._step_id % _NUM_DONE * _DONE.size
        _DONE.pack_into(self._page, slot, self._step_id, self._plan, self._operations)
        self.rest()

    def rest(self) -> None:
        """Nothing is being done; a step that was not finished never will be."""
        head = (self._step_id, 0, self._num_operations, Operation.COMPUTE, 0, 0)
        _HEAD.pack_into(self._page, 0, *head)

    def read(self) -> Entry | None:
        """What the worker is at; None if it has not begun anything, nor said that it is ready."""
        step_id, is_running, num_operations, operation, first, last = _HEAD.unpack_from(self._page)
        if not operation:
            return None
        shape = (first, last)
        return Entry(step_id, bool(is_running), num_operations, Operation(operation), shape)

    def checksums(self, step_id: int) -> tuple[int, int] | None:
        """Of the plan and of the operations of a step that is done, while it is remembered.

        All workers agree on the first, those of one stage on the second.
        """
        slot = _HEAD.size + step_id % _NUM_DONE * _DONE.size
        done_id, plan, operations = _DONE.unpack_from(self._page, slot)
        return (plan, operations) if done_id == step_id and (plan or operations) else None

    def lately_done(self) -> dict[int, tuple[int, int]]:
        """Checksums of the last steps, by step id, for somebody who has no page of ours.

        Half of what is remembered, so that nothing is read that may be overwritten meanwhile, and
        not the step that may be finished just now.
        """
        entry = self.read()
        last = -1 if entry is None else entry.step_id
        steps = range(max(0, last - _NUM_DONE // 2), last)
        return {step: sums for step in steps if (sums := self.checksums(step))}
