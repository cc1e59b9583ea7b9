"""Decoder layers laid out like llama's, by kernels of our own instead of the library's modules.

The library's own layers stay the definition: before any is replaced, a layer of each kind is run
beside our own on a few made-up tokens. Where they disagree, or the layers are built in another
way, the stage goes on with the library's modules, and a line in the log says why.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardline_shards.attention import (
    AttentionBackend,
    KVLayer,
    KVShape,
    PagedBatch,
    allocate_kv,
    select_backend,
)
from shardline_shards.attention.cpu import load_kernel
from shardline_shards.attention.triton_backend import has_triton
from shardline_shards.batch import StepBatch
from shardline_shards.collectives import Collectives, SingleRank, StageCollectives
from shardline_shards.cpu_stack import CpuStack
from shardline_shards.gpu_stack import GpuStack
from shardline_shards.layer_stack import (
    Embedding,
    Geometry,
    LayerKind,
    LayerStack,
    LayerWeights,
    Rotation,
)
from shardline_shards.ledger import Operation
from shardline_shards.parallel_layers import RowParallelLinear, SkippedLayer
from shardline_shards.stage_model import StageModel, decoder_layers

logger = logging.getLogger(__name__)

# Classes whose layers are what the kernel computes, and nothing else around them.
MODEL_CLASSES = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
# Rotary embeddings that depend on the position alone, not on how long a sequence is.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
_LAYER_CHILDREN = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ATTENTION_CHILDREN = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_ATTENTION_EXTRAS = frozenset({"q_norm", "k_norm"})
_MLP_CHILDREN = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})

_FIRST_TABLE_SIZE = 4096
_NUM_PROBE_TOKENS = 6
# The most that what a layer adds may differ, in Frobenius norm: roundings of the library's steps.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _CannotFuse(Exception):
    """The kernel does not compute what these modules do; the message says why."""


class FusedLayers:
    """All decoder layers of a stage, and on the last stage the norm and the head."""

    def __init__(
        self,
        stack: LayerStack,
        rotary: "_RotaryTable",
        tp: Collectives,
        vocab_sizes: list[int] | None,
        embedding: nn.Module,
    ) -> None:
        """`vocab_sizes`: of the head, the rows of each rank; None where there is no head.
        `embedding` is the model's own, on the first stage.
        """
        self._stack = stack
        self._rotary = rotary
        self._tp = tp
        self._vocab_sizes = vocab_sizes
        self._embedding = embedding

    def run(self, hidden: Tensor | None, batch: StepBatch) -> Tensor:
        """Hidden states [num_tokens, hidden_size] in, on the first stage None; the same out, or
        logits.

        Logits are [num_rows, vocab_size], on tp ranks other than the first only their own part.
        """
        paged = batch.paged
        arguments = self._rotary.at(batch.positions, paged.max_kv_len), paged
        indexes = None if self._vocab_sizes is None else batch.logit_indexes
        begin = self._embed(batch.input_ids) if hidden is None else hidden
        if self._tp.size == 1:
            return self._stack.run(begin, *arguments, indexes)
        if not isinstance(self._tp, StageCollectives) or self._tp.shared_memory is None:
            return self._run_halves(begin, batch.logit_indexes, arguments)
        with self._tp.noticing_loss(Operation.ALL_REDUCE, begin.shape):
            output = self._stack.run(begin, *arguments, indexes, self._tp.shared_memory)
        return self._gathered(output)

    def _embed(self, token_ids: Tensor) -> Tensor | Embedding:
        """A plain embedding's rows are read where they lie: an operator of its own takes a tenth of
        a millisecond beside a step that had the caches to itself.
        """
        if type(self._embedding) is nn.Embedding:
            return Embedding(self._embedding.weight, token_ids)
        embedded: Tensor = self._embedding(token_ids)
        return embedded

    def _run_halves(
        self, begin: Tensor | Embedding, indexes: Tensor, arguments: tuple[Rotation, PagedBatch]
    ) -> Tensor:
        """Half a layer at a time, summed by messages, where ranks share no memory."""
        hidden = begin.rows() if isinstance(begin, Embedding) else begin
        states, is_first = hidden.to(self._stack.sum_dtype), self._tp.rank == 0
        for half in range(2 * self._stack.num_layers):
            part = self._stack.run_half(states, *arguments, half, is_first)
            states = self._tp.all_reduce(part)
        if self._vocab_sizes is None:
            return states.to(hidden.dtype)
        return self._gathered(self._stack.run_head(states, indexes))

    def _gathered(self, output: Tensor) -> Tensor:
        if self._vocab_sizes is None:
            return output
        return self._tp.gather_last_dim(output, self._vocab_sizes)


def fuse(stage_model: StageModel, device: torch.device) -> FusedLayers | None:
    """The stage's layers in a stack, their own weights given back; None if they cannot be.

    The stage's weights are loaded. Nothing is changed where None is returned.
    """
    model = stage_model.model
    new_stack = stack_class(device) if type(model).__name__ in MODEL_CLASSES else None
    if new_stack is None:
        return None
    base = model.get_submodule(model.base_model_prefix)
    layers = [decoder_layers(model)[index] for index in stage_model.layers]
    if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
        return None
    try:
        rotary = _RotaryTable(base.get_submodule("rotary_emb"), device)
        geometry = _geometry(model, layers)
        kinds = _Check(new_stack, geometry, rotary, device).kinds_of(layers)
    except _CannotFuse as reason:
        logger.info("%s runs layer by layer: %s", type(model).__name__, reason)
        return None
    stack = new_stack(geometry)
    for index, layer, kind in zip(stage_model.layers, layers, kinds, strict=True):
        stack.add_layer(_weights(layer), kind)
        decoder_layers(model)[index] = SkippedLayer()
    vocab_sizes = None
    if stage_model.is_last:
        head = model.get_submodule("lm_head")
        vocab_sizes = getattr(head, "sizes", [len(_weight(model, "lm_head"))])
        stack.set_head(_weight(base, "norm"), _weight(model, "lm_head"))
        model.lm_head = nn.Identity()
    if device.type == "cuda":  # KV memory is a share of what others than torch hold as free
        torch.cuda.empty_cache()
    return FusedLayers(stack, rotary, stage_model.tp, vocab_sizes, model.get_input_embeddings())


def stack_class(device: torch.device) -> Callable[[Geometry], LayerStack] | None:
    """What computes layers on `device`; None where nothing of our own can."""
    if device.type == "cuda":
        return GpuStack if has_triton() else None
    return CpuStack if load_kernel() else None


class _RotaryTable:
    """Cosines and sines [num_positions, head_dim] in fp32, from the model's own module."""

    def __init__(self, rotary: nn.Module, device: torch.device) -> None:
        if getattr(rotary, "rope_type", None) not in _ROPE_TYPES:
            raise _CannotFuse(f"rotary embeddings are of another type than {sorted(_ROPE_TYPES)}")
        self._rotary = rotary
        self._device = device
        self._grow(_FIRST_TABLE_SIZE)

    @property
    def width(self) -> int:
        """How much of a head is rotated."""
        return int(self._cos.shape[-1])

    def at(self, positions: Tensor, num_positions: int) -> Rotation:
        """For `positions`, which are all below `num_positions`."""
        if num_positions > len(self._cos):
            self._grow(max(num_positions, 2 * len(self._cos)))
        return Rotation(self._cos, self._sin, positions)

    def _grow(self, num_positions: int) -> None:
        like = torch.empty(0, dtype=torch.float32, device=self._device)
        positions = torch.arange(num_positions, device=self._device)
        cos, sin = self._rotary(like, positions.unsqueeze(0))
        self._cos, self._sin = cos[0], sin[0]


