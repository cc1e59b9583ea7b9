"""Converts one GGUF file to a folder of bf16 safetensors: `python -m … FILE FOLDER`.

`transformers` rebuilds config, weights and tokenizer; what it leaves out of the file's metadata is
added here. Progress goes to stderr; if it fails, the reason is the one line on stdout.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shardline_shards.errors import ModelSourceError

# `tokenizer.ggml.pre` names the rule by which text is split before byte-pair merges. The rules of
# this family take every digit apart and then do as GPT-2; `transformers` gives them GPT-2's alone.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum"}
# A chat model ends its turn with any of these.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def convert(gguf_file: Path, target: Path) -> None:
    """Write `target` with weights, config, generation config, tokenizer and chat template.

    Raises ModelSourceError if the file lacks tensors or its tokenizer cannot be rebuilt.
    """
    fields = _tokenizer_fields(gguf_file)
    tokenizer = _load_tokenizer(gguf_file, fields)
    model = _load_model(gguf_file)
    model.generation_config = _generation_config(fields)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tokenizer_fields(gguf_file: Path) -> dict[str, Any]:
    """The scalar values under `tokenizer.ggml.`, without that prefix."""
    prefix = "tokenizer.ggml."
    return {
        name.removeprefix(prefix): field.contents()
        for name, field in GGUFReader(gguf_file).fields.items()
        if name.startswith(prefix) and len(field.data) == 1
    }


def _load_model(gguf_file: Path) -> PreTrainedModel:
    """Dequantized to bf16; a file that does not fill the whole model is refused."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model: PreTrainedModel = loaded[0]
    missing: set[str] = loaded[1]["missing_keys"]
    if missing:
        raise ModelSourceError(
            f"it lacks {len(missing)} tensors of the model, such as {min(missing)}; "
            "is it one part of several?"
        )
    return model


def _load_tokenizer(gguf_file: Path, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    loaded: Any = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer: PreTrainedTokenizerFast = loaded
    backend = tokenizer.backend_tokenizer
    splits_as_gpt2 = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    rule = fields.get("pre", "unnamed")
    if not splits_as_gpt2 or rule in _AS_GPT2:
        return tokenizer
    if rule not in _SINGLE_DIGITS:
        raise ModelSourceError(
            f"its tokenizer splits text by the rule {rule!r}, which cannot be rebuilt; "
            "serve the model's safetensors folder instead"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    return tokenizer


def _generation_config(fields: dict[str, Any]) -> GenerationConfig:
    ends = dict.fromkeys(fields[key] for key in _END_KEYS if key in fields)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=fields.get("bos_token_id"),
        eos_token_id=list(ends) or None,
        pad_token_id=fields.get("padding_token_id"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf_file", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        convert(options.gguf_file, options.target)
    except Exception as error:
        # Whatever a damaged or unknown file makes the libraries raise, the operator sees one line.
        print(" ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return 0


if __name__ == "__main__":
    # Ctrl-C ends the process at once; the parent cleans up and speaks to the operator.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
