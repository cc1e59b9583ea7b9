"""The interpreter behind `make image-check`: what it reads, does, and refuses."""

import os
from pathlib import Path

import pytest
from deploy.image_check.__main__ import main
from deploy.image_check.build import Builder
from deploy.image_check.context import context_files
from deploy.image_check.dockerfile import DockerfileError, read_instructions
from deploy.image_check.machine import Machine

MACHINE = Machine(apt_mirror="", apt_options="", secrets={}, mounts=(), proxies={})


def build(text: str, folder: Path, build_args: dict[str, str] | None = None):
    context, roots = folder / "context", folder / "roots"
    context.mkdir(exist_ok=True)
    (context / ".dockerignore").write_text("*\n!kept\n!notes.txt\n!deep/in/side.txt\n**/*.log\n")
    (roots / "base-bookworm").mkdir(parents=True)
    return Builder(context, roots, build_args or {}, MACHINE, lambda _: None).build(
        read_instructions(text)
    )


def test_lines_go_on_after_a_backslash_and_comments_do_not_count() -> None:
    first, second = read_instructions("# none\nRUN a \\\n  # between\n  && b\n\nUSER 1:1\n")
    assert (first.line, first.name, first.text.split()) == (2, "RUN", ["a", "&&", "b"])
    assert (second.line, second.name, second.text) == (6, "USER", "1:1")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("FROM debian:bookworm\nADD a /b", "line 2, ADD: not known here"),
        ("FROM debian:bookworm\nRUN --network=none true", "--network is not known here"),
        ("FROM debian:bookworm\nRUN cat <<EOF", "here-documents"),
        ("FROM debian:bookworm\nRUN --mount=type=cache,target=/c true", "only type=secret"),
        ("FROM debian:bookworm\nRUN --mount=type=secret,id=a,target=/c true", "no secret a"),
        ("FROM debian:bookworm\nCMD serve demo", "write the command as a list"),
        ("FROM debian:bookworm\nENV A=$B", "'B' has no value"),
        ("FROM debian:bookworm\nCOPY hidden.txt ./", "hidden.txt is not in the context"),
        ("FROM debian:bookworm\nCOPY --from=none /a /b", "an earlier stage"),
        ("FROM python:3.12-slim", "only debian:SUITE"),
        ("USER 1:1", "only ARG may stand before FROM"),
        ("RUN true \\", "ends in a backslash"),
    ],
)
def test_what_is_not_known_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DockerfileError, match=problem):
        build(text, tmp_path)


def test_a_build_argument_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DockerfileError, match="no build argument TROCH, only TORCH"):
        build("FROM debian:bookworm\nARG TORCH=cuda", tmp_path, {"TROCH": "cpu"})


def test_arguments_and_variables(tmp_path: Path) -> None:
    text = """
        ARG BASE=debian:bookworm
        FROM ${BASE} AS first
        ENV LEFT=behind
        FROM ${BASE}
        ARG A=default
        ARG B
        ARG D=default
        ENV C=$A E="with blank" PATH=/own:$PATH
    """
    image = build(text, tmp_path, {"A": "given"})
    assert image.args == {"A": "given", "D": "default"}
    path = image.env.pop("PATH")
    assert path.startswith("/own:/usr/local/sbin:")
    assert image.env == {"C": "given", "E": "with blank"}


def test_copies_what_dockerignore_lets_through(tmp_path: Path) -> None:
    hidden = ("kept/deep/c.log", "deep/hidden.txt", "hidden.txt")
    for name in ("kept/a.txt", "kept/deep/b.txt", "notes.txt", "deep/in/side.txt", *hidden):
        path = tmp_path / "context" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    text = """
        FROM debian:bookworm AS build
        WORKDIR /build
        COPY . ./
        FROM debian:bookworm
        COPY --from=build /build/kept /inside
        COPY notes.txt kept /texts/
    """
    image = build(text, tmp_path)
    files = {path.relative_to(image.root).as_posix() for path in image.root.rglob("*.*")}
    inside = {"inside/a.txt", "inside/deep/b.txt"}
    assert files == inside | {"texts/notes.txt", "texts/a.txt", "texts/deep/b.txt"}
    assert len(list(context_files(tmp_path / "context"))) == 4


def test_it_says_that_it_needs_root(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([]) == 2
    assert "needs root" in capsys.readouterr().err
