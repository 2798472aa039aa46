"""From files and command lines to a config: other trainers' names, YAML, overrides, and the complaints."""

import json
import os
import re
from pathlib import Path

import pytest

from jaxft.config import Config, ConfigError, DatasetConfig, MeshConfig
from jaxft.config_file import load_config
from jaxft.config_names import ADVICE, ALIASES, ELSEWHERE, NEEDS, OF_A_SOURCE, TRANSLATIONS, VALUES

BASE = {"model_name_or_path": "org/model", "datasets": ["train.jsonl"], "output_dir": "runs/a"}
BASE_YAML = "model_name_or_path: org/model\ndatasets: [train.jsonl]\noutput_dir: runs/a\n"
HELD_OUT = {"eval_datasets": ["eval.jsonl"]}

# Written down apart from the code: our key, its other names, a value that is not the default.
OTHER_NAMES = [
    ("model_name_or_path", ["base_model", "model"], "org/other"),
    ("model_revision", ["revision"], "v2"),
    ("dtype", ["torch_dtype", "bnb_4bit_compute_dtype"], "float32"),
    ("quant_type", ["bnb_4bit_quant_type"], "int4"),
    ("use_double_quant", ["bnb_4bit_use_double_quant", "double_quantization", "use_bnb_nested_quant"], True),
    ("use_dora", ["peft_use_dora"], True),
    ("lora_r", ["lora_rank", "r"], 7),
    ("lora_target_modules", ["lora_target", "target_modules"], ["q_proj", "up_proj"]),
    ("lora_target_parameters", ["target_parameters"], ["mlp.experts.down_proj"]),
    ("use_rslora", ["peft_use_rslora"], True),
    ("adapter_name_or_path", ["lora_model_dir"], "runs/b"),
    ("val_set_size", ["val_size"], 0.25),
    ("max_length", ["sequence_len", "cutoff_len", "max_seq_length"], 333),
    ("packing", ["sample_packing", "neat_packing"], True),
    ("eval_datasets", ["test_datasets"], [DatasetConfig(path="b.jsonl")]),
    ("chat_template", ["chat_template_path", "chat_template_jinja"], "chatml"),
    ("micro_batch_size", ["per_device_train_batch_size", "batch_size"], 6),
    ("max_grad_norm", ["clip_grad_norm"], 0.5),
    ("lr_scheduler_type", ["lr_scheduler"], "linear"),
    ("optim", ["optimizer"], "adamw"),
    ("num_train_epochs", ["num_epochs", "epochs"], 2.5),
]
TRANSLATED = [
    ("quantization_bit", 4, {"load_in_4bit": True, "load_in_8bit": False, "quant_type": "nf4"}),
    ("quantization_bit", 8, {"load_in_4bit": False, "load_in_8bit": True, "quant_type": "int8"}),
    ("finetuning_type", "lora", {"adapter": "lora", "use_dora": False}),
    ("finetuning_type", "full", {"adapter": "none", "use_dora": False}),
    ("finetuning_type", "none", {"adapter": "none", "use_dora": False}),
    ("use_peft", True, {"adapter": "lora"}),
    ("use_peft", False, {"adapter": "none"}),
    ("quantization_method", "bnb", {"quant_type": None}),
    ("quantization_method", "bitsandbytes", {"quant_type": None}),
    ("lora_target_linear", True, {"lora_target_modules": "all-linear"}),
    ("lora_target_linear", False, {"lora_target_modules": "all-linear"}),
    ("bf16", True, {"dtype": "bfloat16"}),
    ("bf16", "auto", {"dtype": "bfloat16"}),
    ("bf16", False, {"dtype": "float32"}),
    ("bf16", None, {"dtype": "bfloat16"}),
    ("use_dft_loss", True, {"loss_type": "dft"}),
    ("use_dft_loss", False, {"loss_type": "nll"}),
    ("pure_bf16", True, {"dtype": "bfloat16"}),
    ("pure_bf16", False, {"dtype": "bfloat16"}),
    ("train_on_prompt", True, {"assistant_only_loss": False}),
    ("train_on_prompt", False, {"assistant_only_loss": True}),
    ("save_strategy", "epoch", {"save_steps": None}),
    ("eval_strategy", "epoch", {"eval_steps": None}),
    ("eval_strategy", "no", {"eval_datasets": [], "val_set_size": 0}),
    ("evaluation_strategy", "epoch", {"eval_steps": None}),
    ("evaluation_strategy", "no", {"eval_datasets": [], "val_set_size": 0}),
    ("logging_strategy", "steps", {"logging_steps": 10}),
    ("metric_for_best_model", "eval_loss", {"load_best_model_at_end": True}),
    ("metric_for_best_model", "loss", {"load_best_model_at_end": True}),
    ("metric_for_best_model", None, {"load_best_model_at_end": True}),
    ("stage", "sft", {}),
    ("do_train", True, {}),
    ("task_type", "CAUSAL_LM", {}),
    ("peft_type", "LORA", {"adapter": "lora"}),
    ("bias", "none", {}),
    ("init_lora_weights", True, {}),
    ("train_on_inputs", True, {"assistant_only_loss": False}),
    ("train_on_inputs", False, {"assistant_only_loss": True}),
    ("gradient_checkpointing", True, {"remat": "full"}),
    ("gradient_checkpointing", False, {"remat": "none"}),
    ("activation_offloading", True, {"offload": ["activations"]}),
    ("activation_offloading", False, {"offload": []}),
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes run.yaml, BASE_YAML and then the text, into an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, base: str = BASE_YAML) -> str:
        Path("run.yaml").write_text(base + text, encoding="utf-8")
        return "run.yaml"

    return write


