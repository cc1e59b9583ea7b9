"""Server-sent events as the standard splits them (WHATWG HTML, 9.2.6); no I/O."""

from collections.abc import Iterator


class DataReader:
    """Takes the bytes of a stream as they come, and gives the data of each event that is complete.

    Names, ids and comments are passed over: OpenAI's streams say everything in their data.
    """

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._was_return = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """The events that end in this piece. Raises UnicodeDecodeError for what is not UTF-8."""
        if not piece:
            return
        if self._was_return:  # and what follows belongs to the same end of a line
            piece = piece.removeprefix(b"\n")
        lines = (self._line + piece).splitlines(keepends=True)
        self._line = b"" if not lines or lines[-1].endswith((b"\n", b"\r")) else lines.pop()
        self._was_return = bool(lines) and not self._line and lines[-1].endswith(b"\r")
        for line in lines:
            text = line.rstrip(b"\r\n")
            field, _, value = text.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not text and self._data:
                yield b"\n".join(self._data).decode()
                self._data = []
