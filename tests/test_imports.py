"""Which way imports go: every package may use those named here, and nothing else of jaxft."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "jaxft"
EVERYTHING_BELOW = {
    "rules",
    "redact",
    "paths",
    "limits",
    "config",
    "config_errors",
    "config_file",
    "config_names",
    "config_rules",
    "quantization",
    "sharding",
    "models",
    "adapters",
    "hub",
    "data",
}
ALLOWED = {
    "rules": set(),
    "redact": set(),
    "paths": set(),
    "limits": set(),
    "config_rules": set(),
    "config_names": set(),
    "config": {"config_rules", "paths"},
    "config_errors": {"config", "config_names"},
    "config_file": {"config", "config_errors", "config_names", "config_rules"},
    "quantization": {"rules"},
    "sharding": {"rules"},
    "models": {"quantization", "sharding", "rules", "limits"},
    "adapters": {"models", "quantization", "sharding", "rules"},
    "hub": {"models", "adapters", "quantization", "sharding", "rules", "redact", "limits"},
    "generation": {"models", "adapters", "quantization", "sharding", "rules"},
    "data": {"config", "rules", "redact", "limits"},
    "objectives": {"models", "sharding", "rules"},
    "training": EVERYTHING_BELOW | {"objectives"},
    "evaluation": EVERYTHING_BELOW | {"objectives", "training", "generation"},
    "platform": set(),
    "planning": EVERYTHING_BELOW | {"objectives", "training", "platform"},
    "cli": EVERYTHING_BELOW | {"objectives", "training", "generation", "evaluation", "planning", "platform"},
}


def local_imports(source: str, module: str) -> set[str]:
    """The packages of jaxft that the code of a module imports, however it is written.

    `import jaxft` and what `jaxft/__init__.py` takes together count as `jaxft`, which stands above all.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            before = module.split(".")[: -node.level] if node.level else []
            start = ".".join([*before, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "jaxft" else [start]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            package = rest.partition(".")[0]
            if top == "jaxft":
                found.add(package if package in ALLOWED else "jaxft")
    return found


@pytest.mark.core
@pytest.mark.parametrize("source, found", [
    ("import jax\nfrom numpy import linalg", set()),
    ("import jaxft.models.linear as l", {"models"}),
    ("from jaxft.models.linear import Linear", {"models"}),
    ("from jaxft import rules", {"rules"}),
    ("from jaxft import models, rules as r", {"models", "rules"}),
    ("def f():\n    from jaxft import cli", {"cli"}),
    ("import jaxft", {"jaxft"}),
    ("import jaxft as j", {"jaxft"}),
    ("from jaxft import load_model", {"jaxft"}),
    ("from jaxft import *", {"jaxft"}),
    ("from .linear import Linear", {"models"}),
    ("from . import linear", {"models"}),
    ("from .. import training", {"training"}),
    ("from ..training.loop import fit", {"training"}),
    ("from .. import load_model", {"jaxft"}),
    ("import jaxfty\nfrom jaxfty import models", set()),
])  # fmt: skip
def test_every_way_to_import_is_seen(source, found):
    assert local_imports(source, "jaxft.models.attention") == found


@pytest.mark.core
def test_every_package_is_placed():
    parts = {p.stem if p.is_file() else p.name for p in ROOT.iterdir() if not p.name.startswith("__")}
    assert parts == set(ALLOWED)


@pytest.mark.core
@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    target = ROOT / package
    paths = [target.with_suffix(".py")] if not target.is_dir() else list(target.rglob("*.py"))
    assert paths
    for path in paths:
        module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        stray = local_imports(path.read_text(), module) - ALLOWED[package] - {package}
        assert not stray, f"{path.relative_to(ROOT.parent)} imports {sorted(stray)}"


@pytest.mark.core
def test_what_is_allowed_is_no_circle():
    """A package stands below all that may use it: then there is an order in which they can be read."""
    left = {package: set(below) for package, below in ALLOWED.items()}
    while free := [package for package, below in left.items() if not below & set(left)]:
        for package in free:
            del left[package]
    assert not left


@pytest.mark.core
def test_torch_is_imported_nowhere():
    paths = list(ROOT.rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not {name for name in imported if name.split(".")[0] in ("torch", "peft", "bitsandbytes")}, path


@pytest.mark.core
def test_the_training_step_takes_few_libraries():
    """So that it can be measured where there are only jax, flax, optax, numpy, pydantic and pyyaml."""
    others = "transformers datasets grain orbax torch peft huggingface_hub jinja2 safetensors pyarrow"
    code = f"import sys, jaxft.planning.plan; print(*set({others.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.split() == []