def complaint(source, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


# Other names


def test_the_tables_of_other_names_are_complete_and_point_at_keys():
    assert {alias: key for key, aliases, _ in OTHER_NAMES for alias in aliases} == ALIASES
    meanings = {
        (name, value): ours
        for table in (TRANSLATIONS, VALUES)
        for name, values in table.items()
        for value, ours in values.items()
    }
    written_down = {(name, value) for name, value, _ in TRANSLATED + OTHER_VALUES}
    assert written_down | {*NEEDS} == {*meanings}
    targets = {key for settings in meanings.values() for key in settings} | {*ALIASES.values(), *NEEDS.values()}
    assert targets <= {*Config.model_fields}
    assert {*VALUES, *ADVICE} <= {*Config.model_fields, *DatasetConfig.model_fields}
    tables = [*ALIASES, *TRANSLATIONS, *ELSEWHERE, *Config.model_fields]
    assert len({*tables}) == len(tables), "each name has one meaning"
    assert not {*OF_A_SOURCE} & {*DatasetConfig.model_fields}


@pytest.mark.parametrize(
    "text", [*ELSEWHERE.values(), *OF_A_SOURCE.values(), *(t for a in ADVICE.values() for _, t in a)]
)
def test_advice_names_keys_that_there_are(text):
    for key in re.findall(r"`(\w+)", text):
        assert key in {*Config.model_fields, *DatasetConfig.model_fields, "messages"}, key


@pytest.mark.parametrize(
    "alias, key, value", [(alias, key, value) for key, aliases, value in OTHER_NAMES for alias in aliases]
)
def test_alias(alias, key, value):
    base = {name: kept for name, kept in BASE.items() if name != key}
    if key == "use_double_quant":
        base["quant_type"] = "nf4"
    plain = load_config(base | {key: value})
    if key == "optim":
        assert Config.model_fields[key].default == value  # there is one
    else:
        assert value != Config.model_fields[key].default
    assert getattr(plain, key) == value
    assert load_config(base | {alias: value}) == plain
    assert load_config(base | {alias: value, key: value}) == plain
    written = [value[0].model_dump()] if key == "eval_datasets" else value
    assert load_config(BASE | base, [f"{alias}={json.dumps(written)}"]) == plain


OTHER_VALUES = [
    ("adapter", "qlora", {"adapter": "lora", "quant_type": "nf4"}),
    ("dtype", "torch.bfloat16", {"dtype": "bfloat16"}),
    ("dtype", "bf16", {"dtype": "bfloat16"}),
    ("dtype", "torch.float32", {"dtype": "float32"}),
    ("dtype", "fp32", {"dtype": "float32"}),
    ("dtype", "float", {"dtype": "float32"}),
    ("lora_target_modules", "all", {"lora_target_modules": "all-linear"}),
    ("chat_template", "tokenizer_default", {"chat_template": None}),
    ("lr_scheduler_type", "constant_with_warmup", {"lr_scheduler_type": "constant"}),
    ("max_steps", -1, {"max_steps": None}),
    ("resume_from_checkpoint", None, {"resume_from_checkpoint": False}),
]
MORE_VALUES = [
    ("lora_target", "all", {"lora_target_modules": "all-linear"}),
    ("lora_target", "q_proj,v_proj", {"lora_target_modules": ["q_proj", "v_proj"]}),
    ("target_modules", "q_proj, mlp.up_proj ", {"lora_target_modules": ["q_proj", "mlp.up_proj"]}),
    ("lora_target", "q_proj", {"lora_target_modules": ["q_proj"]}),
    ("lora_target_modules", r".*\.(q|v)_proj", {"lora_target_modules": r".*\.(q|v)_proj"}),
    ("lora_target_modules", r".*\d{1,2}.q_proj", {"lora_target_modules": r".*\d{1,2}.q_proj"}),
    ("lora_target_modules", "all-linear", {"lora_target_modules": "all-linear"}),
    ("torch_dtype", "torch.bfloat16", {"dtype": "bfloat16"}),
    ("bnb_4bit_compute_dtype", "bfloat16", {"dtype": "bfloat16"}),
    ("lr_scheduler", "constant_with_warmup", {"lr_scheduler_type": "constant"}),
    ("optimizer", "adamw_torch_fused", {"optim": "adamw"}),
]


@pytest.mark.parametrize("name, value, expected", TRANSLATED + OTHER_VALUES + MORE_VALUES)
def test_translation(name, value, expected):
    for config in (load_config(BASE | {name: value}), load_config(BASE, [f"{name}={json.dumps(value)}"])):
        assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "given, problem",
    [
        ({"quantization_bit": 3}, "quantization_bit: must be 4 or 8 (got 3)"),
        ({"quantization_bit": 4.0}, "quantization_bit: must be 4 or 8 (got 4.0)"),
        ({"finetuning_type": "freeze"}, 'finetuning_type: must be "lora" or "full" or "none" (got "freeze")'),
        ({"finetuning_type": ["lora"]}, 'finetuning_type: must be "lora" or "full" or "none" (got a list)'),
        ({"use_peft": 1}, "use_peft: must be true or false (got 1)"),
        ({"train_on_inputs": "yes"}, 'train_on_inputs: must be true or false (got "yes")'),
        ({"gradient_checkpointing": None}, "gradient_checkpointing: must be true or false (got null)"),
    ],
)
def test_translation_of_an_unknown_value(given, problem):
    assert complaint(BASE | given) == f"config: {problem}"


