"""A stage on a GPU: is it right, and how far is it from what memory and matrix units could do?

    python bench/gpu.py llama-3.1-8b qwen3-0.6b
    python bench/gpu.py tiny --device cpu   # the same code without a GPU; its figures mean nothing
    python bench/gpu.py llama-3.1-8b --kernels   # and which kernels take the time

Random weights of the shapes in gpu_model.py: no model is read, and torch, transformers and the two
packages that a worker imports are all it needs. First attention, recorded decodes and sampling are
compared with the slow reference; a difference ends the run. Then steps are timed: decodes of 1, 8,
64 and 256 sequences of 1,024 tokens as a fraction of the bandwidth that a large copy reaches, a
prompt of 4,096 as a fraction of the rate of a large product, and 64 streams beside `transformers`'
own continuous batching of the same shape.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from gpu_model import SHAPES, Model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, PreTrainedConfig

from shardline_scheduler.plan import Chunk, Decodes, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import BACKENDS, AttentionBackend
from shardline_shards.batch import RequestTable, StepBatch
from shardline_shards.drawing import draw
from shardline_shards.stage_model import model_class


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; smaller for a look without a GPU."""

    num_decodes: tuple[int, ...] = (1, 8, 64, 256)
    context: int = 1024
    prompt: int = 4096
    copied_bytes: int = 4 << 30
    product: int = 8192
    num_rounds: int = 20
    num_streams: int = 64
    num_output_tokens: int = 128


TINY = Sizes(
    num_decodes=(1, 3),
    context=40,
    prompt=64,
    copied_bytes=1 << 20,
    product=64,
    num_rounds=2,
    num_streams=3,
    num_output_tokens=4,
)


@dataclass(frozen=True)
class Machine:
    """What the device could do: bytes read or written a second, bf16 operations a second."""

    device: torch.device
    bytes_per_s: float
    flops_per_s: float


def seconds(run: Callable[[], object], num_rounds: int, device: torch.device) -> float:
    """The median of `num_rounds` runs, each to the end of what the device computes."""
    times = []
    run()
    for _ in range(num_rounds):
        _finish(device)
        start = time.perf_counter()
        run()
        _finish(device)
        times.append(time.perf_counter() - start)
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_machine(device: torch.device, sizes: Sizes) -> Machine:
    source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds(lambda: target.copy_(source), sizes.num_rounds, device)
    left = torch.randn(sizes.product, sizes.product, dtype=torch.bfloat16, device=device)
    multiplying = seconds(lambda: left @ left, sizes.num_rounds, device)
    return Machine(device, 2 * sizes.copied_bytes / copying, 2 * sizes.product**3 / multiplying)


def check_attention(model: Model, sizes: Sizes) -> None:
    """The device's attention against the formula, for a ragged step of prompts and decodes."""
    config, generator = model.config, torch.Generator(model.device).manual_seed(1)
    kv_len = 2 * sizes.context // 3
    requests, plan = model.requests(3, kv_len, 1)
    lengths = (kv_len, 1, 20)
    chunks = [
        Chunk(chunk.request_index, kv_len - count, count, chunk.block_ids, True)
        for chunk, count in zip(plan.chunks, lengths, strict=True)
    ]
    plan = StepPlan(0, new_requests=plan.new_requests, chunks=chunks)
    requests.apply(plan)
    paged = model.batches.build(plan, requests).paged
    head_dim = model.head_dim
    query = torch.randn(
        sum(lengths),
        config.num_attention_heads,
        head_dim,
        generator=generator,
        device=model.device,
        dtype=torch.bfloat16,
    )

    def attend(backend: AttentionBackend) -> Tensor:
        return backend.attend(
            query,
            paged.kv_layers[0],
            paged,
            scaling=head_dim**-0.5,
            sliding_window=None,
            softcap=None,
        )

    # Two bf16 roundings of values below 4: the sum's, and that of each weight before it.
    _agree(
        f"attention ({model.backend.name})",
        attend(model.backend),
        attend(BACKENDS["reference"]),
        0.03,
    )


def check_graphs(model: Model, count: int) -> None:
    batch = model.decodes(count, 40)
    plain = model.stage.run(batch, None).float()
    replayed = model.run(batch, None).float()
    # A padded product may take another kernel, which sums in another order.
    _agree(f"recorded decodes of {count}", replayed, plain, 0.02 * float(plain.abs().max()))


def check_sampling(model: Model) -> None:
    """The same tokens on the device as on a CPU, for the same logits and seeds."""
    batch = model.decodes(3, 40)
    logits = torch.randn(3, model.config.vocab_size, generator=torch.Generator().manual_seed(2))
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20}):
        requests = RequestTable()
        new = [
            NewRequest(i, [i], 1, SamplingParams(max_tokens=9, seed=i, **options)) for i in range(3)
        ]
        requests.apply(StepPlan(0, new_requests=new))
        there = draw(0, batch, logits.to(model.device), requests)
        if there.token_ids != draw(0, batch, logits, requests).token_ids:
            sys.exit(f"sampling with {options} draws other tokens than on a CPU")
    print("sampling: the tokens that a CPU draws")


def _agree(what: str, ours: Tensor, reference: Tensor, tolerance: float) -> None:
    difference = float((ours.float() - reference.float()).abs().max())
    print(f"{what}: at most {difference:.4f} from the reference ({tolerance:.4f} allowed)")
    if not difference <= tolerance:
        sys.exit(f"{what} is wrong")


