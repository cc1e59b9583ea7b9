"""How the CPU kernel is compiled and cached; and the CUDA backend, as far as goes without a GPU."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import shardline_shards.attention
from shardline_shards.attention import BACKENDS, KVLayer, PagedBatch
from shardline_shards.attention.build import BuildError, build, compiler_command

SOURCE_FOLDER = Path(shardline_shards.attention.__file__).parent / "csrc"
COMPILER = """#!/bin/sh
echo run >> {log}
while [ "$1" != "-o" ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for the C++ compiler, which is no class of ours; it logs its runs."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path / "cache"))
    return log


def test_processes_that_start_together_compile_once(compiler_log: Path) -> None:
    command = [sys.executable, "-m", "shardline_shards.attention.build"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (path,) = printed
    assert Path(path).read_text() == "library\n"
    assert compiler_log.read_text() == "run\n"


def test_what_is_compiled_is_found_again(compiler_log: Path) -> None:
    assert build() == build()
    assert compiler_log.read_text() == "run\n"


def test_a_failed_compilation_says_what_the_compiler_said(
    compiler_log: Path, tmp_path: Path
) -> None:
    (tmp_path / "compiler").write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    with pytest.raises(BuildError, match="no such header"):
        build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARDLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="SHARDLINE_CACHE"):
        build()


def test_the_sources_lie_in_the_package() -> None:
    sources = {path.name: path.read_text() for path in SOURCE_FOLDER.iterdir()}
    compiled = {name for name in sources if name.endswith(".cpp")}
    assert {"paged_attention.cpp", "decoder_stack.cpp"} <= compiled
    included = {name for text in sources.values() for name in re.findall(r'#include "(.*)"', text)}
    assert included == sources.keys() - compiled


def test_sums_of_products_stay_in_registers() -> None:
    """A compiler that keeps them in memory makes a product take twice as long, and all else the
    same: it did, unnoticed, once arrays of them had a constructor.
    """
    command = ["objdump", "-d", "--no-show-raw-insn", build()]
    program = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split("\t")[-1] for line in program.splitlines()]
    products = [i for i, line in enumerate(lines) if re.match("v(dpbf16ps|fmadd)", line)]
    if not products:
        pytest.skip("this processor has no such instructions")
    is_kept = re.compile(r"vmov[au]ps\s+%[yz]mm\d+,.*\(%r[sb]p")
    num_kept = sum(any(map(is_kept.match, lines[i + 1 : i + 4])) for i in products)
    # Behind a loop its last sums are stored, one or two in a hundred products.
    assert num_kept < 0.05 * len(products), f"{num_kept} of {len(products)}"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for processors of this kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4", "sapphirerapids"])
def test_it_compiles_for_processors_that_do_without(processor: str) -> None:
    """Of AVX-512, pairs of bf16 and tiles: none, none with AVX2, the first, all."""
    command = [*compiler_command(processor), "-O0", "-fsyntax-only"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for processors of this kind")
@pytest.mark.parametrize(
    ("processor", "passes_by_caches"),
    [("x86-64-v4", False), ("sapphirerapids", False), ("znver2", True), ("znver3", True)],
)
def test_weights_pass_by_the_caches_where_they_can(processor: str, passes_by_caches: bool) -> None:
    """Where they cannot, asking for it makes a step take 2.7 times as long: it did, unnoticed."""
    expected = "==" if passes_by_caches else "!="
    program = f'#include "vector_math.h"\nstatic_assert(kOnce {expected} 0);\n'
    command = [word for word in compiler_command(processor) if not word.endswith(".cpp")]
    command += [f"-I{SOURCE_FOLDER}", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of torch's paged FlashAttention operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn.default:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sliding_window", "window_size"), [(None, [-1, 0]), (128, [127, 0])])
def test_the_cuda_backend_speaks_torchs_operator(
    sliding_window: int | None, window_size: list[int]
) -> None:
    """On tensors without memory: shapes, dtypes and arguments, no numbers."""
    backend = BACKENDS["cuda"]
    with FakeTensorMode(), torch.device("cuda"):
        pools = (torch.empty(5, backend.block_size, 3, 64, dtype=torch.bfloat16) for _ in range(2))
        layer = KVLayer(*pools)
        batch = PagedBatch(
            query_start=torch.empty(3, dtype=torch.int32),
            kv_lens=torch.empty(2, dtype=torch.int32),
            block_tables=torch.empty(2, 2, dtype=torch.int32),
            slots=torch.empty(7, dtype=torch.int64),
            max_query_len=6,
            max_kv_len=300,
            kv_layers={0: layer},
            backend=backend,
        )
        new = torch.empty(7, 3, 64, dtype=torch.bfloat16)
        backend.write(layer, new, new, batch.slots)
        query = torch.empty(7, 9, 64, dtype=torch.bfloat16)
        with Recorder() as recorder:
            output = backend.attend(
                query, layer, batch, scaling=0.125, sliding_window=sliding_window, softcap=None
            )
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
    (call,) = recorder.calls
    assert call["block_table"] is batch.block_tables
    assert call["seqused_k"] is batch.kv_lens
    assert call["cu_seq_k"].shape == (3,) and call["cu_seq_k"].dtype == torch.int32
    assert (call["max_q"], call["max_k"], call["scale"]) == (6, 300, 0.125)
    assert (call["window_size"], call["enable_gqa"], call["num_splits"]) == (window_size, True, 1)


def test_the_cuda_backend_leaves_other_devices_and_fp32_alone() -> None:
    backend = BACKENDS["cuda"]
    assert not backend.serves(torch.device("cpu"), torch.bfloat16)
    assert not backend.serves(torch.device("cuda"), torch.float32)