@pytest.mark.parametrize(
    "given, adapter",
    [
        ({"use_peft": True, "peft_use_dora": True}, "dora"),
        ({"finetuning_type": "lora", "use_dora": True}, "dora"),
        ({"finetuning_type": "full", "use_peft": False}, "none"),
    ],
)
def test_other_names_for_the_adapter_combine(given, adapter):
    assert load_config(BASE | given).adapter == adapter


LLAMA_FACTORY = """model_name_or_path: org/model
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: runs/a
save_strategy: steps
plot_loss: true
overwrite_output_dir: true
report_to: none
flash_attn: fa2
additional_target: embed_tokens,lm_head
per_device_eval_batch_size: 1
lr_scheduler_type: cosine_with_restarts
optim: paged_adamw_8bit
bf16: true
fp16: false
deepspeed:
resume_from_checkpoint: null
"""
AXOLOTL = """base_model: org/model
model_type: LlamaForCausalLM
load_in_4bit: true
strict: false
datasets:
  - {path: a.jsonl, type: chat_template, field_messages: conversations}
  - {path: b.jsonl, type: alpaca_chat.load_qa}
output_dir: runs/a
adapter: qlora
sequence_len: 4096
sample_packing: "true"
eval_sample_packing: false
pad_to_sequence_len: true
lora_modules_to_save: [embed_tokens]
wandb_project: mine
wandb_entity:
optimizer: adamw_bnb_8bit
eval_steps: 0.1
val_set_size: 0.05
fp16: true
tf32: false
gradient_checkpointing_kwargs: {use_reentrant: false}
flash_attention: true
evals_per_epoch: 4
special_tokens: {pad_token: <pad>}
resume_from_checkpoint: runs/checkpoint-100
"""


