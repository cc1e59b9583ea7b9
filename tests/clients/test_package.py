"""What the client is made of: light imports, fresh stubs, and a wheel that works alone."""

import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import shardline_client
from shardline_server.protos.build import build

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "clients" / "shardline_client" / "protos"
HEAVY = {"torch", "transformers", "fastapi", "pydantic", "numpy", "zmq", "matplotlib", "msgspec"}


def run_python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(statement: str) -> set[str]:
    """The packages, other than the standard library's, that a fresh interpreter then holds."""
    script = (
        f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    )
    names = {name.split(".")[0] for name in run_python("-c", script).split()}
    return names - set(sys.stdlib_module_names)


def test_the_public_names_are_a_sorted_list():
    assert shardline_client.__all__ == sorted(shardline_client.__all__)
    assert all(hasattr(shardline_client, name) for name in shardline_client.__all__)


def test_importing_it_brings_nearly_nothing():
    assert imported_by("import shardline_client") <= {"shardline_client", "tenacity"}


def test_the_commands_bring_only_their_parser():
    assert imported_by("import shardline_client.command_line") <= {
        "shardline_client",
        "tenacity",
        "click",
    }


@pytest.mark.parametrize(
    ("module", "door"), [("http_transport", {"aiohttp"}), ("grpc_transport", {"grpc"})]
)
def test_a_door_brings_its_own_library_and_nothing_heavy(module, door):
    imported = imported_by(f"import shardline_client.{module}")
    assert door <= imported
    assert not imported & HEAVY
    assert not {name for name in imported if name.startswith("shardline_")} - {"shardline_client"}


def test_the_stubs_are_up_to_date(tmp_path):
    build(tmp_path, "shardline_client.protos")
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    assert len(fresh) == 4
    for path, text in fresh.items():
        assert (PROTOS / path).read_text() == text, f"run `make protos`: {path} is old"


def test_both_projects_agree():
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    alone = tomllib.loads((ROOT / "clients" / "pyproject.toml").read_text())["project"]
    assert alone["version"] == whole["version"]
    assert set(alone["dependencies"]) <= set(whole["dependencies"])
    bench = alone["optional-dependencies"]["bench"]
    assert bench == whole["optional-dependencies"]["bench"]
    assert set(bench) <= set(whole["optional-dependencies"]["dev"])
    assert (ROOT / "clients" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", str(target)], cwd=ROOT / "clients", check=True)
    [built] = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_the_command_and_the_licence(wheel):
    archive = ZipFile(wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    folder = ROOT / "clients"
    assert names == {
        file.relative_to(folder).as_posix()
        for file in (folder / "shardline_client").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    [info] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "shardline-client = " in archive.read(f"{info}/entry_points.txt").decode()
    assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")


def test_the_wheel_works_alone(wheel, tmp_path, server, door):
    """Only the wheel and what it declares (with what that needs) can be imported there."""
    site = tmp_path / "site"
    ZipFile(wheel).extractall(site)
    link_declared_packages(site)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from importlib.util import find_spec\n"
        "assert not [name for name in ('torch', 'transformers', 'fastapi', 'shardline_server')"
        " if find_spec(name)]\n"
        "from shardline_client import Client\n"
        "with Client(sys.argv[2]) as client:\n"
        "    print(client.complete('The', max_tokens=2, ignore_eos=True).usage.completion_tokens)\n"
    )
    # -I -S: no current folder, no variables, no site-packages.
    assert run_python("-I", "-S", "-c", script, str(site), server[door]) == "2\n"


def link_declared_packages(site: Path) -> None:
    """Beside the wheel, links to the installed files of all it requires, and nothing more."""
    project = tomllib.loads((ROOT / "clients" / "pyproject.toml").read_text())["project"]
    todo = list(project["dependencies"])
    seen: set[str] = set()
    while todo:
        requirement = Requirement(todo.pop())
        marker = requirement.marker
        if requirement.name in seen or (marker and not marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        found = distribution(requirement.name)
        todo += found.requires or []
        for top in {file.parts[0] for file in found.files or () if file.parts[0] != ".."}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
