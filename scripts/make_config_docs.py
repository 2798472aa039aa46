"""Write docs/config.md from the schema: `python scripts/make_config_docs.py`."""

import json
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from jaxft.config import Config, DatasetConfig, MeshConfig
from jaxft.config_names import ALIASES, TRANSLATIONS, VALUES

TARGET = Path(__file__).resolve().parents[1] / "docs" / "config.md"
OPENING = """# Keys of a config

A config is a flat YAML file; any key can also be given on the command line as `key=value` (`mesh.fsdp=8`,
`datasets.0.weight=2`, `lora_target_modules=[q_proj, v_proj]`). A key that would have no effect on the run is an error,
or a warning where it asks for nothing. This page is written by `scripts/make_config_docs.py`.
"""


def table(section: type[BaseModel]) -> str:
    """One row per key: name, default, meaning, other names."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{shown(field.default)}`"
        others = [alias for alias, ours in ALIASES.items() if ours == name] if section is Config else []
        also = f" Also: {', '.join(f'`{other}`' for other in others)}." if others else ""
        rows.append(f"| `{name}` | {default} | {field.description.replace('|', '/')}{also} |")
    return "\n".join(rows)


def shown(value: object) -> str:
    value = value.model_dump() if isinstance(value, BaseModel) else value
    return value if isinstance(value, str) else json.dumps(value)


def translations() -> str:
    rows = ["| key | value elsewhere | here |", "|---|---|---|"]
    for key, choices in (TRANSLATIONS | VALUES).items():
        for theirs, settings in choices.items():
            here = ", ".join(f"`{name}: {shown(ours)}`" for name, ours in settings.items()) or "so in any case"
            rows.append(f"| `{key}` | `{shown(theirs)}` | {here} |")
    return "\n".join(rows)


def page() -> str:
    return (
        "\n\n".join(
            [
                OPENING.rstrip(),
                table(Config),
                "## A source (`datasets`, `eval_datasets`)",
                table(DatasetConfig),
                "## `mesh`",
                table(MeshConfig),
                "## Keys and values of other trainers that are understood",
                translations(),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