class _Recorder:
    """A backend, noting how it is asked to attend."""

    def __init__(self, inner: AttentionBackend) -> None:
        self._inner = inner
        self.name = self._inner.name
        self.block_size = self._inner.block_size
        self.kinds: list[LayerKind] = []

    def serves(self, device: torch.device, dtype: torch.dtype) -> bool:
        """See `AttentionBackend.serves`."""
        return self._inner.serves(device, dtype)

    def write(self, layer: KVLayer, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See `AttentionBackend.write`."""
        self._inner.write(layer, key, value, slots)

    def attend(
        self,
        query: Tensor,
        layer: KVLayer,
        batch: PagedBatch,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        self.kinds.append(LayerKind(scaling, sliding_window, softcap))
        return self._inner.attend(
            query, layer, batch, scaling=scaling, sliding_window=sliding_window, softcap=softcap
        )


@dataclass(frozen=True, slots=True)
class _Check:
    """Runs layers beside a stack of them."""

    new_stack: Callable[[Geometry], LayerStack]
    geometry: Geometry
    rotary: _RotaryTable
    device: torch.device

    def kinds_of(self, layers: list[nn.Module]) -> list[LayerKind]:
        """How each layer attends. Raises _CannotFuse where a stack's result is not the layer's."""
        if self.rotary.width != self.geometry.head_dim:
            raise _CannotFuse("it rotates a part of each head only")
        generator = torch.Generator().manual_seed(0)
        shape = (_NUM_PROBE_TOKENS, self.geometry.hidden_size)
        random = torch.randn(shape, generator=generator).mul_(0.05)
        hidden = random.to(self.device, self.geometry.dtype)
        kinds: list[LayerKind] = []
        for layer in layers:
            kinds.append(self._kind_of(layer, hidden, kinds))
        return kinds

    def _kind_of(self, layer: nn.Module, hidden: Tensor, known: list[LayerKind]) -> LayerKind:
        dtype = self.geometry.dtype
        positions = torch.arange(_NUM_PROBE_TOKENS, device=self.device) * 7
        rotation = self.rotary.at(positions, 7 * _NUM_PROBE_TOKENS)
        cos, sin = rotation.rows
        paged, recorder = self._probe_batch(layer)
        with _without_sums(layer):
            expected = layer(
                hidden.unsqueeze(0),
                attention_mask=None,
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                position_embeddings=(cos.to(dtype).unsqueeze(0), sin.to(dtype).unsqueeze(0)),
                paged=paged,
            )
        (kind,) = recorder.kinds
        if kind.softcap is not None:
            raise _CannotFuse("it caps attention scores")
        if kind not in known:
            stack = self.new_stack(self.geometry)
            stack.add_layer(_weights(layer), kind)
            _compare(stack.run(hidden, rotation, paged, None), expected.squeeze(0), hidden)
        return kind

    def _probe_batch(self, layer: nn.Module) -> tuple[PagedBatch, _Recorder]:
        """One sequence of a few tokens in memory of its own."""
        geometry, device = self.geometry, self.device
        recorder = _Recorder(select_backend(device, geometry.dtype))
        index = int(layer.get_submodule("self_attn").layer_idx)  # type: ignore[arg-type]
        shape = KVShape(
            block_size=recorder.block_size,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=geometry.dtype,
        )
        count = _NUM_PROBE_TOKENS
        batch = PagedBatch(
            query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
            kv_lens=torch.tensor([count], dtype=torch.int32, device=device),
            block_tables=torch.zeros(1, 1, dtype=torch.int32, device=device),
            slots=torch.arange(count, device=device),
            max_query_len=count,
            max_kv_len=count,
            kv_layers=allocate_kv([index], 1, shape, device),
            backend=recorder,
        )
        return batch, recorder


def _geometry(model: PreTrainedModel, layers: list[nn.Module]) -> Geometry:
    """What all layers have in common. Raises _CannotFuse if they are built in another way."""
    for layer in layers:
        _check_structure(layer)
    attention = layers[0].get_submodule("self_attn")
    head_dim = int(attention.head_dim)  # type: ignore[arg-type]
    norms = {
        float(module.variance_epsilon)  # type: ignore[arg-type]
        for module in model.modules()
        if hasattr(module, "variance_epsilon")
    }
    if len(norms) != 1:
        raise _CannotFuse("its norms differ in epsilon")
    return Geometry(
        hidden_size=int(model.config.hidden_size),
        num_heads=len(_weight(attention, "q_proj")) // head_dim,
        num_kv_heads=len(_weight(attention, "k_proj")) // head_dim,
        head_dim=head_dim,
        eps=norms.pop(),
        dtype=model.dtype,
    )


def _check_structure(layer: nn.Module) -> None:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    for module, names, optional in (
        (layer, _LAYER_CHILDREN, frozenset[str]()),
        (attention, _ATTENTION_CHILDREN, _ATTENTION_EXTRAS),
        (mlp, _MLP_CHILDREN, frozenset[str]()),
    ):
        children = {name for name, _ in module.named_children()}
        if children - optional != names:
            raise _CannotFuse(f"{type(module).__name__} has the parts {sorted(children)}")
    plain = [mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
    if any(module.bias is not None for module in [*plain, attention.get_submodule("o_proj")]):
        raise _CannotFuse("it has biases beside those of queries, keys and values")


def _weight(module: nn.Module, name: str) -> Tensor:
    return module.get_parameter(f"{name}.weight").data.contiguous()


@contextmanager
def _without_sums(layer: nn.Module) -> Iterator[None]:
    """While layers are compared, this rank's part stands for the whole: ranks have not met yet."""
    linears = [module for module in layer.modules() if isinstance(module, RowParallelLinear)]
    held = [linear.tp for linear in linears]
    for linear in linears:
        linear.tp = SingleRank()
    try:
        yield
    finally:
        for linear, tp in zip(linears, held, strict=True):
            linear.tp = tp


def _compare(ours: Tensor, theirs: Tensor, hidden: Tensor) -> None:
    added, expected = ours.float() - hidden.float(), theirs.float() - hidden.float()
    distance = float((added - expected).norm() / expected.norm())
    if not distance <= _TOLERANCE[hidden.dtype]:
        raise _CannotFuse(f"the kernel's result for a layer is {distance:.1%} off the layer's own")


def _weights(layer: nn.Module) -> LayerWeights:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    qkv = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    biases = [module.bias for module in qkv if module.bias is not None]
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LayerWeights(
        qkv=[_weight(attention, name) for name in ("q_proj", "k_proj", "v_proj")],
        output=_weight(attention, "o_proj"),
        gate_up=[_weight(mlp, "gate_proj"), _weight(mlp, "up_proj")],
        down=_weight(mlp, "down_proj"),
        input_norm=_weight(layer, "input_layernorm"),
        post_norm=_weight(layer, "post_attention_layernorm"),
        qkv_bias=torch.cat(biases) if biases else None,  # type: ignore[arg-type]
        query_norm=None if query_norm is None else query_norm.weight,
        key_norm=None if key_norm is None else key_norm.weight,
    )
