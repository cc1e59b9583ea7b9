"""A conversation in the terminal: lines in, markdown out as it comes."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from shardline_client.client import Client
from shardline_client.errors import ClientError
from shardline_client.requests import Message

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."


class View(Protocol):
    """Where the user is."""

    def lines(self) -> Iterator[str]:
        """What the user says, until there is no more."""

    def show(self, texts: Iterable[str]) -> None:
        """An answer, as its pieces come."""

    def tell(self, message: str) -> None:
        """A remark that is not the model's."""


class Conversation:
    """Keeps what was said, and sends all of it with each new line."""

    def __init__(
        self, client: Client, view: View, *, system: str | None, sampling: dict[str, Any]
    ) -> None:
        self._client = client
        self._view = view
        self._sampling = sampling
        self._system = [Message(role="system", content=system)] if system else []
        self._messages = list(self._system)

    def run(self) -> None:
        """Until the user leaves."""
        self._view.tell(f"Model {self._client.settings.model}. {HELP}")
        for line in self._view.lines():
            match line.strip():
                case "":
                    pass
                case "/exit":
                    return
                case "/reset":
                    self._messages = list(self._system)
                    self._view.tell("Forgotten.")
                case command if command.startswith("/"):
                    self._view.tell(f"{command} is not known. {HELP}")
                case text:
                    self._ask(text)

    def _ask(self, text: str) -> None:
        """One question; an answer that was stopped counts as far as it came."""
        asked = Message(role="user", content=text)
        answer = ""
        try:
            stream = self._client.stream_chat([*self._messages, asked], **self._sampling)
            try:
                with stream:
                    self._view.show(piece.text for piece in stream)
            finally:
                answer = stream.completion.text
        except KeyboardInterrupt:
            self._view.tell("Stopped.")
        except ClientError as error:
            self._view.tell(f"Error: {error.message}")
        if answer:
            self._messages += [asked, Message(role="assistant", content=answer)]


class PlainView:
    """Pipes: the answers alone on stdout, remarks on stderr."""

    def lines(self) -> Iterator[str]:
        """Of stdin."""
        yield from sys.stdin

    def show(self, texts: Iterable[str]) -> None:
        """As it comes, and a line end."""
        try:
            for text in texts:
                print(text, end="", flush=True)
        finally:
            print(flush=True)

    def tell(self, message: str) -> None:
        """To stderr."""
        print(message, file=sys.stderr, flush=True)


class TerminalView:
    """A prompt with history, and answers as markdown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history)

    def lines(self) -> Iterator[str]:
        """Until Ctrl-D; Ctrl-C only leaves the line."""
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self._console.print()
            except EOFError:
                self._console.print()
                return

    def show(self, texts: Iterable[str]) -> None:
        """Finished blocks are printed for good; only the last one is drawn anew as it grows."""
        open_text = ""
        with Live(console=self._console, transient=True, refresh_per_second=10) as live:
            try:
                for text in texts:
                    finished, open_text = split_blocks(open_text + text)
                    if finished:
                        self._console.print(Markdown(finished))
                    live.update(Markdown(open_text))
            finally:
                live.update("")
                self._console.print(Markdown(open_text))

    def tell(self, message: str) -> None:
        """Dimmed."""
        self._console.print(message, style="dim", markup=False, highlight=False)


def make_view() -> View:
    """For a terminal, or for pipes."""
    console = Console()
    return TerminalView(console) if console.is_terminal and sys.stdin.isatty() else PlainView()


def split_blocks(text: str) -> tuple[str, str]:
    """Markdown up to its last blank line outside a code block, and the rest."""
    end = position = 0
    is_code = False
    for line in text.splitlines(keepends=True):
        position += len(line)
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not line.strip() and line.endswith("\n") and not is_code:
            end = position
    return text[:end], text[end:]
