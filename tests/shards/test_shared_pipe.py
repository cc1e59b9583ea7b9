"""A pipe through shared memory: what goes in comes out, and nobody waits for who is gone."""

import multiprocessing
import os
import signal
import threading

import pytest
import torch
from torch import Tensor

from shardline_shards.attention.cpu import load_kernel
from shardline_shards.node_memory import create_memory, open_memory
from shardline_shards.shared_pipe import SharedPipe

CAPACITY = 1 << 20


@pytest.fixture
def memory() -> tuple[int, Tensor]:
    assert load_kernel()
    num_bytes = torch.classes.shardline.SharedPipe.num_bytes(CAPACITY)
    return create_memory("pipe", num_bytes)


@pytest.fixture
def pipe(memory: tuple[int, Tensor]) -> tuple[SharedPipe, SharedPipe]:
    descriptor, _ = memory
    ends = [SharedPipe(descriptor, CAPACITY, sends=sends) for sends in (True, False)]
    os.close(descriptor)
    return ends[0], ends[1]


def drawn(number: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)


def test_tensors_come_out_in_their_order_whatever_their_sizes(pipe) -> None:
    """Many times round the memory, some larger than all of it, while both ends work."""
    sender, receiver = pipe
    sizes = [1, 7, 4096, CAPACITY - 9, CAPACITY - 8, CAPACITY, 3 * CAPACITY + 5, 64] * 4
    thread = threading.Thread(
        target=lambda: [sender.send(drawn(i, size)) for i, size in enumerate(sizes)]
    )
    thread.start()
    for number, size in enumerate(sizes):
        got = receiver.receive(torch.empty(size, dtype=torch.uint8))
        assert torch.equal(got, drawn(number, size)), number
    thread.join()


def test_what_fits_is_sent_without_anybody_who_receives(pipe) -> None:
    sender, receiver = pipe
    parts = [drawn(number, CAPACITY // 8 - 8) for number in range(8)]
    for part in parts:
        sender.send(part)
    assert all(torch.equal(receiver.receive(torch.empty_like(part)), part) for part in parts)


def test_hidden_states_may_lie_anywhere_in_a_larger_tensor(pipe) -> None:
    sender, receiver = pipe
    whole = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    sender.send(whole[:, ::2])
    assert torch.equal(receiver.receive(torch.empty(4, 3, dtype=torch.bfloat16)), whole[:, ::2])


def test_another_size_than_is_due_is_an_error(pipe) -> None:
    sender, receiver = pipe
    sender.send(torch.zeros(3))
    with pytest.raises(RuntimeError, match="the other stage sent 12 bytes where 16 are due"):
        receiver.receive(torch.zeros(4))


@pytest.mark.parametrize("sends", [True, False])
def test_who_waits_for_one_that_left_is_let_go(pipe, sends: bool) -> None:
    waits, leaves = pipe if sends else pipe[::-1]
    leaves.leave()
    with pytest.raises(RuntimeError, match="the other stage does not answer"):
        waits.send(torch.zeros(CAPACITY)) if sends else waits.receive(torch.zeros(1))


def open_and_die(ticket: Tensor) -> None:
    load_kernel()
    SharedPipe(open_memory(ticket), CAPACITY, sends=True).send(torch.ones(1))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_process_sent_before_it_died_is_there_and_then_the_wait_ends(memory) -> None:
    descriptor, ticket = memory
    receiver = SharedPipe(descriptor, CAPACITY, sends=False)
    process = multiprocessing.get_context("spawn").Process(target=open_and_die, args=(ticket,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert receiver.receive(torch.zeros(1)).item() == 1.0
    with pytest.raises(RuntimeError, match="the other stage does not answer"):
        receiver.receive(torch.zeros(1))
    os.close(descriptor)


def test_a_pipe_is_a_power_of_two_bytes(memory) -> None:
    with pytest.raises(RuntimeError, match="power of two"):
        SharedPipe(memory[0], 1000, sends=True)
    os.close(memory[0])
