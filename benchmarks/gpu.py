r"""Compare one LoRA or QLoRA step on a GPU in jaxft and in PEFT + torch: Llama-3.1-8B's shapes, random weights.

    python benchmarks/gpu.py                # all rows, the most telling first; results in benchmarks/results/<machine>
    python benchmarks/gpu.py --minutes 9    # as many rows as that allows; --start N goes on from row N
    python benchmarks/gpu.py --small        # four rows of a tiny model, to try it on a CPU

No model, data or network is needed. jaxft's rows take jax, flax, optax, numpy, pydantic and pyyaml; PEFT's take torch,
transformers and peft, with bitsandbytes for NF4 and flash-attn if it is installed. If a machine has jax, torch and
transformers but no network, bring the rest as wheels (48 MB) for that machine's Python (here 3.12):

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \
        flax optax absl-py etils msgpack treescope rich markdown-it-py mdurl pygments pyyaml typing_extensions \
        pydantic==2.14.3 pydantic_core==2.50.4 annotated-types typing-inspection peft bitsandbytes

Then run there:

    python3 -m pip install -q --no-index --no-deps --target .site .whl/*.whl && \
        PYTHONPATH=.site:. python3 benchmarks/gpu.py --minutes 9

A step is forward, backward, clipping and AdamW on LoRA r=16 for all linear layers, loss on every token, in bfloat16
with adapters in float32 (in PEFT by autocast, as transformers' Trainer does it; its rows with bfloat16 adapters use no
autocast). Every row runs in its own process: warm-up steps, then the median of timed steps. A row that runs out of
memory, or fails, says so in the table. Each row is written to the files as soon as it is measured.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from gpu_step import Row, Sizes, flops_per_token, machine_of

from jaxft.platform import GPU_MEMORY

GIB = 1 << 30
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "bitsandbytes", "flash-attn")

METHOD = """MFU = model FLOPs per token x tokens/s / the machine's dense bfloat16 FLOP/s by its data sheet
(`jaxft/planning/machines.yaml`). Model FLOPs are those of `jaxft.planning.cost.work`, the same for both libraries: per
token 4 P + 6 r (in + out) + 12 N H S + 4 V D, for P weights in products of frozen layers, adapters of rank r over
(in + out) features, N H query features and S keys seen on average, summed over layers, and the head [V, D]. What is
computed again does not count. Peaks: `peak_bytes_in_use` of JAX's allocator, `max_memory_allocated` of torch. The plan
is the memory that XLA says the compiled step takes, and the roofline's tokens/s."""

HEADING = "| row | attention | tokens/s | MFU | peak GiB | plan GiB | plan tokens/s | step s | compile s | note |"

LLAMA_8B, SMALL = Sizes(32, 4096, 128256, 4096), Sizes(2, 128, 2048, 64)
KEPT = "attention+lora"


def rows() -> list[Row]:
    """All rows, the most telling first."""
    best = [Row("jaxft", None, 2, KEPT), Row("peft", None, 2, "full")]
    best += [row._replace(quantization="nf4") for row in best]
    best += [Row("jaxft", None, 2, "none"), Row("peft", None, 2, "none"), Row("jaxft", None, 2, KEPT, True)]
    best += [Row("jaxft", "nf4", 1, "full"), Row("peft", "nf4", 1, "full")]
    best += [Row("peft", None, 2, "full", adapters="bfloat16"), Row("jaxft", "nf4", 2, KEPT, True)]
    ours = [Row("jaxft", *rest) for rest in product((None, "nf4"), (2, 1, 4), (KEPT, "none", "full"), (False, True))]
    peers = [Row("peft", *rest) for rest in product((None, "nf4"), (2, 1, 4), ("full", "none"))]
    return list(dict.fromkeys(best + peers + ours))


def run(row: Row, sizes: Sizes, machine: str, steps: int, seconds: float) -> dict[str, Any]:
    """The results of a row, measured in its own process; with a `note` if it failed."""
    told = {"row": row, "sizes": sizes, "machine": machine, "steps": steps}
    command = [sys.executable, Path(__file__).with_name("gpu_step.py"), json.dumps(told)]
    setting = {"JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": str(GPU_MEMORY)}
    found = row._asdict()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=os.environ | setting)
        said, wrong, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said, wrong, code = (error.stdout or b"").decode(), "", 0
        found["note"] = "no time left"
    for line in said.splitlines():
        found |= json.loads(line)
    if code and "note" not in found:
        found["note"] = f"signal {-code}" if code < 0 else f"exit status {code}"
    if "note" in found:
        print(wrong[-3000:], file=sys.stderr)
    return found


