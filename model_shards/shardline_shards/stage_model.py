"""Builds one worker's part of a model: the class from `transformers`, cut to a stage and split.

What comes out has parameters on meta, buffers on the real device, and a list of what to read.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from shardline_shards.attention import adapter
from shardline_shards.collectives import Collectives
from shardline_shards.errors import UnsupportedModel
from shardline_shards.layout import ParallelLayout, Place
from shardline_shards.parallel_layers import SkippedLayer
from shardline_shards.sharding import ParameterSource, TensorSharder, find_attention

_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class StageModel:
    """A stage of a model, and where each of its parameters comes from.

    `all_names` are the tensors of the whole model, of which the stage holds some.
    """

    model: PreTrainedModel
    sources: dict[str, ParameterSource]
    all_names: frozenset[str]
    layers: range
    is_first: bool
    is_last: bool
    tp: Collectives


def load_config(model_path: Path) -> PreTrainedConfig:
    """The config of a model folder. Raises UnsupportedModel for a class `transformers` lacks."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"{model_path}/config.json: {error}") from error
    model_class(config)
    return config


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The `transformers` class that the config names."""
    names = config.architectures or ["(none named)"]
    found: type[PreTrainedModel] | None = getattr(transformers, names[0], None)
    if found is None or not names[0].endswith("ForCausalLM"):
        raise UnsupportedModel(
            f"config.json names the class {names[0]!r}: Shardline serves the …ForCausalLM classes "
            f"of transformers {transformers.__version__}"
        )
    return found


def build_stage_model(
    config: PreTrainedConfig,
    layout: ParallelLayout,
    place: Place,
    tp: Collectives,
    dtype: torch.dtype,
    device: torch.device,
) -> StageModel:
    """Build the part of the model that belongs to `place`. Raises UnsupportedModel."""
    implementation = adapter.register()
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)._from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=implementation
        )
    model.requires_grad_(False).train(False)
    _check_attention(model)
    all_names = frozenset(model.state_dict())
    _materialize_buffers(model, device)
    layers = layout.layers(place.stage_index)
    cut = _Cut(model, layers, layout.is_first(place), layout.is_last(place))
    cut.keep_stage()
    sharder = TensorSharder(model, tp)
    if tp.size > 1:
        cut.shard(sharder)
    cut.tie_head(sharder.sources)
    return StageModel(model, sharder.sources, all_names, layers, cut.is_first, cut.is_last, tp)


def _check_attention(model: PreTrainedModel) -> None:
    """Every layer must attend through the function that we register, and do nothing else in time:
    what keeps another state, or another attention, would be silently wrong.
    """
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise UnsupportedModel(f"{name} does not take an attention function from outside")
    kinds = set(getattr(model.config, "layer_types", None) or ()) - _LAYER_TYPES
    if kinds:
        raise UnsupportedModel(f"{name} has layers of a kind that is not served: {sorted(kinds)}")
    for layer in decoder_layers(model):
        find_attention(layer)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A model's decoder layers. Raises UnsupportedModel if they are not where plans say."""
    layers = getattr(model.get_submodule(model.base_model_prefix), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModel(f"{type(model).__name__} has no list of decoder layers")
    return layers


def _materialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute buffers such as rotary frequencies, by the model's own initialiser."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if buffers:
            model._init_weights(module)  # type: ignore[no-untyped-call]


class _Cut:
    """Takes one stage out of a whole model, by the plan that the model's config publishes."""

    def __init__(
        self, model: PreTrainedModel, layers: range, is_first: bool, is_last: bool
    ) -> None:
        self.model = model
        self.base = model.get_submodule(model.base_model_prefix)
        self.layers = layers
        self.is_first = is_first
        self.is_last = is_last
        paths = {module: path for path, module in model.named_modules()}
        self.embedding_path = paths[model.get_input_embeddings()]
        self.head_path = paths[model.get_output_embeddings()]  # type: ignore[no-untyped-call]

    def keep_stage(self) -> None:
        """Remove what other stages hold."""
        if self.is_first and self.is_last:
            return
        self._check_plan()
        layers = decoder_layers(self.model)
        for index in range(len(layers)):
            if index not in self.layers:
                layers[index] = SkippedLayer()
        for path in self._outside_paths():
            self.model.set_submodule(path, nn.Identity())
        if not self.is_first and hasattr(self.base, "embedding_multiplier"):
            # Granite scales whatever it is given as embeddings.
            setattr(self.base, "embedding_multiplier", 1.0)  # noqa: B010

    def _check_plan(self) -> None:
        if "layers" not in (self.model.config.base_model_pp_plan or {}):
            raise UnsupportedModel(
                f"{type(self.model).__name__} publishes no pipeline plan; serve it with --pp 1"
            )

    def _outside_paths(self) -> list[str]:
        names = list(self.model.config.base_model_pp_plan or ())
        position = names.index("layers")
        before = [] if self.is_first else names[:position]
        after = [] if self.is_last else names[position + 1 :]
        paths = [f"{self.model.base_model_prefix}.{name}" for name in before + after]
        return paths if self.is_last else [*paths, self.head_path]

    def shard(self, sharder: TensorSharder) -> None:
        """Split what is left over the tensor axis."""
        sharder.shard_layers(self.layers)
        if self.is_last:
            sharder.shard_head(self.head_path)
        if self.is_first:
            sharder.shard_embedding(self.embedding_path)

    def tie_head(self, sources: dict[str, ParameterSource]) -> None:
        """A tied head uses the embedding's rows: the same tensor where a stage holds both."""
        if not self.is_last or not self.model.config.tie_word_embeddings:
            return
        head = self.model.get_submodule(self.head_path)
        split = sources.pop(f"{self.head_path}.weight", ParameterSource(""))
        if self.is_first:
            embedding = self.model.get_submodule(self.embedding_path)
            inner = getattr(embedding, "inner", embedding)
            head.register_parameter("weight", inner.get_parameter("weight"))
        else:
            sources[f"{self.head_path}.weight"] = replace(
                split, name=f"{self.embedding_path}.weight"
            )
