"""`scripts/plan.py`: whether a run fits a machine, how long a step takes, and what limits it.

This machine compiles the run's training step for the other machine, which need not be present. The plan reads only
config.json of the model and no data: it assumes rows of `max_length` tokens.
"""

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from jaxft.cli.command import local
from jaxft.config_file import load_config
from jaxft.hub.model_files import read_config
from jaxft.hub.resolve import resolve_model
from jaxft.models.hf_config import decoder_config
from jaxft.planning.machines import topology
from jaxft.planning.plan import Plan, make_plan
from jaxft.planning.report import HEADING, config_lines, describe, row
from jaxft.planning.search import rows_of, search
from jaxft.platform import prepared


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0: it fits, 1: it does not, 2: bad input."""
    parser = argparse.ArgumentParser(description="Compile a run's step for a machine, and say whether it fits.")
    parser.add_argument("--config", required=True, type=local, help="YAML file, as for scripts/train.py")
    parser.add_argument("--topology", required=True, help="as in v5e:4x4, 2*v5e:4x4 (two slices), h100:8, cpu:1")
    parser.add_argument(
        "--search", action="store_true", help="find the fastest mesh, micro batch, accumulation and remat that fit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a key of the config")
    parsed = parser.parse_intermixed_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # how long the compiler takes is part of the plan
    try:
        with prepared():
            return int(not _plan(parsed))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(parsed: argparse.Namespace) -> bool:
    config = load_config(parsed.config, parsed.overrides)
    machine = topology(parsed.topology)
    resolved = resolve_model(config.model_name_or_path, config.model_revision, files=("config.json",))
    decoder = decoder_config(read_config(resolved.path))
    if not parsed.search:
        return _show(make_plan(config, decoder, machine), parsed.json)
    say = (lambda plan: None) if parsed.json else (lambda plan: print(row(plan), flush=True))
    if not parsed.json:
        print(f"an update keeps its rows: {rows_of(config, machine)} of {config.max_length} tokens\n\n{HEADING}")
    found = search(config, decoder, machine, say=say)
    _show(found.best or found.smallest, parsed.json, lead="\n")
    if not parsed.json:
        print("\nnothing fits" if found.best is None else f"\n{config_lines(found.best)}")
    return found.best is not None


def _show(plan: Plan, as_json: bool, lead: str = "") -> bool:
    print(json.dumps(plan.to_json()) if as_json else lead + describe(plan))
    return plan.fits
