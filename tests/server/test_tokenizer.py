"""The tokenizer wrapper: templates, bytes of tokens, and what is refused."""

import json
import subprocess
import sys

import pytest

from shardline_server.errors import ConfigError, InvalidRequest
from shardline_server.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_the_chat_template_is_rendered(tokenizer):
    assert tokenizer.render_chat(MESSAGES) == "<|start|>user\nHi<|end|>\n"
    prompt = tokenizer.render_chat(MESSAGES, add_generation_prompt=True)
    assert prompt == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert tokenizer.encode(prompt).ids[0] == tokenizer.backend.token_to_id("<|start|>")


def test_what_the_template_refuses_is_the_clients_mistake(tokenizer):
    with pytest.raises(InvalidRequest, match="no tools here"):
        tokenizer.render_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(messages[0]) }}",
        "{% include '/etc/passwd' %}",
        "{% for _ in range(1000000000) %}{% endfor %}",
    ],
)
def test_a_template_runs_in_a_sandbox(tokenizer_folder, tmp_path, template):
    """It comes with the model, from whoever made that."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer._wrapped.chat_template = template
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        tokenizer.render_chat(MESSAGES)


def test_a_model_without_a_template_says_so(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(tmp_path).render_chat(MESSAGES)


def test_tokens_have_bytes_and_a_readable_text(tokenizer):
    token_ids = tokenizer.encode(" the 🎉<|end|>").ids
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == " the 🎉<|end|>".encode()
    assert tokenizer.token_text(tokenizer.backend.token_to_id("Ģ")) == "bytes:\\x80"
    assert tokenizer.token_bytes(100_000) == b""


def test_offsets_point_into_the_text(tokenizer):
    text = "the quick fox"
    starts = [start for start, _ in tokenizer.encode(text).offsets]
    ends = [*starts[1:], len(text)]
    pieces = [text[a:b] for a, b in zip(starts, ends, strict=True)]
    assert pieces == [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text).ids]


def test_truncation_stored_in_the_file_is_not_applied(tokenizer_folder, tmp_path):
    stored = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst"}
    stored["truncation"]["stride"] = 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    assert len(load_tokenizer(tmp_path).encode("a b c d e f").ids) > 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No usable tokenizer"):
        load_tokenizer(tmp_path)


def test_loading_does_not_bring_torch_along(tokenizer_folder):
    code = (
        "import sys, pathlib; from shardline_server.tokenizer import load_tokenizer;"
        f"load_tokenizer(pathlib.Path({str(tokenizer_folder)!r})).render_chat({MESSAGES!r});"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
