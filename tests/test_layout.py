"""The shape of the project: who may import whom, and what is shipped."""

import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import grimp
import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "shardline_scheduler": "scheduler",
    "shardline_shards": "model_shards",
    "shardline_server": "server",
    "shardline_client": "clients",
}
# importing package: the modules of ours (and all below them) that it may import
ARROWS = {
    "shardline_scheduler": (),
    "shardline_shards": ("shardline_scheduler.plan",),
    "shardline_server": ("shardline_scheduler", "shardline_shards"),
    "shardline_client": (),
}
# The command line alone also drives the client, lazily; and what it simulates is a bench's load.
COMMAND_LINE = ("shardline_server.cli", "shardline_server.simulate.command")
# The scheduler decides; it computes no tensor, waits for nothing and reads no clock.
NOT_IN_SCHEDULER = {
    *("torch", "numpy", "transformers", "zmq", "asyncio", "concurrent", "threading"),
    *("multiprocessing", "socket", "select", "subprocess", "os", "io", "pathlib", "time"),
    *("datetime", "logging", "random"),
}


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*FOLDERS, include_external_packages=True, cache_dir=None)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    subprocess.run([*command, "--directory", str(target)], cwd=ROOT, check=True)
    (built,) = target.glob("*.whl")
    return ZipFile(built)


def package_of(module: str) -> str:
    return module.split(".")[0]


def is_within(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_along_the_arrows(imports: grimp.ImportGraph, package: str) -> None:
    crossings = {
        (importer, imported)
        for importer in imports.find_descendants(package) | {package}
        for imported in imports.find_modules_directly_imported_by(importer)
        if package_of(imported) in FOLDERS and package_of(imported) != package
    }
    forbidden = {
        (importer, imported)
        for importer, imported in crossings
        if not is_within(imported, ARROWS[package])
        and not (importer in COMMAND_LINE and package_of(imported) == "shardline_client")
    }
    assert not forbidden


def test_the_scheduler_has_no_tensors_no_io_and_no_clock(imports: grimp.ImportGraph) -> None:
    package = "shardline_scheduler"
    used = {
        package_of(imported)
        for importer in imports.find_descendants(package) | {package}
        for imported in imports.find_modules_directly_imported_by(importer)
    }
    assert not used & NOT_IN_SCHEDULER


def test_the_wheel_holds_exactly_the_four_packages(wheel: ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {
        file.relative_to(ROOT / folder).as_posix()
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == sources
    assert {f"{package}/py.typed" for package in FOLDERS} <= names


def test_the_wheel_has_one_command_and_the_licence(wheel: ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    info = f"shardline-{version}.dist-info"
    entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    assert entry_points.strip() == "[console_scripts]\nshardline = shardline_server.cli:main"
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
