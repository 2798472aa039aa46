"""How fast a model is loaded, and how much memory the load takes besides the model.

    python benchmarks/load.py                  # 1.6 GB of random bfloat16 weights in a temporary directory; one minute
    python benchmarks/load.py --model DIR      # another checkpoint
    python benchmarks/load.py --formats nf4    # of: bfloat16 float32 int8 int4 nf4

Every format is loaded twice in its own process; the second time its functions are already compiled. The rates are bytes
of the files per second; a plain read of the same files into one small buffer gives the rate to compare with. All files
are in the page cache by then, if it holds them. `CPU` is the processor time of the second load, which says more than
its rate if others use the machine too. `beside` is the peak of resident memory in the first load, minus what the
process held before and minus the model: in megabytes, and in tensors of the largest size.

Measured on two Zen 5 cores (jax 0.10.2; 1577 MB, the largest tensor 134 MB; plain read from the page cache 25 GiB/s):

    to          first load   second load      CPU     beside   tensors
    bfloat16     517 MiB/s    1372 MiB/s    1.9 s     386 MB       2.9
    float32      624 MiB/s    1273 MiB/s    1.9 s     388 MB       2.9
    int8         709 MiB/s    3003 MiB/s    0.8 s     380 MB       2.8
    int4         599 MiB/s    1810 MiB/s    1.2 s     456 MB       3.4
    nf4          589 MiB/s    1402 MiB/s    1.5 s     482 MB       3.6

The extra time of the first load is compilation, whatever the model's size. Llama-3.1-8B's shapes (16.1 GB of bfloat16,
the largest tensor 1.05 GB) to nf4: 22 s, a model of 6.0 GB, 7.5 GB at the peak with all libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import jax
import ml_dtypes
import numpy as np

import jaxft
from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.models.decoder import describe, parameters
from jaxft.models.hf_config import decoder_config

FORMATS = ("bfloat16", "float32", "int8", "int4", "nf4")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MIB = 1 << 20


def write_model(directory: Path) -> None:
    """A checkpoint of random bfloat16 weights in shards of 400 MB."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    specs = {
        name: jax.ShapeDtypeStruct(parameter.stored_shape, ml_dtypes.bfloat16)
        for parameter, _ in parameters(describe(decoder_config(CONFIG)))
        for name in parameter.names
    }
    rng = np.random.default_rng(0)

    def draw(name: str) -> np.ndarray:
        return (0.02 * rng.standard_normal(specs[name].shape, np.float32)).astype(ml_dtypes.bfloat16)

    write_checkpoint(directory, specs, draw, max_shard_bytes=400_000_000)


def plain_read(directory: Path) -> float:
    """Bytes per second of reading all weights into one buffer."""
    buffer = bytearray(16 * MIB)
    files = sorted(directory.glob("*.safetensors"))
    for _ in range(2):  # the second time from the page cache
        start = perf_counter()
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    return sum(path.stat().st_size for path in files) / (perf_counter() - start)


def measure(directory: Path, form: str) -> dict:
    """Seconds and CPU seconds of two loads in this process; bytes of the model, and of the first peak besides it."""
    jax.block_until_ready(jax.numpy.zeros(()))
    dtype, quantization = (form, None) if form in FORMATS[:2] else ("bfloat16", form)
    before, seconds, cpu = resident("VmRSS"), [], []
    for _ in range(2):
        model = None  # makes room
        start, start_cpu = perf_counter(), process_time()
        model = jaxft.load_model(directory, dtype, quantization)
        seconds.append(perf_counter() - start)
        cpu.append(process_time() - start_cpu)
        if len(seconds) == 1:
            peak = resident("VmHWM")
    size = sum(variable.get_value().nbytes for _, variable in parameters(model))
    return {"seconds": seconds, "cpu": cpu, "model": size, "beside": peak - before - size}


def resident(field: str) -> int:
    """VmRSS or VmHWM, the present or the greatest resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def compare(directory: Path, forms: list[str]) -> None:
    checkpoint = Checkpoint.open(directory)
    sizes = [checkpoint.info(name).nbytes for name in checkpoint.names()]
    print(f"{sum(sizes) / 1e6:.0f} MB in {len(sizes)} tensors, the largest {max(sizes) / 1e6:.0f} MB")
    print(f"plain read: {plain_read(directory) / MIB:.0f} MiB/s")
    print(f"{'to':10} {'first load':>12} {'second load':>12} {'CPU':>7} {'model':>9} {'beside':>8} {'tensors':>8}")
    for form in forms:
        child = [sys.executable, __file__, "--model", str(directory), "--measure", form]
        found = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
        first, second = (f"{sum(sizes) / MIB / seconds:.0f} MiB/s" for seconds in found["seconds"])
        beside = found["beside"]
        print(
            f"{form:10} {first:>12} {second:>12} {found['cpu'][1]:>5.1f} s {found['model'] / 1e6:>6.0f} MB "
            f"{beside / 1e6:>5.0f} MB {beside / max(sizes):>8.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast a model is loaded, and with how much memory.")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model directory (default: one is made)")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--measure", choices=FORMATS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.model, options.measure)))
    elif options.model:
        compare(options.model, options.formats)
    else:
        with tempfile.TemporaryDirectory() as directory:
            write_model(Path(directory))
            compare(Path(directory), options.formats)


if __name__ == "__main__":
    main()