@pytest.mark.parametrize("text, wrong, advised", [
    (LLAMA_FACTORY,
     {"trust_remote_code", "dataset", "template", "max_samples", "overwrite_cache", "preprocessing_num_workers",
      "save_strategy", "plot_loss", "overwrite_output_dir", "flash_attn", "additional_target",
      "per_device_eval_batch_size", "lr_scheduler_type", "optim", "datasets"},
     ["template: has no counterpart here: the model's own chat template is used; drop it, or set `chat_template`",
      "dataset: has no counterpart here: sources are a list: `datasets: [{path: train.jsonl}]`",
      "save_strategy: steps needs `save_steps`, the number of updates between two; give it",
      'optim: must be \'adamw\' (got "paged_adamw_8bit"); the optimizer is AdamW; `offload: [optimizer]` keeps']),
    (AXOLOTL,
     {"model_type", "sample_packing (packing)", "datasets.0.type", "datasets.0.field_messages", "datasets.1.type",
      "pad_to_sequence_len", "lora_modules_to_save", "wandb_project", "optimizer (optim)", "eval_steps", "fp16",
      "gradient_checkpointing_kwargs", "flash_attention", "evals_per_epoch", "special_tokens",
      "resume_from_checkpoint"},
     ["fp16: has no counterpart here: float16 overflows where bfloat16 does not",
      "eval_steps: must be a valid integer (got 0.1); it is a number of updates, not a fraction of the run",
      'resume_from_checkpoint: must be true or false (got "runs/checkpoint-100"); true goes on from the newest',
      "datasets.0.field_messages: has no counterpart here: `columns` says how the file calls them",
      "lora_modules_to_save: has no counterpart here: beside an adapter no module is trained whole; list it in",
      'sample_packing (packing): must be true or false (got "true")']),
])  # fmt: skip
def test_configs_of_other_trainers_get_a_line_for_each_key_that_is_not_understood(write, text, wrong, advised):
    lines = complaint(write(text, base="")).splitlines()
    assert {line.split(": ")[1] for line in lines} == wrong
    assert len(lines) == len(wrong)
    for advice in advised:
        assert sum(line.startswith(f"run.yaml: {advice}") for line in lines) == 1, advice


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_switched_off_asks_for_nothing(name):
    for value in (None, False, "", "none", [], {}, 0):
        assert load_config(BASE | {name: value}) == load_config(BASE)
    assert complaint(BASE | {name: "x"}) == f"config: {name}: has no counterpart here: {ELSEWHERE[name]}"


