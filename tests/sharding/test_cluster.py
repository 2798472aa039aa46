"""Which process this is, told by the environment: of launchers, of a user, or of nobody."""

import os
import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from jaxft.sharding.cluster import Place, find

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[003-004,9]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
SLURM_ADDRESS = f"node003:{65535 - 2**12 + 1 + 77}"
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1234", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}

pytestmark = pytest.mark.core


@pytest.fixture
def found(monkeypatch):
    """`found(environment)`: what is found where only this says anything of processes."""
    launchers = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "MEGASCALE_")
    for name in list(os.environ):
        if name.startswith((*launchers, "JAX_COORDINATOR_", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_")):
            monkeypatch.delenv(name)

    def find_in(environment: dict[str, str]) -> Place | None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return find()

    return find_in


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**OMPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod that is no part of an indexed job
        {**SLURM, "JAX_NUM_PROCESSES": "1"},
        {"JAX_NUM_PROCESSES": "1", "JAX_COORDINATOR_ADDRESS": "a:1"},
    ],
)
def test_a_process_on_its_own(found, environment):
    assert found(environment) is None


@pytest.mark.parametrize(
    "environment, place",
    [
        (JAX, Place("a:1234", 3, 2, None)),
        (SLURM, Place(SLURM_ADDRESS, 4, 3, [1])),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3,1"}, Place(SLURM_ADDRESS, 4, 3, None)),  # all devices of the node
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, Place(SLURM_ADDRESS, 4, 3, None)),  # as JAX reads it
        ({**SLURM, "JAX_COORDINATOR_PORT": "99"}, Place("node003:99", 4, 3, [1])),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "b:5"}, Place("b:5", 4, 3, [1])),
        ({**SLURM, **JAX}, Place("a:1234", 3, 2, None)),
        (OMPI, Place(f"10.96.0.1:{1531576320 // 2**12 % 2**12 + 65535 - 2**12 + 1}", 8, 5, [1])),
        ({**OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_COORDINATOR_ADDRESS": "b:5"}, Place("b:5", 8, 5, None)),
    ],
)
def test_one_of_several(found, environment, place):
    assert found(environment) == place


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_PROCESS_ID": "1"}, "set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES too, or JAX_NUM_PROCESSES=1"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "set JAX_NUM_PROCESSES and JAX_PROCESS_ID too"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE say that this process is one of several"),
        ({**JAX, "JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID is 'two'; it must be a whole number"),
        ({**JAX, "JAX_PROCESS_ID": "3"}, "process 3 of 3: processes are numbered from 0"),
        ({**JAX, "JAX_COORDINATOR_ADDRESS": "a"}, "JAX_COORDINATOR_ADDRESS is 'a'; it must be host:port"),
        ({**OMPI, "OMPI_COMM_WORLD_RANK": "five"}, "a cluster is detected \\(OmpiCluster\\), but not which"),
    ],
)
def test_what_makes_no_sense_is_refused(found, environment, message):
    with pytest.raises(ValueError, match=message):
        found(environment)


def test_nobody_is_waited_for_on_a_host_of_one(found, monkeypatch):
    def unreachable(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "gethostbyname", unreachable)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    tpu = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1"}
    assert found(tpu) is None


def test_a_tpu_without_metadata_server_is_on_its_own(found, monkeypatch, caplog):
    def silent(key):
        raise ConnectionError("metadata.google.internal")

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", silent)
    assert found({}) is None
    assert "no metadata server (ConnectionError), so this process is taken to be on its own" in caplog.text
