"""The committed stubs are what the .proto files give, and a copy of them can live beside them."""

import sys

from shardline_server.protos import build


def test_the_stubs_are_up_to_date(tmp_path):
    build.build(tmp_path)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    assert len(fresh) == 4
    for path, text in fresh.items():
        assert (build.FOLDER / path).read_text() == text, f"run `make protos`: {path} is old"


def test_another_package_may_hold_a_copy(tmp_path, monkeypatch):
    package = tmp_path / "copied" / "protos"
    package.mkdir(parents=True)
    build.build(package, "copied.protos")
    monkeypatch.syspath_prepend(tmp_path)
    from copied.protos.shardline.v1 import generation_pb2, generation_pb2_grpc

    from shardline_server.protos.shardline.v1 import generation_pb2 as ours

    assert generation_pb2_grpc.GenerationStub
    assert generation_pb2.Usage(prompt_tokens=3) == ours.Usage(prompt_tokens=3)
    for name in [name for name in sys.modules if name.split(".")[0] == "copied"]:
        del sys.modules[name]
