"""Applies the tensor axis to a one-device model from outside, by the plan in its config.

Works on a model whose parameters are on the meta device: layers are replaced by narrower ones, and
for every parameter it is written down which slice of which checkpoint tensor belongs there.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shardline_shards.collectives import Collectives
from shardline_shards.errors import UnsupportedModel
from shardline_shards.layout import HeadShare, deal, deal_heads
from shardline_shards.parallel_layers import (
    GatheredLinear,
    HeadSplitRMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)

_COLUMN_STYLES = frozenset({"colwise", "packed_colwise", "colwise_gather_output"})
_ROW_STYLES = frozenset({"rowwise", "rowwise_split_input"})
_KNOWN_STYLES = _COLUMN_STYLES | _ROW_STYLES | {"replicated_with_grad_allreduce"}


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """Where a parameter comes from: a checkpoint tensor, or the `ranges` of it along `dim`."""

    name: str
    dim: int = 0
    ranges: tuple[range, ...] = ()


@dataclass(slots=True)
class TensorSharder:
    """Splits one stage's model for one tp rank; `sources` tells the loader what to read."""

    model: PreTrainedModel
    tp: Collectives
    sources: dict[str, ParameterSource] = field(default_factory=dict)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's own config."""
        return self.model.config

    def shard_layers(self, layers: Iterable[int]) -> None:
        """Split these decoder layers. Raises UnsupportedModel where the plan does not suffice."""
        styles = self._layer_styles()
        for index in layers:
            prefix = f"{self.model.base_model_prefix}.layers.{index}"
            layer = self.model.get_submodule(prefix)
            share = self._head_share()
            attention_path = find_attention(layer)
            _LayerSharder(self, prefix, layer, attention_path, share, styles).shard()

    def shard_embedding(self, path: str) -> None:
        """Split the vocabulary rows of the embedding at `path`."""
        embedding = self.model.get_submodule(path)
        assert isinstance(embedding, nn.Embedding)
        rows = self._vocab_parts(embedding.num_embeddings)[self.tp.rank]
        self.model.set_submodule(path, VocabParallelEmbedding(embedding, rows, self.tp))
        self.sources[f"{path}.inner.weight"] = ParameterSource(f"{path}.weight", 0, (rows,))

    def shard_head(self, path: str) -> None:
        """Split the vocabulary rows of the head at `path`."""
        head = self.model.get_submodule(path)
        assert isinstance(head, nn.Linear)
        parts = self._vocab_parts(head.out_features)
        sizes = [len(part) for part in parts]
        has_bias = head.bias is not None
        gathered = GatheredLinear(head.in_features, sizes, has_bias, self.tp)
        self.model.set_submodule(path, gathered.to(self.model.dtype))
        for name, _ in gathered.named_parameters():
            source = ParameterSource(f"{path}.{name}", 0, (parts[self.tp.rank],))
            self.sources[f"{path}.{name}"] = source

    def _vocab_parts(self, vocab_size: int) -> list[range]:
        return deal(vocab_size, self.tp.size)

    def _head_share(self) -> HeadShare:
        config = self.config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shares = deal_heads(config.num_attention_heads, num_kv_heads, self.tp.size)
        return shares[self.tp.rank]

    def _layer_styles(self) -> dict[re.Pattern[str], str]:
        plan = self.config.base_model_tp_plan
        if not plan:
            raise UnsupportedModel(
                f"{type(self.model).__name__} publishes no tensor plan; serve it with --tp 1"
            )
        marker = "layers.*."
        for pattern, style in plan.items():
            if pattern.startswith(marker) and style not in _KNOWN_STYLES:
                raise UnsupportedModel(
                    f"{type(self.model).__name__} cannot be split over {self.tp.size} ranks: "
                    f"its plan splits {pattern!r} by {style!r}; serve it with --tp 1"
                )
        return {
            re.compile(re.escape(pattern.removeprefix(marker))): style
            for pattern, style in plan.items()
            if pattern.startswith(marker)
        }


