"""Who takes an adapter, and who refuses it or scales it wrongly, and why.

What each reader does was read in the sources named in docs/consumers.md, where the commands are that work. PEFT reads
all that jaxft writes; here is told what others do not, and what to export for them instead.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxft.adapters.attach import sites
from jaxft.hub.resolve import is_gguf
from jaxft.models.decoder import Decoder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; its default is 16."""

_MERGED = "export it with --format merged"
_PORTABLE = "export it with --format peft --portable"


@dataclass(frozen=True)
class Adapter:
    """The properties of an adapter that readers check.

    Attributes:
        sizes: rank and alpha of each module.
        parameters: modules that are parameters: experts of a layer in one tensor.
        transposed: the base keeps its weights as [in, out], as GPT-2 does.
        gguf: the base is a GGUF file.
    """

    sizes: dict[str, tuple[int, float]]
    use_rslora: bool
    use_dora: bool
    parameters: frozenset[str]
    transposed: bool
    gguf: bool

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(rank for rank, _ in self.sizes.values())


def adapter_of(model: Decoder, base: Path) -> Adapter:
    """Of a model with an adapter on this base; no values are looked at, so that an abstract model will do."""
    sizes, parameters, rslora, dora = {}, set(), False, False
    for site in sites(model):
        if (lora := site.linear.adapter) is None:
            continue
        spec = lora.spec
        found = zip(site.modules, spec.ranks, spec.alphas, strict=True)
        sizes |= {module: (rank, alpha) for module, rank, alpha in found if rank}
        rslora, dora = rslora or spec.use_rslora, dora or spec.use_dora
        if site.target == "target_parameters":
            parameters |= set(site.modules)
    return Adapter(sizes, rslora, dora, frozenset(parameters), model.config.transposed, is_gguf(base))


def consumers(adapter: Adapter) -> list[str]:
    """One line for each reader that will not take this adapter as it is: which, why, what to do."""
    lines = []
    if adapter.gguf:
        lines.append(
            "PEFT, vLLM and SGLang cannot load a GGUF file as the base: name the repository it was made from with "
            "export.py --format peft --base-name ORG/NAME"
        )
    if adapter.use_dora:
        return [*lines, f"vLLM, SGLang and llama.cpp do not take DoRA: {_MERGED}"]
    lines += _scaling(adapter)
    if adapter.transposed:
        lines.append(
            f"llama.cpp refuses this base's adapters or reads them transposed, and vLLM takes none for it: {_MERGED}"
        )
    if adapter.parameters:
        lines.append(f"SGLang and llama.cpp do not take adapters on experts in one tensor: {_MERGED}")
    if adapter.rank > VLLM_RANKS[-1]:
        lines.append(f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {adapter.rank}: {_MERGED}")
    elif adapter.rank > 16:
        lines.append(f"vLLM needs --max-lora-rank {vllm_rank(adapter.rank)}")
    if lonely := _without_partner(adapter):
        lines.append(f"SGLang needs adapters on q_proj and v_proj together; {lonely}: {_PORTABLE}")
    return lines


def vllm_rank(rank: int) -> int:
    """The least `--max-lora-rank` that has room for a rank; the largest there is if none has."""
    return next((step for step in VLLM_RANKS if step >= rank), VLLM_RANKS[-1])


def _scaling(adapter: Adapter) -> list[str]:
    """llama.cpp takes alpha of the settings over the rank of the tensor, SGLang alpha over rank of the settings."""
    if adapter.use_rslora:
        return [f"llama.cpp and SGLang do not know rsLoRA and would scale the adapter wrongly: {_PORTABLE}"]
    ranks, alphas = zip(*adapter.sizes.values(), strict=True)
    if len(set(alphas)) > 1:
        return [f"llama.cpp and SGLang take one alpha for all modules and would scale some wrongly: {_PORTABLE}"]
    if len(set(ranks)) > 1:
        return [f"SGLang takes one rank for all modules and would scale some wrongly: {_PORTABLE}"]
    return []


def _without_partner(adapter: Adapter) -> str | None:
    queries = {module.removesuffix(".q_proj") for module in adapter.sizes if module.endswith(".q_proj")}
    values = {module.removesuffix(".v_proj") for module in adapter.sizes if module.endswith(".v_proj")}
    if queries == values:
        return None
    missing = "v_proj" if queries - values else "q_proj"
    count = len(queries ^ values)
    return f"{count} layers have none on {missing}" if count > 1 else f"one layer has none on {missing}"
