"""Events are the same however the network cuts their bytes."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardline_client.sse import DataReader

EVENTS = ['{"text": "ähm"}', "two\nlines", " led by a space", "", "[DONE]"]
LINE_ENDS = ["\n", "\r\n", "\r"]


def written(events: list[str], end: str) -> bytes:
    """With everything around them that a server may write."""
    text = f": keep-alive{end}{end}"
    for number, event in enumerate(events):
        text += f"id: {number}{end}event: message{end}"
        text += "".join(f"data: {line}{end}" for line in event.split("\n")) + end
    return text.encode()


def read(stream: bytes, cuts: list[int]) -> list[str]:
    reader, bounds = DataReader(), [0, *sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(bounds)]
    return [data for piece in pieces for data in reader.feed(piece)]


@pytest.mark.parametrize("end", LINE_ENDS)
@given(data=st.data())
def test_any_cut(end, data):
    stream = written(EVENTS, end)
    assert read(stream, data.draw(st.lists(st.integers(0, len(stream))))) == EVENTS


@pytest.mark.parametrize("end", LINE_ENDS)
def test_byte_by_byte(end):
    stream = written(EVENTS, end)
    assert read(stream, list(range(len(stream)))) == EVENTS


def test_an_event_is_there_with_its_last_byte():
    reader = DataReader()
    assert list(reader.feed(b"data: one\r\n\r")) == ["one"]
    assert list(reader.feed(b"\ndata:two\n\n")) == ["two"]


def test_nothing_between_the_two_halves_of_a_line_end_ends_no_line():
    reader = DataReader()
    pieces = [b"data: one\r", b"", b"\n", b"data: two\r\n\r\n"]
    assert [data for piece in pieces for data in reader.feed(piece)] == ["one\ntwo"]


def test_what_is_not_complete_is_not_told():
    assert read(b"data: one\n\ndata: two\n", []) == ["one"]


def test_data_without_a_colon_or_a_space():
    assert read(b"data\n\ndata:x\n\ndatum: y\n\n", []) == ["", "x"]


def test_a_long_event():
    long = "x" * 3_000_000
    assert read(f"data: {long}\n\n".encode(), list(range(0, 3_000_000, 65_536))) == [long]


def test_what_is_not_utf8():
    with pytest.raises(UnicodeDecodeError):
        read(b"data: \xff\n\n", [])
