"""One worker's part of the forward pass: hidden states in, hidden states or logits out."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from shardline_shards.attention import KVShape
from shardline_shards.batch import StepBatch
from shardline_shards.errors import UnsupportedModel
from shardline_shards.fused import fuse
from shardline_shards.layout import deal_heads
from shardline_shards.parallel_layers import SkippedLayer
from shardline_shards.stage_model import StageModel, decoder_layers


class Stage:
    """Runs a stage's layers over one step."""

    @torch.inference_mode()
    def __init__(
        self, stage_model: StageModel, device: torch.device, *, allow_fused: bool = True
    ) -> None:
        """`allow_fused`: whether the CPU kernel may take the place of the library's layers."""
        self.is_first = stage_model.is_first
        self.is_last = stage_model.is_last
        self._model = stage_model.model
        self._base = self._model.get_submodule(self._model.base_model_prefix)
        self._device = device
        self._dtype: torch.dtype = self._model.dtype
        if not self.is_first:
            self._check_prologue()
        self._fused = fuse(stage_model, device) if allow_fused else None

    @property
    def config(self) -> PreTrainedConfig:
        """The whole model's config."""
        return self._model.config

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that stages hand on."""
        return int(self._model.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the hidden states."""
        return self._dtype

    @property
    def is_fused(self) -> bool:
        """Whether the CPU kernel computes the layers, and not the library's modules."""
        return self._fused is not None

    def kv_shape(self, block_size: int, tp: int, tp_rank: int) -> KVShape:
        """What one layer's KV memory looks like on a rank: it holds some of the KV heads."""
        config = self.config
        num_query = config.num_attention_heads
        num_kv = getattr(config, "num_key_value_heads", None) or num_query
        return KVShape(
            block_size=block_size,
            num_kv_heads=len(deal_heads(num_query, num_kv, tp)[tp_rank].kv_heads),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_query,
            dtype=self.dtype,
        )

    @torch.inference_mode()
    def run(self, batch: StepBatch, hidden: Tensor | None) -> Tensor:
        """Compute one step.

        `hidden` [num_tokens, hidden_size] comes from the stage before (None on the first). Returns
        the same for the stage after, or on the last stage logits [num_rows, vocab_size] (whole on
        tp rank 0 only).
        """
        if self._fused is not None:
            return self._fused.run(hidden, batch)
        inputs: dict[str, object] = {
            "position_ids": batch.positions.unsqueeze(0),
            "paged": batch.paged,
            "use_cache": False,
        }
        if hidden is None:
            inputs["input_ids"] = batch.input_ids.unsqueeze(0)
        else:
            inputs["inputs_embeds"] = hidden.unsqueeze(0)
        if self.is_last:
            logits: Tensor = self._model(**inputs, logits_to_keep=batch.logit_indexes).logits
            return logits.squeeze(0)
        states: Tensor = self._base(**inputs).last_hidden_state
        return states.squeeze(0)

    def _check_prologue(self) -> None:
        """Hidden states must reach the first layer as they came; some models change them first."""
        probe = torch.linspace(-1, 1, self.hidden_size, dtype=self.dtype, device=self._device)
        held = {name: self._base.get_submodule(name) for name in self._names_from_layers()}
        num_layers = len(decoder_layers(self._model))
        for name in held:
            self._base.set_submodule(name, nn.Identity())
        self._base.set_submodule("layers", nn.ModuleList(SkippedLayer() for _ in range(num_layers)))
        try:
            positions = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
            output = self._base(
                inputs_embeds=probe.view(1, 1, -1), position_ids=positions, use_cache=False
            )
        finally:
            for name, module in held.items():
                self._base.set_submodule(name, module)
        if not torch.equal(output.last_hidden_state.flatten(), probe):
            raise UnsupportedModel(
                f"{type(self._model).__name__} changes hidden states before its first layer, so it "
                "cannot be cut into stages; serve it with --pp 1"
            )

    def _names_from_layers(self) -> list[str]:
        names = list(self._model.config.base_model_pp_plan or ())
        return names[names.index("layers") :]