def find_attention(layer: nn.Module) -> str:
    """Path of a decoder layer's attention module. Raises UnsupportedModel unless there is one."""
    paths = [
        path
        for path, module in layer.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "scaling")
    ]
    if len(paths) != 1:
        raise UnsupportedModel(
            f"expected one attention module in {type(layer).__name__}, found {paths or 'none'}"
        )
    return str(paths[0])


@dataclass(slots=True)
class _LayerSharder:
    sharder: TensorSharder
    prefix: str
    layer: nn.Module
    attention_path: str
    share: HeadShare
    styles: dict[re.Pattern[str], str]
    replacements: dict[str, nn.Module] = field(default_factory=dict)

    def shard(self) -> None:
        self._check_attention_parameters()
        for path, module in self.layer.named_modules():
            if path and not list(module.children()) and list(module.parameters()):
                self._shard_module(path, module)
        for path, module in self.replacements.items():
            self.layer.set_submodule(path, module)
        self._localize_attention(self.layer.get_submodule(self.attention_path))

    def _shard_module(self, path: str, module: nn.Module) -> None:
        style = self._style(path)
        in_attention = path.startswith(f"{self.attention_path}.")
        if style in _COLUMN_STYLES | _ROW_STYLES:
            if not isinstance(module, nn.Linear):
                raise self._unsupported(f"{path!r} is a {type(module).__name__}, no linear layer")
            self._shard_linear(path, module, style, in_attention)
        elif in_attention and self._spans_heads(module):
            self._split_norm(path, module)
        elif style is None and max(p.ndim for p in module.parameters()) > 1:
            raise self._unsupported(f"its plan does not cover {path!r}")

    def _shard_linear(self, path: str, module: nn.Linear, style: str, in_attention: bool) -> None:
        if style in _ROW_STYLES:
            self._make_row(path, module, self._columns(module, in_attention))
        elif in_attention:
            self._make_column(path, module, self._head_rows(path, module, style))
        else:
            self._make_column(path, module, self._mlp_rows(path, module))

    def _style(self, path: str) -> str | None:
        styles = [style for pattern, style in self.styles.items() if pattern.fullmatch(path)]
        return styles[0] if styles else None

    def _head_rows(self, path: str, module: nn.Linear, style: str) -> tuple[range, ...]:
        """Output rows of this rank, for separate, packed ([q | k | v]) and interleaved layers."""
        num_query, num_kv, size = self._head_counts()
        query = _scale(self.share.query_heads, size)
        kv = _scale(self.share.kv_heads, size)
        rows = module.out_features
        is_packed = rows == (num_query + 2 * num_kv) * size
        if is_packed and style == "colwise":
            if num_query != num_kv:
                raise self._unsupported(f"{path!r} interleaves {num_query} and {num_kv} heads")
            return (_scale(self.share.query_heads, 3 * size),)
        if is_packed:
            k_start, v_start = num_query * size, (num_query + num_kv) * size
            return (query, _shift(kv, k_start), _shift(kv, v_start))
        if rows == num_query * size and not _is_kv(path):
            return (query,)
        if rows == num_kv * size:
            return (kv,)
        raise self._unsupported(
            f"{path!r} has {rows} rows for {num_query}+2*{num_kv} heads of {size}"
        )

    def _mlp_rows(self, path: str, module: nn.Linear) -> tuple[range, ...]:
        """Output rows of this rank, for single and for packed ([gate | up]) projections."""
        width = self._mlp_width(path)
        part = self._mlp_part(width)
        if module.out_features == width:
            return (part,)
        if module.out_features == 2 * width:
            return (part, _shift(part, width))
        raise self._unsupported(f"{path!r} has {module.out_features} rows for an MLP of {width}")

    def _mlp_width(self, path: str) -> int:
        parent = path.rpartition(".")[0]
        for sibling, module in self.layer.get_submodule(parent).named_children():
            is_row = self._style(f"{parent}.{sibling}") in _ROW_STYLES
            if is_row and isinstance(module, nn.Linear):
                return module.in_features
        raise self._unsupported(f"no row-parallel layer follows {path!r}")

    def _mlp_part(self, width: int) -> range:
        unit = 32 if width % 32 == 0 and width // 32 >= self.sharder.tp.size else 1
        return _scale(deal(width // unit, self.sharder.tp.size)[self.sharder.tp.rank], unit)

    def _columns(self, module: nn.Linear, in_attention: bool) -> range:
        if in_attention:
            return _scale(self.share.query_heads, self._head_counts()[2])
        return self._mlp_part(module.in_features)

    def _make_column(self, path: str, module: nn.Linear, ranges: tuple[range, ...]) -> None:
        rows = sum(len(part) for part in ranges)
        narrow = nn.Linear(module.in_features, rows, bias=module.bias is not None, device="meta")
        self._replace(path, narrow)
        for name, _ in narrow.named_parameters():
            self._record(f"{path}.{name}", 0, ranges)

    def _make_row(self, path: str, module: nn.Linear, columns: range) -> None:
        has_bias = module.bias is not None
        narrow = RowParallelLinear(len(columns), module.out_features, has_bias, self.sharder.tp)
        self._replace(path, narrow)
        self._record(f"{path}.weight", 1, (columns,))

    def _split_norm(self, path: str, module: nn.Module) -> None:
        eps = getattr(module, "variance_epsilon", None)
        if not isinstance(eps, float):
            raise self._unsupported(f"{path!r} spans heads and is no RMS norm")
        num_query, _, size = self._head_counts()
        full_width = module.get_parameter("weight").numel()
        is_query = full_width == num_query * size and not _is_kv(path)
        heads = self.share.query_heads if is_query else self.share.kv_heads
        is_owner = is_query or self.share.owns_kv
        rows = _scale(heads, size)
        norm = HeadSplitRMSNorm(len(rows), full_width, eps, is_owner, self.sharder.tp)
        self._replace(path, norm)
        self._record(f"{path}.weight", 0, (rows,))

    def _spans_heads(self, module: nn.Module) -> bool:
        num_query, num_kv, size = self._head_counts()
        weight = getattr(module, "weight", None)
        widths = {num_query * size, num_kv * size} - {size}
        return weight is not None and weight.ndim == 1 and weight.numel() in widths

    def _head_counts(self) -> tuple[int, int, int]:
        config = self.sharder.config
        attention = self.layer.get_submodule(self.attention_path)
        size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
        if size is None:
            raise self._unsupported("its attention module names no head size")
        num_query = config.num_attention_heads
        return num_query, getattr(config, "num_key_value_heads", None) or num_query, size

    def _localize_attention(self, attention: nn.Module) -> None:
        """Tell the attention module how many heads it has here; some read it from the config."""
        num_query, num_kv = len(self.share.query_heads), len(self.share.kv_heads)
        attention.config = copy.copy(attention.config)
        local = {
            "num_attention_heads": num_query,
            "num_heads": num_query,
            "num_key_value_heads": num_kv,
            "num_key_value_groups": num_query // num_kv,
        }
        for owner in (attention, attention.config):
            for name, value in local.items():
                if hasattr(owner, name):
                    setattr(owner, name, value)

    def _check_attention_parameters(self) -> None:
        attention = self.layer.get_submodule(self.attention_path)
        for name, _ in attention.named_parameters(recurse=False):
            raise self._unsupported(f"its attention has a parameter {name!r} of its own")

    def _replace(self, path: str, new: nn.Module) -> None:
        self.replacements[path] = new.to(self.sharder.model.dtype)

    def _record(self, parameter: str, dim: int, ranges: tuple[range, ...]) -> None:
        name = f"{self.prefix}.{parameter}"
        self.sharder.sources[name] = ParameterSource(name, dim, ranges)

    def _unsupported(self, reason: str) -> UnsupportedModel:
        name = type(self.sharder.model).__name__
        return UnsupportedModel(
            f"{name} cannot be split over {self.sharder.tp.size} ranks: {reason}"
        )


def _scale(part: range, unit: int) -> range:
    return range(part.start * unit, part.stop * unit)


def _shift(part: range, offset: int) -> range:
    return range(part.start + offset, part.stop + offset)


def _is_kv(path: str) -> bool:
    return path.rpartition(".")[2].startswith(("k_", "v_", "key", "value"))