def table(run: dict[str, Any]) -> str:
    """A run as markdown."""
    lines = [f"## {run['date']}, {run['device']}", "", f"`{run['command']}`", "", ", ".join(run["versions"]), ""]
    lines += [HEADING, "|---" * (HEADING.count("|") - 1) + "|"]
    for found in run["rows"]:
        tokens = found["rows"] * run["sizes"]["sequence"]
        seconds, plan_seconds = found.get("seconds"), found.get("plan_seconds")
        numbers = (
            (".0f", seconds and tokens / seconds),
            (".1%", found.get("mfu")),
            (".2f", found.get("peak_bytes") and found["peak_bytes"] / GIB),
            (".2f", found.get("plan_bytes") and found["plan_bytes"] / GIB),
            (".0f", plan_seconds and tokens / plan_seconds),
            (".4f", seconds),
            (".1f", found.get("compile_seconds")),
        )
        cells = [Row(*(found[field] for field in Row._fields)).label(), found.get("attention", "")]
        cells += ["" if number is None else format(number, form) for form, number in numbers]
        lines.append("| " + " | ".join([*cells, found.get("note", "")]) + " |")
    return "\n".join(lines) + "\n"


def write(out: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs, of which the last may not be complete, as `results.json` and `results.md`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    (out / "results.md").write_text("\n".join(["# One LoRA step on a GPU\n", METHOD + "\n", *map(table, runs)]))


def device() -> tuple[str, str]:
    """The GPU's name from nvidia-smi, and its name in `machines.yaml`; cpu if there is no nvidia-smi."""
    from jaxft.planning.machines import machines

    if shutil.which("nvidia-smi") is None:
        return f"CPU, {platform.machine()}", "cpu"
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    name = told.partition(",")[0].lower().replace(" ", "")
    known = [key for key in machines() if key in name]
    return told, max(known, key=len, default="unknown")


def version_of(library: str) -> str:
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return f"no {library}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One LoRA step of jaxft beside PEFT + torch, on a GPU.")
    parser.add_argument("--out", type=Path, help="directory of results.json and results.md, which are added to")
    parser.add_argument("--minutes", type=float, default=240.0, help="no row begins, or goes on, after so many")
    parser.add_argument("--start", type=int, default=0, help="the row to begin with")
    parser.add_argument("--count", type=int, help="rows to measure, at most")
    parser.add_argument("--steps", type=int, default=10, help="timed ones, of each row")
    parser.add_argument("--machine", help="its name in jaxft/planning/machines.yaml, or cpu; else as nvidia-smi says")
    parser.add_argument("--small", action="store_true", help="a tiny model, and four rows of it")
    for name in Sizes._fields:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in Sizes._fields if getattr(options, name) is not None}
    sizes = (SMALL if options.small else LLAMA_8B)._replace(**given)

    began = time.monotonic()
    name, found = device()
    machine = options.machine or found
    if machine == "unknown":
        parser.error(f"{name} is not in jaxft/planning/machines.yaml; add it, or choose one with --machine")
    out = options.out or Path(__file__).parent / "results" / machine
    kept = out / "results.json"
    runs = json.loads(kept.read_text()) if kept.exists() else []
    runs.append(
        {
            "date": datetime.now(UTC).isoformat(" ", "seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "device": name,
            "machine": machine,
            "versions": [f"Python {platform.python_version()}", *map(version_of, LIBRARIES)],
            "sizes": sizes._asdict(),
            "rows": [],
        }
    )
    flops = {packed: flops_per_token(packed, sizes) for packed in (False, True)}
    peak = machine_of(machine).flops
    count = options.count or (4 if options.small else None)
    chosen = rows()[options.start :][:count]
    for index, row in enumerate(chosen, options.start):
        left = 60 * options.minutes - (time.monotonic() - began)
        if left <= 0:
            print(f"no time for rows {index} to {options.start + len(chosen) - 1}; go on with --start {index}")
            break
        measured = run(row, sizes, machine, options.steps, left)
        if "seconds" in measured:
            measured["mfu"] = flops[row.packed] * row.rows * sizes.sequence / measured["seconds"] / peak
        runs[-1]["rows"].append(measured)
        write(out, runs)
        print(f"{index}: {table(runs[-1]).splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
