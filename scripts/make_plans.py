"""Write into configs what they take: `python scripts/make_plans.py configs/NAME.yaml ... [--models DIR]`.

In the header of a config, a line `# Plan for MACHINE, ...` is followed by the plan for that machine. Each is made anew,
by the compiler of the machine. With `--models`, config.json of a model is read from DIR/ORG--NAME_config.json.
"""

import argparse
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from jaxft.config import Config
from jaxft.config_file import load_config
from jaxft.hub.model_files import read_config, read_json
from jaxft.hub.resolve import resolve_model
from jaxft.models.config import DecoderConfig
from jaxft.models.hf_config import decoder_config
from jaxft.planning.machines import topology
from jaxft.planning.plan import GIB, Plan, make_plan

HEADER = re.compile(r"^# Plan for (\S+),.*\n((?:#  .*\n)*)", re.MULTILINE)


def lines(plan: Plan) -> str:
    """A plan as it stands in a config."""
    memory, machine = plan.memory, plan.topology.machine
    parts = ("base", "adapters", "optimizer", "gradients", "temporaries")
    taken = ", ".join(f"{part} {getattr(memory, part) / GIB:.2f}" for part in parts if getattr(memory, part))
    return (
        f"#     GiB a device  {taken}\n"
        f"#     total         {memory.total / GIB:.2f} of {machine.capacity / GIB:.2f}\n"
        f"#     estimate      {plan.tokens_per_second_per_device:,.0f} tokens/s a device, {plan.times.step:.2f} s an "
        f"update of {plan.tokens:,} tokens; bound by {plan.times.bound_by}\n"
    )


def model_of(config: Config, models: Path | None) -> DecoderConfig:
    """The decoder that the config names."""
    name = config.model_name_or_path
    if models is None:
        return decoder_config(read_config(resolve_model(name, config.model_revision, files=("config.json",)).path))
    return decoder_config(read_json(models / f"{name.replace('/', '--')}_config.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--models", type=Path)
    parsed = parser.parse_args()
    for path in parsed.configs:
        text = path.read_text()
        found = HEADER.search(text)
        if found is None:
            sys.exit(f"{path}: no line `# Plan for MACHINE, ...` in its header")
        config = load_config(path)
        plan = make_plan(config, model_of(config, parsed.models), topology(found[1]))
        if not plan.fits:
            sys.exit(f"{path}: does not fit {found[1]}\n{lines(plan)}")
        print(f"{path} on {found[1]}, compiled in {plan.compile_seconds:.0f} s\n{lines(plan)}", flush=True)
        path.write_text(text[: found.start(2)] + lines(plan) + text[found.end(2) :])


if __name__ == "__main__":
    main()
