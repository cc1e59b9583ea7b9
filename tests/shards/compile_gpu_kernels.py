"""Compiles the kernels for GPUs that are not here, and prints what shared memory each takes.

A program of its own: a process either interprets Triton's kernels or compiles them.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardline_shards import layer_kernels
from shardline_shards.attention import triton_kernels
from shardline_shards.attention.triton_backend import Tile, width_of

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
INTEGERS = "query_start kv_lens block_tables"
FLOATS = "cos sin partial_sums partial_scales"
NUMBERS = "num_seqs max_splits width num_columns"


def compile_kernel(kernel, dtype: str, capability: int, num_warps: int, **constants) -> int:
    """Bytes of shared memory; arguments that `constants` lack are known by their names."""
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS.split():
            signature[name] = "*i32"
        elif name in FLOATS.split():
            signature[name] = "*fp32"
        elif name == "slots":
            signature[name] = "*i64"
        elif name in ("scale", "eps"):
            signature[name] = "fp32"
        elif name in NUMBERS.split() or name.endswith("_stride"):
            signature[name] = "i32"
        else:
            signature[name] = f"*{dtype}"
        if signature[name].startswith("*") or name.endswith("_stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).metadata.shared


def main() -> None:
    capability = int(sys.argv[1])
    for dtype, head_dim, group in (("bf16", 128, 4), ("fp16", 64, 3), ("fp32", 256, 1)):
        tile = Tile.of(group, head_dim, ELEMENT_BYTES[dtype])
        dim = width_of(head_dim)
        heads = {"NUM_KV_HEADS": 8, "GROUP": group, "HEAD_DIM": head_dim, "DIM": dim}
        attention = heads | {"BLOCK_SIZE": 16, "WINDOW": 99, "SOFTCAP": 9.0, "KEYS": tile.keys}
        split = {"WINDOW": 99, "SPLIT": 256}
        rows = {"ROWS": tile.single_rows, "SPLIT": 256}
        kernels = (
            (triton_kernels.attend_chunks, 8, attention | {"ROWS": tile.chunk_rows}),
            (triton_kernels.attend_singles, 4, attention | rows | {"IS_SHARED": True}),
            (triton_kernels.attend_singles, 4, attention | rows | {"IS_SHARED": False}),
            (
                triton_kernels.merge_splits,
                1,
                split | {"NUM_HEADS": 8, "HEAD_DIM": head_dim, "DIM": dim},
            ),
            (layer_kernels.add_norm, 4, {"HAS_DELTA": True, "WIDTH": 4096}),
            (layer_kernels.multiply_silu, 4, {"COLUMNS": 1024}),
            (
                layer_kernels.rotate_and_write,
                4,
                {
                    "NUM_HEADS": 8 * group,
                    "NUM_KV_HEADS": 8,
                    "HEAD_DIM": head_dim,
                    "HALF": head_dim // 2,
                    "BLOCK_SIZE": 16,
                    "HAS_NORMS": True,
                    "HEADS": 8,
                },
            ),
        )
        for kernel, num_warps, constants in kernels:
            shared = compile_kernel(kernel, dtype, capability, num_warps, **constants)
            print(kernel.__name__, dtype, head_dim, shared)


if __name__ == "__main__":
    main()
