"""The run as one flat, frozen, checked object.

`Config` is the only list of a run's settings: every key has a type, a default and a line that says what
it means. Types are strict (12.5 is no integer, "true" is no boolean), an unknown key is an error. What can be
said in several ways (`adapter: dora` or `use_dora: true`, `load_in_4bit` or `quant_type`) is resolved once,
here: after validation all spellings agree, and a dumped config loads to an equal one. Which keys exclude each
other or have no effect is said in `jaxft.config_rules`. Files and command lines are the business of
`jaxft.config_file`, the names that other trainers use that of `jaxft.config_names`.

Paths are relative to the current directory and stay as written, but for `~`, which is home; addresses of buckets and
`$VARIABLES` are no paths. Tokens have no key: the Hugging Face token comes from HF_TOKEN or `hf auth login`, and a
value that looks like a token or a URL with a login is refused.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from jaxft.config_rules import contradictions, idle
from jaxft.paths import local_path

_TOKEN_START = r"\b(?:hf_|gh[oprsu]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)"
_IN_URL = r"(?i:://[^/\s]*@|[?&](?:access_token|api_key|key|sig|signature|token|x-amz-signature)=)"
#: A credential beyond reasonable doubt; no value may hold one.
SECRET = re.compile(rf"{_TOKEN_START}(?:[a-z0-9]+-)*[A-Za-z0-9]{{16,}}|{_IN_URL}")
#: What merely starts like one; it may be a value, but no error message repeats it.
SECRET_LIKE = re.compile(rf"{_TOKEN_START}|{_IN_URL}")

Fraction = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """The faults of a config: a line per problem, `file: key: what is wrong (got ...)`."""


class YamlDumper(yaml.SafeDumper):
    """Writes the scalars of YAML 1.2, where 1e-4 is a number and `no` and 2024-01-01 are strings."""


def _represent_str(dumper: YamlDumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'  # unquoted, PyYAML writes some line breaks that it reads as others
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


YamlDumper.add_representer(str, _represent_str)
YamlDumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]{1,300}", "-+0123456789"),  # bounded: int() refuses digits by the thousand
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
]:
    YamlDumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


class _Section(BaseModel):
    """Strict, closed and frozen; no value is a credential."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        str_min_length=1,
        hide_input_in_errors=True,
    )

    @field_validator("*")
    @classmethod
    def _hold_no_secret(cls, value: Any) -> Any:
        if isinstance(value, dict):
            parts = [*value, *value.values()]
        else:
            parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, str) and SECRET.search(part) for part in parts):
            raise ValueError("holds what looks like a token or a login: take it out, set HF_TOKEN instead")
        return value


class DatasetConfig(_Section):
    """One source of examples. A bare string stands for `{path: string}`."""

    path: str = Field(description="A file, a pattern of files (data/*.jsonl), a saved directory, or a hub dataset.")
    type: Literal["messages", "sharegpt", "alpaca", "completion", "text"] | None = Field(
        None, description="Format of the examples; null = detect it and say what was found."
    )
    split: str | None = Field(
        None, description="Split of a hub or saved dataset, or list in a JSON object; null = train."
    )
    name: str | None = Field(None, description="Subset (configuration) of a hub dataset.")
    weight: PositiveFloat | None = Field(None, description="Sampling weight, relative to the other sources.")
    columns: dict[str, str] = Field(
        {}, description="Expected field -> column of the file, as in {prompt: question, completion: answer}."
    )
    max_examples: PositiveInt | None = Field(None, description="Read no more examples than this; null = all.")

    _be_local = field_validator("path")(local_path)  # after the look for secrets, so that none is quoted

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class MeshConfig(_Section):
    """Devices along each axis; their product is the number of devices."""

    data: int = Field(-1, description="Groups that each hold the whole model and their own rows; -1 = the rest.")
    fsdp: int = Field(1, description="Devices that split rows and also weights (ZeRO-3); -1 = the rest.")
    expert: int = Field(1, description="Devices that split rows and share out the experts of a layer; -1 = the rest.")
    context: int = Field(1, description="Devices that split the tokens of rows (sequence parallelism); -1 = the rest.")
    tensor: int = Field(1, description="Devices that split every matrix product; -1 = the rest.")

    @model_validator(mode="before")
    @classmethod
    def _leave_the_rest_to_one(cls, data: Any) -> Any:
        if isinstance(data, dict) and "data" not in data and -1 in data.values():
            return {**data, "data": 1}
        return data

    @field_validator("*")
    @classmethod
    def _count(cls, size: int) -> int:
        if size < 1 and size != -1:
            raise ValueError("must be a number of devices, 1 or more, or -1 for the rest")
        return size

    @model_validator(mode="after")
    def _one_remainder(self) -> Self:
        rest = [axis for axis, size in self if size == -1]
        if len(rest) > 1:
            raise ValueError(f"only one axis can be -1, not {' and '.join(rest)}")
        return self


