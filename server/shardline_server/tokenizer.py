"""The model's tokenizer: text to token ids and back, and the chat template.

Only fast tokenizers (a Rust object that threads may share); code from a checkpoint is never run.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from shardline_server.errors import ConfigError, InvalidRequest


class Tokenizer:
    """Wraps one loaded tokenizer; every method may be called from any thread."""

    def __init__(self, wrapped: PreTrainedTokenizerFast) -> None:
        self._wrapped = wrapped
        self.backend: FastTokenizer = wrapped.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.eos_token_id = cast("int | None", wrapped.eos_token_id)
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        self._decoder_types = {part["type"] for part in [decoder, *decoder.get("decoders", [])]}
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """`ids` of a text and their `offsets` in it, in characters.

        Text that spells a special token becomes that token.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of all tokens at once."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: list[dict[str, Any]], **template_arguments: Any) -> str:
        """The prompt text that the model's chat template makes of the messages.

        Raises InvalidRequest without a template, or where the template refuses the messages.
        """
        template = self._wrapped.chat_template
        if not template:
            raise InvalidRequest("This model has no chat template; use plain prompts instead.")
        if "developer" not in str(template):
            messages = [_developer_as_system(message) for message in messages]
        try:
            rendered = self._wrapped.apply_chat_template(
                messages, tokenize=False, **template_arguments
            )
        except (TemplateError, ValueError, TypeError, KeyError, OverflowError) as error:
            message = f"The chat template refuses these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        return cast(str, rendered)

    def token_text(self, token_id: int) -> str:
        """One token for the eye; bytes that are no whole characters read `bytes:\\xe2\\x82`."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for in the text."""
        token = self.backend.id_to_token(token_id)
        if token is None:  # an id of the padded vocabulary, beyond the tokenizer's
            return b""
        if token_id in self.backend.get_added_tokens_decoder():
            return token.encode()
        if "ByteLevel" in self._decoder_types and BYTE_OF_CHARACTER.keys() >= set(token):
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        if "ByteFallback" in self._decoder_types and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def _developer_as_system(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's newer name for the role; a template that does not know it may drop the message."""
    return message | {"role": "system"} if message["role"] == "developer" else message


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder.

    `tokenizer.json` is the whole tokenizer and is taken as it is. Other formats are converted by
    `AutoTokenizer`, which is imported only then, since it brings torch along.
    Raises ConfigError where there is no tokenizer, or none that converts to a fast one.
    """
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer(PreTrainedTokenizerFast.from_pretrained(folder))
        from transformers import AutoTokenizer

        wrapped = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"No usable tokenizer in {folder}: {error}") from error
    if not isinstance(wrapped, PreTrainedTokenizerFast):
        name = type(wrapped).__name__
        raise ConfigError(f"{folder} has only a slow tokenizer ({name}); add a tokenizer.json.")
    return Tokenizer(wrapped)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    own = {chr(byte): byte for byte in printable}
    return own | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
