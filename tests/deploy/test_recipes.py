"""What the image, the compose files and the manifest say, against the command line's own parser."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.image_check.build import Builder, Stage
from deploy.image_check.check import HEAD, NODE
from deploy.image_check.context import context_files
from deploy.image_check.dockerfile import read_instructions
from deploy.image_check.machine import Machine

from shardline_server.cli import main
from shardline_server.options import given_settings
from shardline_server.rendezvous import parse_board
from shardline_server.settings import ServeSettings, load_settings

ROOT = Path(__file__).parents[2]
COMPOSE_FILES = ("compose.yaml", "deploy/compose.nodes.yaml")
# What the operator or the cluster fills in.
FILLED_IN = {
    "HEAD_ADDRESS": "10.0.0.1",
    "SHARDLINE_SECRET": "secret",
    "LWS_LEADER_ADDRESS": "shardline-0.shardline.default",
    "POD_ADDRESS": "10.0.0.1",
}


def parse(command: list[str], env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that `shardline COMMAND` comes to, with these variables."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    name, *arguments = command
    values = main.commands[name].make_context(name, arguments).params
    if name == "serve":
        return load_settings(given_settings(values))
    assert name == "worker"
    parse_board(values["join"])
    assert values["secret"]
    return values


def fill_in(text: str) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?message}` of compose, `$(NAME)` of Kubernetes."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"] or match["pod"], match["kind"], match["rest"]
        return rest if kind == ":-" else FILLED_IN[name]

    pattern = r"\$\{(?P<name>\w+)(?P<kind>:[-?])?(?P<rest>[^}]*)\}|\$\((?P<pod>\w+)\)"
    return re.sub(pattern, value, text)


def image_env() -> dict[str, str]:
    """The variables that the Dockerfile sets for Shardline."""
    steps = read_instructions((ROOT / "Dockerfile").read_text())
    pairs = [word.split("=", 1) for step in steps if step.name == "ENV" for word in step.words]
    return {name: value for name, value in pairs if name.startswith("SHARDLINE_")}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ServeSettings.model_fields:
        monkeypatch.delenv(f"SHARDLINE_{name}".upper(), raising=False)


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in COMPOSE_FILES:
        yield from yaml.safe_load((ROOT / file).read_text())["services"].items()


@pytest.mark.parametrize(("name", "service"), list(services()))
def test_compose_services_parse(name: str, service, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {key: fill_in(value) for key, value in service["environment"].items() if value}
    settings = parse([fill_in(word) for word in service["command"]], image_env() | env, monkeypatch)
    assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    grace_s = ServeSettings.model_fields["grace_s"].default
    assert float(service["stop_grace_period"].removesuffix("s")) > grace_s
    if name == "head":
        assert (settings.nodes, settings.rendezvous) == (2, "10.0.0.1:29500")
        assert settings.secret is not None and settings.host == "127.0.0.1"
    elif name == "node":
        assert settings["join"] == "10.0.0.1:29500"
    else:
        assert settings.host == "0.0.0.0"
        assert settings.device == ("cuda" if name == "gpu" else "cpu")


def test_the_check_runs_what_the_two_services_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILLED_IN, "HEAD_ADDRESS", "127.0.0.1")
    commands = {name: tuple(map(fill_in, service["command"])) for name, service in services()}
    assert (commands["head"], commands["node"]) == (HEAD, NODE)


def test_gpus_are_laid_over_the_services_that_there_are() -> None:
    laid_over = yaml.safe_load((ROOT / "deploy/compose.gpu.yaml").read_text())["services"]
    assert (
        laid_over.keys() == yaml.safe_load((ROOT / COMPOSE_FILES[1]).read_text())["services"].keys()
    )


def test_the_manifests_pods_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    group, service, policy = yaml.safe_load_all((ROOT / "deploy/leaderworkerset.yaml").read_text())
    template = group["spec"]["leaderWorkerTemplate"]
    head, node = (template[f"{role}Template"]["spec"] for role in ("leader", "worker"))
    env = image_env() | {"SHARDLINE_SECRET": "secret"}
    settings = parse(arguments(head), env, monkeypatch)
    joined = parse(arguments(node), env, monkeypatch)
    assert settings.nodes == template["size"] == settings.pp
    assert settings.rendezvous.rpartition(":")[2] == joined["join"].rpartition(":")[2]
    assert settings.join_timeout == joined["join_timeout"]
    assert service["metadata"]["name"] != group["metadata"]["name"]  # the controller takes that
    for pod in (head, node):
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(settings.tp)
        assert not pod["enableServiceLinks"]
        assert pod["terminationGracePeriodSeconds"] > settings.grace_s
    ports = {settings.port, settings.grpc_port}
    assert {port["containerPort"] for port in head["containers"][0]["ports"]} == ports
    assert {port["port"] for port in service["spec"]["ports"]} == ports
    assert {port["port"] for port in policy["spec"]["ingress"][1]["ports"]} == ports


def arguments(pod: dict[str, Any]) -> list[str]:
    return [fill_in(word) for word in pod["containers"][0]["args"]]


@pytest.fixture
def image(tmp_path: Path) -> Stage:
    """The last stage of our Dockerfile, with its RUN and COPY --from left out: no root needed."""
    machine = Machine(apt_mirror="", apt_options="", secrets={}, mounts=(), proxies={})
    (tmp_path / "base-bookworm").mkdir()
    steps = [
        step
        for step in read_instructions((ROOT / "Dockerfile").read_text())
        if step.name != "RUN" and not step.options
    ]
    return Builder(ROOT, tmp_path, {}, machine, lambda _: None).build(steps)


def test_the_image_serves_by_default(image: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image.entrypoint == ["tini", "--", "shardline"]
    env = {name: value for name, value in image.env.items() if name.startswith("SHARDLINE_")}
    settings = parse(image.command, env, monkeypatch)
    assert (settings.model, settings.host) == ("demo", "0.0.0.0")
    exposed = {f"{settings.port}", f"{settings.grpc_port}"}
    (expose,) = [
        s for s in read_instructions((ROOT / "Dockerfile").read_text()) if s.name == "EXPOSE"
    ]
    assert set(expose.words) == exposed


def test_everything_that_is_written_is_in_the_volume(image: Stage) -> None:
    assert image.volumes == ["/cache"]
    for name in ("HOME", "HF_HOME", "SHARDLINE_CACHE"):
        assert Path(image.env[name]).is_relative_to("/cache")
    assert image.user == "10001:10001"


def test_the_context_holds_the_sources_and_little_else() -> None:
    files = set(context_files(ROOT))
    packages = ("clients", "model_shards", "scheduler", "server")
    sources = {
        path.relative_to(ROOT)
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    others = {"LICENSE", "README.md", "constraints.txt", "pyproject.toml", "deploy/healthcheck.py"}
    assert files == sources | {Path(name) for name in others}