@pytest.mark.parametrize("given, problem", [
    ({"adapter": "qlora", "load_in_8bit": True}, "adapter (load_in_4bit) and load_in_8bit are both true"),
    ({"bf16": True, "dtype": "float32"}, "dtype: has two values, given as bf16 and dtype; keep one"),
    ({"bf16": False, "pure_bf16": True}, "dtype: has two values, given as bf16 and pure_bf16; keep one"),
    ({"torch_dtype": "float16"}, "torch_dtype (dtype): must be 'float32' or 'bfloat16' (got \"float16\")"),
    ({"dtype": "auto"}, "dtype: must be 'float32' or 'bfloat16' (got \"auto\"); leave it out for bfloat16"),
    ({"lora_target_linear": True, "target_modules": ["q"]},
     "lora_target_modules: has two values, given as lora_target_linear and target_modules; keep one"),
    ({"eval_strategy": "no", "val_size": 0.1}, "val_set_size: has two values, given as eval_strategy and val_size"),
    ({"save_strategy": "epoch", "save_steps": 100}, "save_steps: has two values, given as save_strategy and save_"),
    ({"save_strategy": "no"}, 'save_strategy: must be "epoch" or "steps" (got "no")'),
    ({"stage": "dpo"}, 'stage: must be "sft" (got "dpo")'),
    ({"bias": "all"}, 'bias: must be "none" (got "all")'),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation: must be"),
    ({"warmup_steps": 0.03}, "warmup_steps: must be a valid integer (got 0.03); a fraction of the run is `warmup"),
    ({"report_to": None}, "report_to: must be a valid list (got null); name those you want, or none"),
    ({"save_total_limit": None}, "save_total_limit: must be a valid integer (got null); all are kept where"),
])  # fmt: skip
def test_values_of_other_trainers_that_do_not_fit(given, problem):
    assert complaint(BASE | given).startswith(f"config: {problem}")


def test_a_strategy_with_its_steps():
    config = load_config(BASE | HELD_OUT | {"eval_strategy": "steps", "eval_steps": 7, "save_strategy": "epoch"})
    assert (config.eval_steps, config.save_steps) == (7, None)


def test_spellings_that_differ_are_errors_naming_both(write):
    assert complaint(write("lora_rank: 8\nr: 9\nepochs: 1\nnum_epochs: 2\n")).splitlines() == [
        "run.yaml: lora_r: has two values, given as lora_rank and r; keep one",
        "run.yaml: num_train_epochs: has two values, given as epochs and num_epochs; keep one",
    ]
    assert complaint(write("finetuning_type: full\nuse_peft: true\n")) == (
        "run.yaml: adapter: has two values, given as finetuning_type and use_peft; keep one"
    )
    assert complaint(write("load_in_4bit: false\nquantization_bit: 4\n")) == (
        "run.yaml: load_in_4bit: has two values, given as load_in_4bit and quantization_bit; keep one"
    )
    twice = "command line: lora_r: has two values, given as"
    assert complaint(BASE, ["lora_r=8", "r=9"]) == f"{twice} lora_r and r; keep one"
    assert complaint(BASE, ["r=8", "r=9"]) == f"{twice} r; keep one"
    assert load_config(BASE, ["lora_r=8", "r=8"]).lora_r == 8


def test_a_complaint_uses_the_users_spelling(write):
    assert complaint(write("lora_rank: 0\n")) == "run.yaml: lora_rank (lora_r): must be greater than 0 (got 0)"
    assert complaint(write("lora_rank: 5\n"), ["r=0"]) == ("command line: r (lora_r): must be greater than 0 (got 0)")
    assert complaint(write("quantization_bit: 4\nload_in_8bit: true\n")) == (
        "run.yaml: quantization_bit (load_in_4bit) and load_in_8bit are both true; keep one"
    )


# YAML


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("1E4", 1e4), ("2.e-5", 2e-5), (".5", 0.5), ("+1.5e+1", 15.0), ("3", 3.0), ("010", 10.0),
    ("08", 8.0),
])  # fmt: skip
def test_numbers(write, text, value):
    assert load_config(write(f"learning_rate: {text}")).learning_rate == value
    assert load_config(BASE, [f"learning_rate={text}"]).learning_rate == value


@pytest.mark.parametrize("text", [
    "no", "off", "yes", "on", "NO", "y", "2024-01-01", "1_000", "0x1F", "12:30", "=", "e5", "1e", ".",
    "7" * 400,
])  # fmt: skip
def test_strings(write, text):
    assert load_config(write(f"model_revision: {text}")).model_revision == text


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("FALSE", False), ("false", False)])
def test_booleans(write, text, value):
    assert load_config(write(f"packing: {text}")).packing is value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off"])
