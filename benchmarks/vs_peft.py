"""Compare one LoRA step in jaxft and in PEFT + torch: same model, text, dtype and machine, in one run.

    python benchmarks/vs_peft.py --model DIR --data FILE [--sequence 512 --batch 4 --rounds 5]

Every contender runs in its own process. Contenders of one dtype take turns, one step at a time, so that other load on
the machine affects all alike. A step is forward, backward and AdamW on LoRA r=16 for all linear layers, loss on
every token, no recomputation. Speeds are medians over the rounds; memory is the peak resident set of the process,
weights included. Speeds are only comparable within one run: read the ratios.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CONTENDERS = {
    "peft float32": ("peft", "float32", None),
    "jaxft float32": ("jaxft", "float32", None),
    "peft bfloat16": ("peft", "bfloat16", None),
    "jaxft bfloat16": ("jaxft", "bfloat16", None),
    "jaxft bfloat16 int8": ("jaxft", "bfloat16", "int8"),
    "jaxft bfloat16 nf4": ("jaxft", "bfloat16", "nf4"),
}
RATIOS = [
    ("jaxft float32", "peft float32", 1.5),
    ("jaxft bfloat16", "peft bfloat16", 1.2),
    ("jaxft bfloat16 int8", "jaxft bfloat16", 0.9),
    ("jaxft bfloat16 nf4", "jaxft bfloat16", 0.9),
]
"""Numerator, denominator, and the ratio of tokens/s to aim at."""

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
MALLOC = ("hugetlb=1", "mmap_threshold=1099511627776", "trim_threshold=1099511627776", "arena_max=1")
"""Huge pages, and freed memory is kept: to fault it in again costs more the longer others used the machine."""

ENVIRONMENT = {
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in MALLOC),
    "TOKENIZERS_PARALLELISM": "false",
}


def rows_of_text(model: str, data: str, batch: int, sequence: int) -> np.ndarray:
    """[batch, sequence] tokens from the start of a text file."""
    from transformers import AutoTokenizer

    text = Path(data).read_text(encoding="utf-8")[: 16 * batch * sequence]
    tokens = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    if len(tokens) < batch * sequence:
        raise SystemExit(f"{data}: {len(tokens)} tokens, but a batch takes {batch * sequence}")
    return np.asarray(tokens[: batch * sequence], np.int32).reshape(batch, sequence)


def jaxft_stepper(model_dir: str, dtype: str, quantization: str | None, tokens: np.ndarray) -> Callable[[], float]:
    import jax

    import jaxft
    from jaxft.adapters.attach import attach
    from jaxft.adapters.targets import LoraConfig
    from jaxft.config import Config
    from jaxft.data.batch import Batch
    from jaxft.models.linear import Adapter
    from jaxft.objectives.sft import Sft
    from jaxft.training.optimizer import make_optimizer
    from jaxft.training.state import Partition
    from jaxft.training.step import initial_state, make_train_step

    base = jaxft.load_model(model_dir, dtype, quantization, scan_layers=False)
    model = attach(base, LoraConfig(r=RANK, lora_alpha=ALPHA), jax.random.key(0))
    config = Config(
        model_name_or_path=model_dir,
        output_dir="-",
        datasets=[{"path": "-"}],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
    )
    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    optimizer = make_optimizer(config, 1, partition.names)
    state = initial_state(trained, optimizer)
    train_step = make_train_step(partition, Sft(), optimizer, state)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    row = Batch(tokens, np.ones(tokens.shape, bool), np.ones_like(tokens), positions)
    batch = Batch(*(field[None] for field in row))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step


def peft_stepper(model_dir: str, dtype: str, quantization: None, tokens: np.ndarray) -> Callable[[], float]:
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    ids = torch.tensor(tokens).long()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def work(name: str, model: str, data: str, batch: int, sequence: int) -> None:
    """A contender: answers every line on stdin with one step, and at the end of input with its peak memory."""
    library, dtype, quantization = CONTENDERS[name]
    tokens = rows_of_text(model, data, batch, sequence)
    make = {"jaxft": jaxft_stepper, "peft": peft_stepper}[library]
    step = make(model, dtype, quantization, tokens)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}), file=answers, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"peak_gib": peak}), file=answers, flush=True)


def compete(names: list[str], arguments: list[str], rounds: int) -> dict[str, dict]:
    """Seconds and losses of every contender's steps: `rounds`, and a first one, which compiles or warms up."""
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--work", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        for name in names
    }

    def answer(name: str) -> dict:
        line = workers[name].stdout.readline()
        if not line:
            raise SystemExit(f"{name}: the contender died; run it alone with --work {name!r} to see why")
        return json.loads(line)

    results = {name: {"seconds": [], "losses": []} for name in names}
    for _ in range(1 + rounds):
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            step = answer(name)
            results[name]["seconds"].append(step["seconds"])
            results[name]["losses"].append(step["loss"])
    for name, worker in workers.items():
        worker.stdin.close()
        results[name] |= answer(name)
        worker.wait()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="jaxft beside PEFT + torch, one LoRA step each.")
    parser.add_argument("--model", required=True, help="Hugging Face model directory")
    parser.add_argument("--data", required=True, help="text file to train on")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--work", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = (options.model, options.data, options.batch, options.sequence)
    if options.work:
        work(options.work, *setting)
        return

    arguments = [f"--{key}={getattr(options, key)}" for key in ("model", "data", "sequence", "batch")]
    results = {}
    for dtype in ("float32", "bfloat16"):
        alike = [name for name in options.contenders if CONTENDERS[name][1] == dtype]
        results |= compete(alike, arguments, options.rounds)

    tokens = options.batch * options.sequence
    speed = {name: tokens / statistics.median(result["seconds"][1:]) for name, result in results.items()}
    print(f"{options.model}: {options.batch} x {options.sequence} tokens, LoRA r={RANK}, {options.rounds} rounds\n")
    print("| | tokens/s | peak GiB | first step s | loss, first -> last |\n|---|---|---|---|---|")
    for name, result in results.items():
        losses = f"{result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}"
        print(f"| {name} | {speed[name]:.0f} | {result['peak_gib']:.2f} | {result['seconds'][0]:.1f} | {losses} |")
    print("\n| ratio of tokens/s | measured | aim |\n|---|---|---|")
    for top, bottom, aim in RATIOS:
        if top in speed and bottom in speed:
            print(f"| {top} / {bottom} | {speed[top] / speed[bottom]:.2f} | {aim} |")


if __name__ == "__main__":
    main()
