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
    "config_rules": set(),
    "config_names": set(),
    "config": {"config_rules", "paths"},
    "config_errors": {"config", "config_names"},
    "config_file": {"config", "config_errors", "config_names", "config_rules"},
    "quantization": {"rules"},
    "sharding": {"rules"},
    "models": {"quantization", "sharding", "rules"},
    "adapters": {"models", "quantization", "sharding", "rules"},
    "hub": {"models", "adapters", "quantization", "sharding", "rules", "redact"},
    "generation": {"models", "adapters", "quantization", "sharding", "rules"},
    "data": {"config", "rules", "redact"},
    "objectives": {"sharding", "rules"},
    "training": EVERYTHING_BELOW | {"objectives"},
    "evaluation": EVERYTHING_BELOW | {"objectives", "training", "generation"},
    "platform": set(),
    "planning": EVERYTHING_BELOW | {"objectives", "training", "platform"},
    "cli": EVERYTHING_BELOW | {"objectives", "training", "generation", "evaluation", "planning", "platform"},
}


def local_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("jaxft.")}
    return found


@pytest.mark.core
def test_every_package_is_placed():
    parts = {p.stem if p.is_file() else p.name for p in ROOT.iterdir() if not p.name.startswith("__")}
    assert parts == set(ALLOWED)


@pytest.mark.core
@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package):
    target = ROOT / package
    for path in [target.with_suffix(".py")] if not target.is_dir() else target.rglob("*.py"):
        stray = local_imports(path) - ALLOWED[package] - {package}
        assert not stray, f"{path.relative_to(ROOT.parent)} imports {sorted(stray)}"


@pytest.mark.core
def test_torch_is_imported_nowhere():
    for path in ROOT.rglob("*.py"):
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