def test_other_words_for_booleans_are_strings(write, text):
    assert complaint(write(f"packing: {text}")) == f'run.yaml: packing: must be true or false (got "{text}")'


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null(write, text):
    assert load_config(write(f"max_steps: {text}")).max_steps is None


@pytest.mark.parametrize("text, problem", [
    ("seed: 1\nlora_r: 2\nseed: 1\n", "run.yaml:6: key `seed` is given twice, first on line 4"),
    ("mesh:\n  fsdp: 1\n  fsdp: 2\n", "run.yaml:6: key `fsdp` is given twice, first on line 5"),
    ("eval_datasets:\n- path: a\n  path: a\n", "run.yaml:6: key `path` is given twice, first on line 5"),
    ("mesh: {fsdp: 1, 'fsdp': 2}\n", "run.yaml:4: key `fsdp` is given twice, first on line 4"),
    ("seed: !!int 3\n", "run.yaml:4: a tag has no place in a config"),
    ("seed: !!python/object/apply:os.getcwd []\n", "run.yaml:4: a tag has no place in a config"),
    ("lora_r: [1\n", "run.yaml:5: while parsing a flow sequence"),
    ("lora_r: 1: 2\n", "run.yaml:4: mapping values are not allowed here"),
    ("lora_r: *other\n", "run.yaml:4: found undefined alias 'other'"),
    ("\tlora_r: 1\n", "run.yaml:4: "),
    ("lora_r: \x01\n", "run.yaml:4: special characters are not allowed"),
    ("---\na: 1\n", "run.yaml:4: expected a single document in the stream, but found another document"),
    ("[1]: 2\n", "run.yaml:4: while constructing a mapping, found unhashable key"),
])  # fmt: skip
def test_yaml_that_is_wrong_names_the_line(write, text, problem):
    assert complaint(write(text)).startswith(problem)


def test_anchors_and_merges_work(write):
    path = write(
        "eval_datasets:\n"
        "- &first {path: a, split: test, max_examples: 2}\n"
        "- &second {<<: *first, path: b}\n"
        "- {<<: *second, path: c, max_examples: 3}\n"
    )
    found = [(source.path, source.split, source.max_examples) for source in load_config(path).eval_datasets]
    assert found == [("a", "test", 2), ("b", "test", 2), ("c", "test", 3)]


def test_a_list_that_holds_itself(write):
    path = write("eval_datasets: &x [*x]\n")
    assert complaint(path) == "run.yaml: eval_datasets.0: must be a mapping (got a list)"


def test_a_byte_order_mark_is_no_part_of_the_first_key(write):
    assert load_config(write("", base="\ufeff" + BASE_YAML)).model_name_or_path == "org/model"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "run.yaml: is empty; a config has a line for every key"),
        ("# only words\n", "run.yaml: is empty"),
        ("- a\n- b\n", "run.yaml: is not a mapping (got a list)"),
        ("lora_r=8\n", 'run.yaml: is not a mapping (got "lora_r=8")'),
    ],
)
def test_a_file_without_keys(write, text, problem):
    assert complaint(write(text, base="")).startswith(problem)


def test_a_file_that_cannot_be_read(tmp_path):
    missing, binary = tmp_path / "none.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"seed: \xff\xfe\n")
    assert complaint(missing) == f"{missing}: cannot be read: No such file or directory"
    assert complaint(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    assert complaint(str(binary)) == f"{binary}: is not UTF-8 text"


def test_relative_paths_stay_as_written(write, monkeypatch, tmp_path):
    path = os.path.abspath(write(""))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path)
    assert (config.output_dir, config.datasets[0].path) == ("runs/a", "train.jsonl")


# Overrides


