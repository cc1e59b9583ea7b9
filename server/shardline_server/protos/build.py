"""Generates the gRPC stubs beside the .proto files: `python -m shardline_server.protos.build`.

For developers (`grpcio-tools` and `mypy-protobuf` are needed); the stubs are committed.
The files keep the name `shardline/v1/….proto` inside, so that another package may hold a copy of
the same stubs in the same process; only the imports between them name this package.
"""

import sysconfig
from importlib import resources
from pathlib import Path

PACKAGE = "shardline_server.protos"
FOLDER = Path(__file__).parent


def build(target: Path = FOLDER, package: str = PACKAGE) -> None:
    """Write the stubs of every .proto file below `target`, importable below `package`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    protos = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.proto"))
    well_known = resources.files("grpc_tools") / "_proto"
    outputs = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={FOLDER}",
            f"--proto_path={well_known}",
            *(f"--plugin={plugin}={scripts / plugin}" for plugin in plugins),
            *(f"--{output}={target}" for output in outputs),
            *map(str, protos),
        ]
    )
    if status != 0:
        raise SystemExit(status)
    for proto in protos:
        for path in (target / proto.parent).glob(f"{proto.stem}_pb2*.py*"):
            _import_from_package(path, proto, package)


def _import_from_package(path: Path, proto: Path, package: str) -> None:
    """protoc writes imports relative to the .proto root; make them relative to the package."""
    module = ".".join(proto.parent.parts)
    text = path.read_text()
    text = text.replace(f"from {module} import", f"from {package}.{module} import")
    text = text.replace(f"import {module}.", f"import {package}.{module}.")
    path.write_text(text)


if __name__ == "__main__":
    build()
