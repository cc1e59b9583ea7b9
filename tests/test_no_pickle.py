"""Nothing of ours pickles: what reaches a socket could then run code in whoever reads it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    source
    for folder in ("scheduler", "model_shards", "server", "clients")
    for source in (ROOT / folder).rglob("*.py")
)
# Modules that pickle, or that hand objects to other processes by it.
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
MODULES |= {"multiprocessing", "concurrent.futures.process", "torch.distributed.rpc"}
# What else does: ZMQ's and torch.distributed's ways to send objects, and reading files of them.
CALLS = {"send_pyobj", "recv_pyobj", "send_serialized", "recv_serialized"}
CALLS |= {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
CALLS |= {"send_object_list", "recv_object_list", "ProcessPoolExecutor", "read_pickle"}


def names_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names) if module is not None:
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
                yield from (alias.name for alias in names)
            case ast.Attribute(attr=name) | ast.Name(id=name):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                yield "torch.load"


def pickles(source: str) -> set[str]:
    """What in a source pickles."""
    found = set()
    for name in names_in(ast.parse(source)):
        is_module = any(name == one or name.startswith(f"{one}.") for one in MODULES)
        if is_module or name in CALLS or name == "torch.load":
            found.add(name)
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_source_pickles(source: Path) -> None:
    assert not pickles(source.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing import Queue",
        "import torch.distributed as dist\ndist.broadcast_object_list([1])",
        "socket.send_pyobj(1)",
        "import torch\ntorch.load('x')",
        "from torch.distributed import all_gather_object",
    ],
)
def test_what_pickles_is_found(source: str) -> None:
    assert pickles(source)
