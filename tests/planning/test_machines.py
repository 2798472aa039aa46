"""Machines by name, and what is said of names that stand for none."""

import jax
import pytest

from jaxft.planning import machines as module
from jaxft.planning.machines import PlanError, machines, topology
from jaxft.platform import GPU_MEMORY


def test_every_machine_is_whole():
    assert {"v5e", "v5p", "v6e", "t4", "l4", "rtx4090", "a100", "h100", "h200"} <= machines().keys()
    for name, machine in machines().items():
        assert machine.platform in ("tpu", "cuda"), name
        assert (machine.cuda is not None) == (machine.platform == "cuda"), name
        # Bytes and rates, not gigabytes: at least a thousand products for each byte of a second.
        assert 1e10 < machine.memory < 1e12, name
        assert 10 < machine.flops / machine.bandwidth < 1e3, name
        assert machine.dcn < machine.ici < machine.bandwidth, name


def test_what_a_program_may_take():
    gpu, tpu = machines()["h100"], machines()["v5e"]
    assert gpu.capacity == int(gpu.memory * GPU_MEMORY)
    assert tpu.capacity == tpu.memory == 15.75 * 2**30


def test_devices_of_this_host():
    found = topology("cpu:4")
    assert list(found.devices) == jax.devices()[:4]
    with pytest.raises(PlanError, match="cpu:64: JAX has 8 CPU devices here; set JAX_NUM_CPU_DEVICES=64"):
        topology("cpu:64")


@pytest.mark.parametrize("name", ["h1:8", "v5e", "v5e-8", "v5e:4x", "h100:", "3v5e:2x2", ""])
def test_names_of_nothing(name):
    with pytest.raises(PlanError, match=r"is no machine; write v5e:4x4 .* known are a100, cpu, h100"):
        topology(name)


@pytest.mark.parametrize("name, extra", [("v5e:2x2", "tpu"), ("h100:8", "cuda13")])
def test_a_compiler_that_is_not_installed(monkeypatch, name, extra):
    monkeypatch.setattr(module, "find_spec", lambda module: None)
    with pytest.raises(PlanError, match=rf"install its compiler: pip install 'jaxft\[{extra}\]'"):
        topology(name)


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu", reason="install its compiler: the extra tpu")


@pytest.fixture
def cuda():
    pytest.importorskip("jax_plugins.xla_cuda13", reason="install its compiler: the extra cuda13")


@pytest.mark.ahead
@pytest.mark.parametrize(
    "name, count, slices", [("v5e:1x1", 1, 1), ("v5e:2x4", 8, 1), ("v5p:2x2x4", 16, 1), ("2*v6e:2x2", 8, 2)]
)
def test_slices_of_tpus(tpu, name, count, slices):
    found = topology(name)
    assert len(found.devices) == count
    assert len({getattr(device, "slice_index", 0) for device in found.devices}) == slices
    assert {device.platform for device in found.devices} == {"tpu"}


@pytest.mark.ahead
def test_a_slice_that_there_is_not(tpu):
    with pytest.raises(PlanError, match="v5e:3x3 is no slice that there is"):
        topology("v5e:3x3")


@pytest.mark.ahead
@pytest.mark.parametrize("name, count, hosts", [("l4:1", 1, 1), ("h100:8", 8, 1), ("h100:16", 16, 2)])
def test_hosts_with_gpus(cuda, name, count, hosts):
    found = topology(name)
    assert len(found.devices) == count
    assert len({device.process_index for device in found.devices}) == hosts
    assert found.devices[0].device_kind == machines()[name.partition(":")[0]].cuda["name"]


@pytest.mark.ahead
@pytest.mark.parametrize("name", ["h100:12", "h100:2x4", "2*h100:8"])
def test_numbers_of_gpus_that_no_hosts_have(cuda, name):
    with pytest.raises(PlanError, match="8"):
        topology(name)
