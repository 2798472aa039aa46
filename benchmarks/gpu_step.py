"""A row of `benchmarks/gpu.py`: one library's step, measured in this process.

It takes its task as JSON, and prints results as lines of JSON, as soon as it has them.
"""

import json
import os
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jax

    from jaxft.config import Config
    from jaxft.models.config import DecoderConfig
    from jaxft.planning.machines import Machine

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
WARM_UP = 2  # steps before those that are timed
EXAMPLES = 4  # in a packed row, equally long
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Row(NamedTuple):
    """`remat` is none, full (in torch, gradient checkpointing), or the names of kept activations, joined by +."""

    library: str
    quantization: str | None
    rows: int
    remat: str
    packed: bool = False
    adapters: str = "float32"

    def label(self) -> str:
        parts = [self.library, self.quantization or "bfloat16", f"{self.rows} rows", f"remat {self.remat}"]
        parts += ["packed"] * self.packed + ["bfloat16 adapters"] * (self.adapters != "float32")
        return ", ".join(parts)


class Sizes(NamedTuple):
    layers: int
    hidden: int
    vocabulary: int
    sequence: int


def hf_config(sizes: Sizes) -> dict[str, Any]:
    """Llama-3.1-8B's config.json, or a smaller one in its proportions."""
    head_dim = min(128, sizes.hidden // 4)
    heads = sizes.hidden // head_dim
    return {
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.hidden * 7 // 2,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **ROPE},
        "tie_word_embeddings": False,
    }


def decoder(sizes: Sizes) -> "DecoderConfig":
    """The `DecoderConfig` of `hf_config`, without transformers."""
    from jaxft.models.config import DecoderConfig, LayerSpec
    from jaxft.models.rope_config import parse_rope

    raw = hf_config(sizes)
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        layers=(LayerSpec(),) * raw["num_hidden_layers"],
        rope=parse_rope(raw["rope_parameters"], raw["head_dim"], raw["max_position_embeddings"], False),
        norm_eps=raw["rms_norm_eps"],
    )


def config_of(row: Row, sizes: Sizes) -> "Config":
    from jaxft.config import Config

    return Config(
        model_name_or_path="-",
        output_dir="-",
        datasets=[{"path": "-"}],
        quant_type=row.quantization,
        lora_r=RANK,
        lora_alpha=ALPHA,
        learning_rate=LEARNING_RATE,
        max_length=sizes.sequence,
        micro_batch_size=row.rows,
        packing=row.packed,
        remat=row.remat if row.remat in ("none", "full") else row.remat.split("+"),
    )


def machine_of(name: str) -> "Machine":
    from jaxft.planning.machines import machines, topology

    return topology("cpu:1").machine if name == "cpu" else machines()[name]