RematName = Literal["lora", "attention", "qkv", "attention_out", "mlp"]


class Config(_Section):
    """All settings of a run. Frozen; after validation all spellings of one setting agree."""

    # The base model
    model_name_or_path: str = Field(
        description="Model, quantized or not: a hub name, or a directory or GGUF file from the current directory."
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit on the hub; null = main.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Number type of the base and of compute.")
    load_in_4bit: bool = Field(False, description="Quantize the base to 4 bits, nf4 or as quant_type says.")
    load_in_8bit: bool = Field(False, description="Quantize the base to 8 bits: int8.")
    quant_type: Literal["nf4", "int4", "int8"] | None = Field(
        None, description="Code of the quantized base; enough by itself to quantize; null = as load_in_*."
    )
    use_double_quant: bool = Field(False, description="nf4 only: quantize its scales, too.")
    quant_group_size: PositiveInt = Field(64, multiple_of=2, description="int4 only: weights per scale.")

    # What is trained
    adapter: Literal["lora", "dora", "none"] = Field(
        "lora", description="Train low-rank adapters, weight-decomposed ones, or (none) every weight."
    )
    use_dora: bool = Field(False, description="The same as adapter: dora.")
    lora_r: PositiveInt = Field(16, description="Rank of the adapters.")
    lora_alpha: PositiveFloat = Field(32.0, description="Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: Fraction = Field(0.0, description="Probability that an adapter's input is dropped.")
    lora_target_modules: Annotated[list[str], Field(min_length=1)] | str = Field(
        "all-linear", description="Modules that get an adapter: a list of names, one regex, or all-linear."
    )
    lora_target_parameters: list[str] = Field(
        [], description="Parameters that get an adapter where all experts are one, as mlp.experts.gate_up_proj."
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(lora_r): steadier at high ranks.")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Module name or regex -> its own lora_r.")
    alpha_pattern: dict[str, PositiveFloat] = Field({}, description="Module name or regex -> own lora_alpha.")
    adapter_name_or_path: str | None = Field(
        None, description="PEFT adapter to go on from: a directory, relative to the current directory."
    )

    # Data
    datasets: list[DatasetConfig] = Field(min_length=1, description="Sources of training examples.")
    eval_datasets: list[DatasetConfig] = Field([], description="Sources of held-out examples.")
    val_set_size: int | float = Field(
        0, ge=0, description="Examples to hold out of datasets: a number (1 or more) or a fraction (below 1)."
    )
    max_length: PositiveInt = Field(2048, description="Tokens in the longest example, and in a packed row.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to an example longer than max_length; the count is reported."
    )
    on_bad_record: Literal["error", "drop"] = Field(
        "error", description="What happens to records that cannot be trained on; all are named, or dropped and counted."
    )
    strict_data: bool = Field(
        False, description="What an example says and the chat template does not show is an error, not a warning."
    )
    packing: bool = Field(False, description="Several examples to a row; none attends to another.")
    assistant_only_loss: bool = Field(True, description="Learn the assistant's turns; false = all tokens.")
    mask_history: bool = Field(False, description="Learn the last answer of each conversation only.")
    chat_template: str | None = Field(
        None, description="Name, or .jinja file relative to the current directory; null = the model's own."
    )

    # Optimization
    loss_type: Literal["nll", "dft"] = Field(
        "nll",
        description="Loss per learned token: nll, its negative log-probability, or dft, nll times the probability.",
    )
    micro_batch_size: PositiveInt = Field(1, description="Rows per data-parallel group per micro-batch.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Micro-batches per update.")
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate, reached when warm-up ends.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled; multiplied by the learning rate.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Clip gradients to this global norm; 0 = never.")
    router_aux_loss_coef: NonNegativeFloat = Field(
        0.0, description="Times the load-balancing loss of a mixture of experts, added to the training loss."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="After warm-up: down to 0 on a half cosine, down to 0 on a line, or flat."
    )
    warmup_ratio: Fraction = Field(0.0, description="Warm-up, as a fraction of all updates.")
    warmup_steps: NonNegativeInt = Field(0, description="Warm-up, as a number of updates.")
    optim: Annotated[
        Literal["adamw"],
        BeforeValidator(lambda v: "adamw" if v in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else v),
    ] = Field("adamw", description="AdamW; adamw_torch, adamw_torch_fused and adamw_hf mean the same.")
    adam_beta1: Fraction = Field(0.9, description="Decay per update of the running mean of gradients.")
    adam_beta2: Fraction = Field(0.999, description="Decay per update of the running mean of their squares.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="Added to the root of the mean square.")
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over the training data, or a fraction.")
    max_steps: PositiveInt | None = Field(None, description="Number of updates; wins over num_train_epochs.")
    remat: Literal["none", "full", "dots"] | list[RematName] = Field(
        "full", description="Recompute for the gradient: nothing, whole layers, all but products, or all but a list."
    )
    offload: list[Literal["activations", "optimizer"]] = Field(
        [], description="Keep in the memory of the host what remat keeps of layers, or the state of the optimizer."
    )
    scan_layers: bool = Field(
        True, description="Compile one layer and loop; false compiles each: slower to compile, faster on a CPU."
    )
    attn_implementation: Literal["auto", "blockwise", "splash", "cudnn"] = Field(
        "auto", description="Kernel of attention: plain JAX, for TPUs, for NVIDIA GPUs; auto = the best that can do it."
    )
    mesh: MeshConfig = Field(MeshConfig(), description="Devices along the axes data, fsdp, expert, context and tensor.")
    seed: int = Field(42, ge=0, lt=2**32, description="Fixes new weights, the order of the data and dropout.")
    max_nonfinite_steps: PositiveInt = Field(5, description="Abort after so many skipped non-finite updates in a row.")

    # Files, logs and evaluation
    output_dir: str = Field(description="Where the run writes; relative to the current directory.")
    resume_from_checkpoint: bool = Field(False, description="Go on from the newest checkpoint in output_dir.")
    logging_steps: PositiveInt = Field(10, description="Updates between two lines of the log.")
    eval_steps: PositiveInt | None = Field(None, description="Updates between evaluations; null = an epoch.")
    save_steps: PositiveInt | None = Field(None, description="Updates between checkpoints; null = epoch or 10 minutes.")
    save_total_limit: PositiveInt = Field(2, description="Checkpoints to keep; older ones are deleted.")
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "trackio"]],
        BeforeValidator(lambda v: [] if v == "none" else [v] if isinstance(v, str) else v),
    ] = Field([], description="Where metrics go besides the log: a name, a list of names, or none.")
    early_stopping_patience: PositiveInt | None = Field(
        None, description="Stop after so many evaluations in a row without a lower loss; null = never."
    )
    load_best_model_at_end: bool = Field(True, description="Export the weights with the lowest eval loss.")
    exact_match_samples: NonNegativeInt = Field(
        0, description="Held-out examples that base and tuned model answer; scored by equality."
    )
    sample_prompts: NonNegativeInt = Field(
        5, description="Held-out prompts that base and tuned model answer for the report; 0 = none."
    )
    max_new_tokens: PositiveInt = Field(128, description="Tokens in the longest generated answer.")

    def to_yaml(self, adapter: Mapping[str, Any] | None = None) -> str:
        """All keys that have an effect, resolved, in the order of the schema; loads to an equal config.

        Keys without effect stand at the end as comments that say why.

        Args:
            adapter: key -> value of the adapter in `adapter_name_or_path`; the comments show them.
        """
        without = {key: why for key, why, _ in idle(self)}
        text = yaml.dump(self.model_dump(exclude=set(without)), Dumper=YamlDumper, sort_keys=False, allow_unicode=True)
        for key, why in without.items():
            shown = f": {json.dumps(adapter[key])}" if adapter and key in adapter else ""
            text += f"# {key}{shown} {why.partition(';')[0].replace('`', '')}\n"
        return text

    @field_validator("model_name_or_path", "adapter_name_or_path", "chat_template", "output_dir")
    @classmethod
    def _be_local(cls, path: str | None) -> str | None:
        return None if path is None else local_path(path)

    @field_validator("lora_target_modules")
    @classmethod
    def _compile_regex(cls, targets: list[str] | str) -> list[str] | str:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return targets

    @field_validator("val_set_size")
    @classmethod
    def _tell_number_from_fraction(cls, size: int | float) -> int | float:
        if isinstance(size, float) and size >= 1:
            raise ValueError("must be a whole number of examples, or a fraction below 1")
        return size

    @model_validator(mode="before")
    @classmethod
    def _fill_in_spellings(cls, data: Any) -> Any:
        """Fill in the other spellings of a given setting; `_agree` reports contradictions."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("use_dora") is True and data.get("adapter", "lora") == "lora":
            data["adapter"] = "dora"
        elif data.get("adapter") == "dora":
            data.setdefault("use_dora", True)
        if data.get("quant_type") in ("nf4", "int4"):
            data.setdefault("load_in_4bit", not data.get("load_in_8bit"))
        elif data.get("quant_type") == "int8":
            data.setdefault("load_in_8bit", not data.get("load_in_4bit"))
        elif data.get("quant_type") is None and data.get("load_in_4bit") is True:
            data["quant_type"] = "nf4"
        elif data.get("quant_type") is None and data.get("load_in_8bit") is True:
            data["quant_type"] = "int8"
        return data

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(contradictions(self)):
            raise ValueError("\n".join(found))
        return self
