"""The model as a front end knows it: names, tokenizer, limits, sampling defaults."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from shardline_server.errors import ConfigError, ModelNotFound
from shardline_server.messages import EngineReady
from shardline_server.sampling import ModelLimits, SamplingDefaults
from shardline_server.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What a request is read and checked with. The first of `names` is the model's id."""

    names: tuple[str, ...]
    tokenizer: Tokenizer
    limits: ModelLimits
    created: int

    def require_name(self, name: str | None) -> str:
        """The name to answer under; no name means the first. Raises ModelNotFound."""
        if not name:
            return self.names[0]
        if name not in self.names:
            served = ", ".join(f"`{known}`" for known in self.names)
            raise ModelNotFound(
                f"The model `{name}` is not served; here is {served}.", param="model"
            )
        return name


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """What a model's folder says before the engine is ready."""

    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    defaults: SamplingDefaults

    def serve(self, names: Sequence[str], ready: EngineReady, created: int) -> ServedModel:
        """Together with what the engine says about itself."""
        limits = ModelLimits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=self.eos_token_ids,
            defaults=self.defaults,
        )
        return ServedModel(
            names=tuple(names), tokenizer=self.tokenizer, limits=limits, created=created
        )


def load_model_files(folder: Path) -> ModelFiles:
    """Read tokenizer, `config.json` and `generation_config.json`; raises ConfigError.

    A sequence ends with the ids that generation_config names (else config), and with the
    tokenizer's own end token. Sampling defaults are generation_config's, as vLLM takes them.
    """
    tokenizer = load_tokenizer(folder)
    config, generation = (
        _read(folder / f"{kind}.json") for kind in ("config", "generation_config")
    )
    known = {field.name for field in fields(SamplingDefaults)}
    stated = {k: v for k, v in generation.items() if k in known and v is not None}
    return ModelFiles(
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(
            tokenizer, generation, config, config.get("text_config") or {}
        ),
        defaults=SamplingDefaults(**stated),
    )


def _eos_token_ids(tokenizer: Tokenizer, *sources: dict[str, Any]) -> frozenset[int]:
    stated = (source.get("eos_token_id") for source in sources)
    first: int | list[int] = next((ids for ids in stated if ids is not None), [])
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return frozenset([*own, *([first] if isinstance(first, int) else first)])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object.")
    return content