def flops_per_token(packed: bool, sizes: Sizes) -> float:
    """FLOPs of the model, the same for both libraries. Needs no memory for the model, and no device but the host."""
    import jax

    from jaxft.planning.abstract import AbstractStep
    from jaxft.planning.cost import work
    from jaxft.sharding.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")  # in this process only: the rows' processes use the GPU
    examples = EXAMPLES if packed else 1
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    model = AbstractStep(config_of(Row("jaxft", None, 1, "full", packed), sizes), decoder(sizes), mesh).model
    return work(model, examples, sizes.sequence // examples, 1, False, "cudnn").model_flops / sizes.sequence


def drawn(path: tuple, like: "jax.ShapeDtypeStruct") -> "jax.Array":
    """Random weights: products of zeros and ones would be faster than those of a model."""
    import jax
    import jax.numpy as jnp

    name = jax.tree_util.keystr(path)
    key, stacked = jax.random.key(zlib.crc32(name.encode())), "layers" in name
    if like.dtype == jnp.uint4:
        return (jax.random.bits(key, like.shape, jnp.uint8) >> 4).astype(jnp.uint4)
    if "scales" in name:
        return jax.random.uniform(key, like.shape, like.dtype, 0.03, 0.07)
    if like.ndim - stacked < 2:
        return jnp.ones(like.shape, like.dtype)
    if not stacked:
        return 0.02 * jax.random.normal(key, like.shape, like.dtype)
    layers = jax.random.split(key, like.shape[0])  # one after the other, which takes less memory
    return jax.lax.map(lambda key: 0.02 * jax.random.normal(key, like.shape[1:], like.dtype), layers)


def on_device(value: Callable, tree: Any) -> Callable[[], Any]:
    """A jitted function that makes all of a tree by `value(path, description)`: the host may have no room for it."""
    import jax

    placed = jax.tree.map(lambda like: like.sharding, tree)
    return jax.jit(lambda: jax.tree_util.tree_map_with_path(value, tree), out_shardings=placed)


def jaxft_step(row: Row, sizes: Sizes, machine: str, say: Callable) -> tuple[Callable[[], float], Callable]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft.data.batch import Batch
    from jaxft.planning.abstract import AbstractStep, bytes_per_device
    from jaxft.planning.cost import times, work
    from jaxft.planning.plan import memory_of
    from jaxft.sharding.mesh import make_mesh
    from jaxft.training.recipe import Recipe

    config, mesh = config_of(row, sizes), make_mesh({"data": 1}, jax.devices()[:1])
    say(attention=Recipe(config, decoder(sizes)).attention(mesh).kernel)
    abstract = AbstractStep(config, decoder(sizes), mesh)
    began = time.perf_counter()
    compiled = abstract.compile()
    seconds = time.perf_counter() - began
    examples = EXAMPLES if row.packed else 1
    length = sizes.sequence // examples
    trained = bytes_per_device(abstract.state.trained)
    done = work(abstract.model, row.rows * examples, length, 1, False, abstract.attention.kernel, trained)
    planned = times(done, (), machine_of(machine), 1, set())
    say(plan_bytes=memory_of(abstract, compiled).total, plan_seconds=planned.step, compile_seconds=seconds)

    frozen = on_device(drawn, abstract.frozen)()
    zeros = on_device(lambda _, like: jnp.zeros(like.shape, like.dtype), abstract.state)()
    state = zeros._replace(trained=on_device(drawn, abstract.state.trained)())
    shape = abstract.batch.tokens.shape
    example, positions = np.divmod(np.arange(sizes.sequence, dtype=np.int32), length)
    batch = Batch(
        np.random.default_rng(0).integers(0, sizes.vocabulary, shape, np.int32),
        np.broadcast_to(positions > 0, shape),
        np.broadcast_to(example + 1, shape),
        np.broadcast_to(positions, shape),
    )
    batch = jax.tree.map(lambda array, like: jax.device_put(array, like.sharding), batch, abstract.batch)

    def step() -> float:
        nonlocal state
        state, metrics = abstract.step(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step, lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def peft_step(row: Row, sizes: Sizes, machine: str, say: Callable) -> tuple[Callable[[], float], Callable]:
    import peft
    import torch
    import transformers

    device, bfloat16 = ("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16
    kernel = "flash_attention_2" if device == "cuda" and find_spec("flash_attn") else "sdpa"
    say(attention=kernel)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**hf_config(sizes), use_cache=False)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=bfloat16, attn_implementation=kernel)
    if row.quantization:
        quantize(base.model.layers, device)
        base.is_loaded_in_4bit = True  # so that PEFT treats its layers as NF4
    if row.remat == "full":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    wide = row.adapters == "float32"
    model = peft.get_peft_model(base, settings, autocast_adapter_dtype=wide).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.float32 if wide else bfloat16)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=device == "cuda")
    ids = torch.randint(sizes.vocabulary, (row.rows, sizes.sequence), device=device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def step() -> float:
        with torch.autocast(device, bfloat16, enabled=wide):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for all of it

    return step, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None


def quantize(layers, device: str) -> None:
    """Convert every linear layer to NF4 as bitsandbytes stores it, in place."""
    import bitsandbytes as bnb
    import torch

    for module in list(layers.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear:
                coded = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=False, quant_type="nf4", device="meta",
                )  # fmt: skip
                coded.weight = bnb.nn.Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4"
                )
                setattr(module, name, coded.to(device))


def measure(row: Row, sizes: Sizes, machine: str, steps: int) -> None:
    """Measure one row in this process; prints results as lines of JSON, as soon as it has them."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr

    def say(**facts: object) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    try:
        step, peak = {"jaxft": jaxft_step, "peft": peft_step}[row.library](row, sizes, machine, say)
        seconds, losses = [], []
        for _ in range(WARM_UP + steps):
            began = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - began)
        say(seconds=statistics.median(seconds[WARM_UP:]), all_seconds=seconds, losses=losses, peak_bytes=peak())
    except Exception as error:  # any error is the result of the row
        traceback.print_exc()
        short = "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error)
        say(note="out of memory" if short else f"{type(error).__name__}: {error}".splitlines()[0][:120])


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    measure(Row(*told["row"]), Sizes(*told["sizes"]), told["machine"], told["steps"])
