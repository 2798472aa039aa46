"""What the documentation says is what the code does."""

import json
import re
import runpy
from pathlib import Path

import pytest

from jaxft.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.core
def test_the_page_of_families_is_up_to_date():
    make = runpy.run_path(str(ROOT / "scripts" / "make_family_docs.py"))
    parity = json.loads(make["PARITY"].read_text(encoding="utf-8"))
    assert make["TARGET"].read_text(encoding="utf-8") == make["page"](parity), "run scripts/make_family_docs.py"
    assert all(entry["relative_logit_error"] <= 1e-5 and entry["models"] >= 2 for entry in parity.values())


@pytest.mark.core
def test_the_page_of_config_keys_is_up_to_date():
    make = runpy.run_path(str(ROOT / "scripts" / "make_config_docs.py"))
    assert make["TARGET"].read_text(encoding="utf-8") == make["page"](), "run scripts/make_config_docs.py"


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.core
def test_every_config_that_the_readme_names_is_tried():
    named = set(re.findall(r"configs/([\w.-]+\.yaml)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= {path.name for path in CONFIGS}


@pytest.mark.core
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_valid_and_open_with_a_comment(path):
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("#")


@pytest.mark.core
def test_the_config_in_the_readme_is_valid(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    config = tmp_path / "my.yaml"
    config.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_config(config).quant_type == "nf4"
