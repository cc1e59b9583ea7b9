"""What the server's tests share: a tiny tokenizer, and a front end before a scripted engine."""

import os
import shutil
from contextlib import contextmanager

import grpc
import httpx
import pytest
from tests.server.namespaces import two_hosts
from tests.server.peer import EnginePeer
from tests.server.running import running_frontend
from tests.server.two_nodes import ended, generate, read_url, start_alone
from tests.tiny import save_tiny
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from shardline_server.engine_launch import EngineProcess, plan_engine
from shardline_server.protos.shardline.v1.generation_pb2_grpc import GenerationStub
from shardline_server.settings import ServeSettings
from shardline_server.tokenizer import Tokenizer, load_tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Pack my box with five dozen liquor jugs, please!",
    "Grüße aus Köln, naïve café, 你好世界, 👩‍👩‍👧 und 🎉.",
    "The the then there these stop stopping stops.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 400 tokens: <|pad|>, <|start|>, <|end|>, the 256 bytes, merges."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, special=True) for t in ("<|pad|>", "<|start|>", "<|end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def shared_peer():
    peer = EnginePeer()
    yield peer
    peer.stop()


@pytest.fixture(scope="module")
def running(shared_peer, tokenizer_folder):
    with running_frontend(shared_peer.endpoint, tokenizer_folder) as running:
        yield running


@pytest.fixture
def peer(shared_peer):
    """The module's scripted engine; each test finds it as new."""
    shared_peer.reset()
    return shared_peer


@pytest.fixture
def http(running, peer):
    with httpx.Client(base_url=running.addresses.http_url, timeout=30) as client:
        yield client


@pytest.fixture
def stub(running, peer):
    with grpc.insecure_channel(running.addresses.grpc_target) as channel:
        yield GenerationStub(channel)


@pytest.fixture
def own_peer():
    """A scripted engine for one test that kills it, or counts."""
    peer = EnginePeer()
    yield peer
    peer.stop()


@pytest.fixture
def own_running(own_peer, tokenizer_folder):
    with running_frontend(own_peer.endpoint, tokenizer_folder) as running:
        yield running


@pytest.fixture
def own_http(own_running):
    with httpx.Client(base_url=own_running.addresses.http_url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random llama whose vocabulary is the tiny tokenizer's."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("tiny-llama"), vocab_size=400)
    build_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def running_engine_process(model, **settings):
    """The real engine, in fp32; with two stages unless another number is asked for."""
    usual = {"dtype": "float32", "pp": 2, "num_kv_blocks": 256, "threads_per_worker": 1}
    made = ServeSettings(model=str(model), **usual | settings)
    engine = EngineProcess(plan_engine(made, model))
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="session")
def served(tiny_model):
    """The real thing: engine, workers and both doors."""
    with (
        running_engine_process(tiny_model) as engine,
        running_frontend(engine.wait_begun(), tiny_model) as running,
    ):
        yield running


@pytest.fixture(scope="session")
def hosts():
    """Two network namespaces with a wire between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        # CI has both, so there this is a failure.
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say("network namespaces need root, and ip and tc of Debian's iproute2")
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="session")
def tokens_of_one_process(tiny_model):
    """What `generate` gets from a server of one process."""
    with ended(start_alone(tiny_model)) as (process,):
        return generate(read_url(process))
