"""The files of configs/launch parse, are documented, and start runs that the config schema accepts."""

import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxft.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "configs" / "launch"
PAGE = ROOT / "docs" / "launching.md"
FILES = sorted(LAUNCH.iterdir())
STARTERS = [path for path in FILES if path.name not in ("Dockerfile", "k8s_shared.yaml")]


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from strings(part)


def check_shell(script: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """The (config, overrides) of every `scripts/train.py` command in a file, its default CONFIG filled in."""
    text = path.read_text(encoding="utf-8")
    default = re.search(r"\bCONFIG\b.*?(configs/\w+\.yaml)", text)
    pieces = strings(documents(path)) if path.suffix == ".yaml" else [text]
    found = []
    for line in "\n".join(pieces).replace("\\\n", " ").splitlines():
        if "scripts/train.py --config" in line:
            words = re.sub("[\"']", "", line.split("scripts/train.py --config")[1]).split()
            config = default[1] if words[0] == "$CONFIG" else words[0]
            expanded = (re.sub(r"\$(\w+)", r"\1", word) for word in words[1:])  # the shell does it
            found.append((config, [word for word in expanded if "=" in word]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_parses_and_opens_with_how_to_use_it(path):
    text = path.read_text(encoding="utf-8")
    head = re.match(r"(#.*\n)+", text)[0]
    assert "\n#     " in head  # its command
    assert "\n# Output    " in head
    if path.suffix == ".yaml":
        for document in documents(path):
            for script in (document.get("setup", ""), document.get("run", "")):
                check_shell(script)
            for script in strings(document):
                if "scripts/train.py" in script:
                    check_shell(script)
    elif path.suffix in (".sh", ".sbatch"):
        check_shell(text)
    else:
        assert path.name == "Dockerfile"
        assert re.search(r"^FROM \S+$", text, re.M)
        copied = re.findall(r"^COPY (.+) \S+$", text, re.M)
        assert copied
        for sources in copied:
            assert all((ROOT / source).exists() for source in sources.split()), sources


def test_every_file_is_in_the_page_and_every_file_of_the_page_exists():
    named = set(re.findall(r"configs/launch/([\w.]+)", PAGE.read_text(encoding="utf-8")))
    assert named == {path.name for path in FILES}


@pytest.mark.parametrize("path", [*STARTERS, PAGE], ids=lambda path: path.name)
def test_every_command_names_a_config_and_keys_that_exist(path):
    found = commands(path)
    assert found
    for config, overrides in found:
        loaded = load_config(ROOT / config, overrides)
        if path != PAGE:
            assert loaded.resume_from_checkpoint  # the first start and every other are one command
            assert "output_dir" in [override.partition("=")[0] for override in overrides]


@pytest.mark.parametrize("name", ["gke_tpu_jobset.yaml", "k8s_gpu_jobset.yaml"])
def test_the_numbers_of_a_jobset_agree(name):
    [jobset] = documents(LAUNCH / name)
    [group] = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    [(resource, devices)] = container["resources"]["limits"].items()
    [(_, overrides)] = commands(LAUNCH / name)
    mesh = load_config(ROOT / env["CONFIG"], overrides).mesh

    assert job["parallelism"] == job["completions"]
    assert group["replicas"] == 1
    if resource == "google.com/tpu":
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(map(int, topology.split("x"))) == job["parallelism"] * devices
    else:
        assert int(env["JAX_NUM_PROCESSES"]) == job["parallelism"]
        assert mesh.fsdp == devices
        first = f"{jobset['metadata']['name']}-{group['name']}-0-0.{jobset['spec']['network']['subdomain']}"
        assert env["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0] == first
    claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim in {document["metadata"]["name"] for document in documents(LAUNCH / "k8s_shared.yaml")}