@pytest.mark.parametrize("override, key, value", [
    ("learning_rate=1e-4", "learning_rate", 1e-4),
    ("lora_target_modules=[q_proj,v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
    (r"lora_target_modules=.*\.(q|v)_proj", "lora_target_modules", r".*\.(q|v)_proj"),
    ("mesh={fsdp: 8}", "mesh", MeshConfig(fsdp=8)),
    ("mesh.fsdp=8", "mesh", MeshConfig(fsdp=8)),
    ("max_steps=", "max_steps", None),
    ("max_steps = 3", "max_steps", 3),
    ("output_dir=a=b", "output_dir", "a=b"),
    ("packing=true", "packing", True),
    ("model_revision=no", "model_revision", "no"),
    ("rank_pattern.layers.0.q_proj=8", "rank_pattern", {"layers.0.q_proj": 8}),
    ("datasets.0.weight=2", "datasets", [DatasetConfig(path="train.jsonl", weight=2.0)]),
    ("datasets.0=b.jsonl", "datasets", [DatasetConfig(path="b.jsonl")]),
    ("datasets.0.columns.a.b=c", "datasets", [DatasetConfig(path="train.jsonl", columns={"a.b": "c"})]),
    ("datasets=[{path: b, type: text}, c]", "datasets",
     [DatasetConfig(path="b", type="text"), DatasetConfig(path="c")]),
])  # fmt: skip
def test_override(override, key, value):
    given = {
        "lora_target_modules": ["k_proj"],
        "model_revision": "main",
        "max_steps": 7,
        "learning_rate": 1.0,
    }
    assert getattr(load_config(BASE | given, [override]), key) == value


def test_parts_override_wholes_whatever_their_order():
    overrides = ["mesh.tensor=2", "mesh={data: 3, tensor: 5}", "rank_pattern.q=4"]
    config = load_config(BASE | {"mesh": {"fsdp": 7}, "rank_pattern": {"v": 2}}, overrides)
    assert config.mesh == MeshConfig(data=3, fsdp=1, tensor=2)
    assert config.rank_pattern == {"v": 2, "q": 4}


def test_a_mapping_may_hold_paths():
    """At any depth, and beside the same path as a text under another name."""
    source = {
        "model_name_or_path": Path("models/a"),
        "base_model": "models/a",
        "output_dir": Path("runs") / "a",
        "datasets": [Path("a.jsonl"), {"path": Path("b.jsonl"), "type": "text"}],
        "eval_datasets": ({"path": Path("c.jsonl")},),
    }
    config = load_config(source, ["datasets.0.weight=2", "datasets.1.weight=3"])
    assert (config.model_name_or_path, config.output_dir) == ("models/a", "runs/a")
    assert [(d.path, d.type, d.weight) for d in config.datasets] == [("a.jsonl", None, 2.0), ("b.jsonl", "text", 3.0)]
    assert [dataset.path for dataset in config.eval_datasets] == ["c.jsonl"]
    assert source["datasets"][1]["path"] == Path("b.jsonl"), "the source is not changed"


def test_the_source_is_not_changed():
    source = BASE | {"datasets": ["a", {"path": "b"}], "mesh": {"fsdp": 2}}
    before = json.dumps(source)
    load_config(source, ["datasets.0.weight=2", "datasets.1.weight=3", "mesh.fsdp=4"])
    assert json.dumps(source) == before


@pytest.mark.parametrize("given, override, expected", [
    ({"lora_rank": 8}, "lora_r=4", {"lora_r": 4}),
    ({"lora_r": 8}, "lora_rank=4", {"lora_r": 4}),
    ({"cutoff_len": 100}, "sequence_len=200", {"max_length": 200}),
    ({"train_on_inputs": True}, "assistant_only_loss=true", {"assistant_only_loss": True}),
    ({"load_in_4bit": True}, "quantization_bit=8", {"quant_type": "int8", "load_in_4bit": False}),
    ({"quantization_bit": 4}, "quant_type=int8", {"quant_type": "int8", "load_in_4bit": False}),
    ({"quant_type": "nf4", "load_in_4bit": True}, "load_in_4bit=false", {"quant_type": None}),
    ({"quant_type": "nf4", "load_in_4bit": True}, "quant_type=null", {"quant_type": None}),
    ({"adapter": "dora", "use_dora": True}, "adapter=lora", {"adapter": "lora", "use_dora": False}),
    ({"adapter": "dora"}, "use_dora=false", {"adapter": "lora"}),
    ({"use_dora": True}, "use_peft=false", {"adapter": "none", "use_dora": False}),
    ({"adapter": "none"}, "use_dora=true", {"adapter": "dora"}),
    ({"warmup_ratio": 0.1}, "warmup_steps=5", {"warmup_ratio": 0.0, "warmup_steps": 5}),
    ({"warmup_ratio": 0.1}, "warmup_steps=0", {"warmup_ratio": 0.1, "warmup_steps": 0}),
    ({"max_steps": 9}, "epochs=3", {"max_steps": None, "num_train_epochs": 3.0}),
    ({"max_steps": 9, "epochs": 2}, "max_steps=null", {"max_steps": None, "num_train_epochs": 2.0}),
    (HELD_OUT, "val_set_size=0.1", {"eval_datasets": [], "val_set_size": 0.1}),
    ({"val_size": 5}, "eval_datasets=[a]", {"eval_datasets": [DatasetConfig(path="a")], "val_set_size": 0}),
])  # fmt: skip
def test_an_override_wins_over_every_spelling_in_the_file(given, override, expected):
    config = load_config(BASE | given, [override])
    assert {key: getattr(config, key) for key in expected} == expected


def test_overrides_do_not_excuse_each_other():
    assert "both true" in complaint(BASE, ["load_in_4bit=true", "load_in_8bit=true"])
    assert "both given" in complaint(BASE, ["warmup_steps=3", "warmup_ratio=0.1"])
    assert load_config(BASE, ["load_in_4bit=true", "quant_type=int4"]).quant_type == "int4"


@pytest.mark.parametrize("override, problem", [
    ("lora_r", 'expected key=value, as in learning_rate=1e-4 (got "lora_r")'),
    ("=3", 'expected key=value, as in learning_rate=1e-4 (got "=3")'),
    ("lora_r=12.5", "lora_r: must be a valid integer (got 12.5)"),
    ("lora_r.x=3", "lora_r.x: lora_r has no part `x`"),
    ("use_peft.x=true", "use_peft.x: use_peft has no part `x`"),
    ("lora_target.0=q", "lora_target.0: lora_target has no part `0`"),
    ("datasets.first.weight=2", "datasets.first.weight: datasets has no part `first`"),
    ("datasets.-1.weight=2", "datasets.-1.weight: datasets has no part `-1`"),
    ("datasets.1.weight=2", "datasets.1.weight: the config has no datasets.1 to change"),
    ("eval_datasets.0.weight=2", "eval_datasets.0.weight: the config has no eval_datasets.0 to change"),
    ("mesh={fsdp:8}", "mesh.fsdp:8: lacks a space after the colon"),
    ("rank_pattern={q:8}", "rank_pattern.q:8: lacks a space after the colon"),
    ("lora_target_modules=[q", "lora_target_modules: while parsing a flow sequence, expected ',' or ']'"),
    ("lora_target_modules=[qv]_proj", "lora_target_modules: expected '<document start>'"),
    ("lora_target_modules=*_proj", "lora_target_modules: found undefined alias '_proj'; quotes make it"),
    ("mesh.fsdp=0", "mesh.fsdp: must be a number of devices"),
    ("mesh={fsdp: 1, fsdp: 2}", "mesh: key `fsdp` is given twice"),
    ("--lora_r=8", "--lora_r: unknown key; did you mean `lora_r`?"),
    ("mehs.fsdp=8", "mehs: unknown key; did you mean `mesh`?"),
    ("mesh.fdsp=8", "mesh.fdsp: unknown key; did you mean `fsdp`?"),
    ("datasets.0.wieght.x=8", "datasets.0.wieght: unknown key; did you mean `weight`?"),
])  # fmt: skip
def test_a_wrong_override(override, problem):
    message = complaint(BASE, [override])
    assert message.startswith(f"command line: {problem}")
    assert "\n" not in message
