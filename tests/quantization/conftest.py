"""bitsandbytes' pure torch kernels, the reference of its formats, callable on CPU tensors."""

import importlib.util
import platform
from collections.abc import Callable
from unittest import mock

import pytest


@pytest.fixture(scope="session")
def bnb_kernels() -> dict[str, Callable]:
    """Kernels by operator name. On CPU the dispatcher prefers C++ kernels that round differently, so the
    module that defines the pure ones is executed once more with a registry of our own.
    """
    pytest.importorskip("bitsandbytes")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch rounds by instruction set; the reference bits are those of x86")
    kernels: dict[str, Callable] = {}

    def register(name: str, _backend: str) -> Callable:
        return lambda kernel: kernels.setdefault(name.removeprefix("bitsandbytes::"), kernel)

    spec = importlib.util.find_spec("bitsandbytes.backends.default.ops")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("bitsandbytes._ops.register_kernel", register):
        spec.loader.exec_module(module)
    return kernels


@pytest.fixture
def one_torch_thread():
    """torch splits long sums among its threads, which moves their last bits."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