def time_decodes(model: Model, machine: Machine, sizes: Sizes) -> None:
    for count in sizes.num_decodes:
        batch = model.decodes(count, sizes.context)
        read = 2 * model.num_read_weights + count * sizes.context * model.token_bytes
        floor_s = read / machine.bytes_per_s
        taken = [
            seconds(lambda run=run, batch=batch: run(batch, None), sizes.num_rounds, model.device)
            for run in (model.run, model.stage.run)
        ]
        print(
            f"{count:4} decodes: {taken[0] * 1e3:8.2f} ms, {floor_s / taken[0]:6.1%} of the "
            f"bandwidth; not recorded {taken[1] * 1e3:8.2f} ms"
        )


def time_prompt(model: Model, machine: Machine, sizes: Sizes) -> None:
    """Operations: two for each weight and token, but for the head's (one row), and attention's."""
    config, count = model.config, sizes.prompt
    batch = model.prompt(count)
    taken = seconds(lambda: model.run(batch, None), sizes.num_rounds, model.device)
    width = config.num_attention_heads * model.head_dim
    attention = 2 * count**2 * width * config.num_hidden_layers
    flops = 2 * (model.num_read_weights - model.num_head_weights) * count + attention
    print(
        f"prompt of {count}: {taken * 1e3:8.2f} ms, {flops / taken / machine.flops_per_s:6.1%} "
        "of the matrix rate"
    )


def print_kernels(model: Model, what: str, batch: StepBatch) -> None:
    """What takes the time of a step, all rounds together."""
    on_gpu = model.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        for _ in range(3):
            model.run(batch, None)
        _finish(model.device)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(f"\n{what}, three times")
    print(seen.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=60))


def run_streams(model: Model, sizes: Sizes) -> float:
    """Tokens a second of `num_streams` requests from prompts to last tokens, greedy."""
    requests, plan = model.requests(sizes.num_streams, sizes.context, sizes.num_output_tokens)
    _finish(model.device)
    start = time.perf_counter()
    drawn: dict[int, int] = {}
    for new, chunk in zip(plan.new_requests, plan.chunks, strict=True):
        drawn |= _step(model, requests, StepPlan(0, new_requests=[new], chunks=[chunk]))
    for step in range(sizes.num_output_tokens - 1):
        lengths = [sizes.context + step] * len(drawn)
        decodes = Decodes([*drawn], lengths, [*drawn.values()])
        drawn = _step(model, requests, StepPlan(step + 1, decodes=decodes))
    taken = time.perf_counter() - start
    return sizes.num_streams * sizes.num_output_tokens / taken


def _step(model: Model, requests: RequestTable, plan: StepPlan) -> dict[int, int]:
    requests.apply(plan)
    batch = model.batches.build(plan, requests)
    result = draw(plan.step_id, batch, model.run(batch, None), requests)
    return dict(zip(plan.drawing_indexes, result.token_ids, strict=True))


def run_transformers(
    config: PreTrainedConfig, device: torch.device, prompts: list[list[int]], count: int
) -> float:
    """Tokens a second of the same load by `generate_batch`, prompts included."""
    with device:
        module = model_class(config)._from_config(config, dtype=torch.bfloat16)
    module.eval()
    options = GenerationConfig(
        max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    module.generate_batch(prompts[:1], generation_config=options)
    start = time.perf_counter()
    outputs = module.generate_batch(prompts, generation_config=options)
    taken = time.perf_counter() - start
    return sum(len(output.generated_tokens) for output in outputs.values()) / taken


def measure(name: str, machine: Machine, sizes: Sizes, *, shows_kernels: bool) -> None:
    config, device = SHAPES[name], machine.device
    max_decodes = max(*sizes.num_decodes, sizes.num_streams)
    num_tokens = max(max_decodes * sizes.context, sizes.prompt)
    num_tokens += sizes.num_streams * sizes.num_output_tokens
    model = Model(config, device, num_tokens, max_decodes)
    layers = "kernels" if model.stage.is_fused else "the library's modules"
    print(
        f"\n{name}: {2 * model.num_weights / 1e9:.2f} GB, attention: {model.backend.name}, "
        f"layers: {layers}",
        flush=True,
    )
    check_attention(model, sizes)
    for count in (1, 3):
        check_graphs(model, count)
    check_sampling(model)
    time_decodes(model, machine, sizes)
    time_prompt(model, machine, sizes)
    if shows_kernels:
        print_kernels(model, "a decode", model.decodes(1, sizes.context))
        print_kernels(model, f"a prompt of {sizes.prompt}", model.prompt(sizes.prompt))
    ours = run_streams(model, sizes)
    print(f"{sizes.num_streams} streams, prompts included: {ours:.1f} tokens/s")
    _, plan = model.requests(sizes.num_streams, sizes.context, 1)
    prompts = [list(new.token_ids) for new in plan.new_requests]
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
        theirs = run_transformers(config, device, prompts, sizes.num_output_tokens)
        print(
            f"transformers' continuous batching: {theirs:.1f} tokens/s; ours {ours / theirs:.2f} x"
        )
    else:
        print("transformers' continuous batching: not run, it wants a GPU")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("shapes", nargs="+", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", action="store_true", help="show which take the time")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu runs the same code on a CPU")
    sizes = Sizes() if device.type == "cuda" else TINY
    machine = measure_machine(device, sizes)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{what}, torch {torch.__version__}")
    print(
        f"copy {machine.bytes_per_s / 1e9:.0f} GB/s, bf16 {machine.flops_per_s / 1e12:.1f} TFLOP/s"
    )
    for name in arguments.shapes:
        measure(name, machine, sizes, shows_kernels=arguments.kernels)


if __name__ == "__main__":
    main()
