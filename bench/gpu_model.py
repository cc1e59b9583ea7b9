"""The shapes that bench/gpu.py measures, and a stage that holds one of them whole."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from shardline_scheduler.plan import Chunk, NewRequest, SamplingParams, StepPlan
from shardline_shards.attention import allocate_kv, select_backend
from shardline_shards.batch import BatchBuilder, RequestTable, StepBatch
from shardline_shards.checkpoint import load_dummy
from shardline_shards.collectives import SingleRank
from shardline_shards.decode_graphs import CudaRecorder, DecodeGraphs, sizes_up_to
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.stage import Stage
from shardline_shards.stage_model import build_stage_model

SHAPES: dict[str, PreTrainedConfig] = {
    "llama-3.1-8b": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
    "qwen3-0.6b": Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    ),
}


class Model:
    """One stage that is the whole model, with KV memory for a number of sequences.

    `run` is as a worker has it: decodes recorded on a GPU, as they are elsewhere.
    """

    def __init__(
        self, config: PreTrainedConfig, device: torch.device, num_tokens: int, max_decodes: int
    ) -> None:
        layout = ParallelLayout(tp=1, stage_layers=(config.num_hidden_layers,))
        built = build_stage_model(config, layout, Place(0, 0), SingleRank(), torch.bfloat16, device)
        load_dummy(built, device, seed=0)
        self.config = config
        self.device = device
        self.module = built.model
        # Counted before the stage is made: a CPU's kernel takes the weights over.
        self.num_weights = sum(parameter.numel() for parameter in built.model.parameters())
        self.stage = Stage(built, device)
        self.backend = select_backend(device, torch.bfloat16)
        self.block_size = self.backend.block_size
        shape = self.stage.kv_shape(self.block_size, 1, 0)
        self.token_bytes = shape.block_bytes * config.num_hidden_layers // self.block_size
        # A block more for each sequence, whose last is not full, and one for recorded padding.
        num_blocks = num_tokens // self.block_size + max_decodes + 1
        kv_layers = allocate_kv(range(config.num_hidden_layers), num_blocks + 1, shape, device)
        for layer in kv_layers.values():
            layer.key.normal_()
            layer.value.normal_()
        self.batches = BatchBuilder(kv_layers, self.block_size, self.backend, device)
        self.run: Callable[[StepBatch, Tensor | None], Tensor] = self.stage.run
        if device.type == "cuda":
            graphs = DecodeGraphs(
                self.stage,
                self.batches,
                CudaRecorder(),
                max_model_len=config.max_position_embeddings,
                scratch_block=num_blocks,
                sizes=sizes_up_to(max_decodes),
            )
            self.run = graphs.run

    @property
    def num_head_weights(self) -> int:
        """Those of the head, which are as many as the embedding's."""
        return int(self.config.vocab_size * self.config.hidden_size)

    @property
    def num_read_weights(self) -> int:
        """What every step reads: all but an embedding that is not the head too."""
        return self.num_weights - (0 if self.config.tie_word_embeddings else self.num_head_weights)

    @property
    def head_dim(self) -> int:
        """Of the attention."""
        config = self.config
        explicit: int | None = getattr(config, "head_dim", None)
        return explicit or config.hidden_size // config.num_attention_heads

    def requests(self, count: int, num_tokens: int, room: int) -> tuple[RequestTable, StepPlan]:
        """`count` requests of random tokens, with blocks for `room` more of each."""
        generator = torch.Generator().manual_seed(count)
        new, chunks = [], []
        num_blocks = -(-(num_tokens + room) // self.block_size)
        for index in range(count):
            shape = (num_tokens,)
            tokens = torch.randint(self.config.vocab_size, shape, generator=generator).tolist()
            sampling = SamplingParams(max_tokens=room, seed=index, temperature=0.0)
            new.append(NewRequest(index, tokens, num_tokens, sampling))
            blocks = list(range(index * num_blocks, (index + 1) * num_blocks))
            chunks.append(Chunk(index, 0, num_tokens, blocks, True))
        return RequestTable(), StepPlan(0, new_requests=new, chunks=chunks)

    def decodes(self, count: int, context: int) -> StepBatch:
        """A step of one more token for each of `count` sequences of `context` tokens."""
        requests, plan = self.requests(count, context, 1)
        last = [
            Chunk(chunk.request_index, context - 1, 1, chunk.block_ids, True)
            for chunk in plan.chunks
        ]
        plan = StepPlan(0, new_requests=plan.new_requests, chunks=last)
        requests.apply(plan)
        return self.batches.build(plan, requests)

    def prompt(self, num_tokens: int) -> StepBatch:
        requests, plan = self.requests(1, num_tokens, 1)
        requests.apply(plan)
        return self.batches.build(plan, requests)
