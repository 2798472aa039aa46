"""The schema: defaults, types, limits, spellings that must agree, secrets, and the way to YAML and back."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import jaxft.config
from jaxft.config import Config, ConfigError, DatasetConfig, MeshConfig
from jaxft.config_file import load_config
from jaxft.config_rules import OF_A_NEW_ADAPTER

BASE = {"model_name_or_path": "org/model", "datasets": ["train.jsonl"], "output_dir": "runs/a"}
HELD_OUT = {"eval_datasets": ["eval.jsonl"]}


def complaint(**given) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(BASE | given)
    return str(caught.value)


def test_defaults():
    # fmt: off
    expected = {
        "dtype": "bfloat16", "adapter": "lora", "lora_r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0,
        "lora_target_modules": "all-linear", "quant_group_size": 64, "max_length": 2048, "packing": False,
        "excess_length_strategy": "drop", "assistant_only_loss": True, "micro_batch_size": 1, "seed": 42,
        "gradient_accumulation_steps": 1, "learning_rate": 2e-4, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "warmup_steps": 0, "optim": "adamw",
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "num_train_epochs": 1.0,
        "max_steps": None, "remat": "full", "offload": [], "max_nonfinite_steps": 5, "logging_steps": 10,
        "report_to": [],
        "save_total_limit": 2, "load_best_model_at_end": True, "exact_match_samples": 0, "val_set_size": 0,
        "max_new_tokens": 128, "eval_datasets": [], "early_stopping_patience": None, "eval_steps": None,
        "resume_from_checkpoint": False, "save_steps": None, "chat_template": None, "quant_type": None,
    }
    # fmt: on
    config = load_config(BASE)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.mesh == MeshConfig(data=-1, fsdp=1, tensor=1)
    assert config.datasets == [DatasetConfig(path="train.jsonl")]
    assert Config(**BASE) == config


@pytest.mark.parametrize("section", [Config, DatasetConfig, MeshConfig])
def test_every_key_explains_itself_in_a_line(section):
    for name, field in section.model_fields.items():
        assert re.fullmatch(r".{10,109}\.", field.description), name


def test_config_is_frozen():
    config = load_config(BASE)
    for section, key in ((config, "lora_r"), (config.datasets[0], "path"), (config.mesh, "fsdp")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 8)


def test_the_schema_imports_its_rules_and_what_a_path_is_alone():
    nodes = list(ast.walk(ast.parse(Path(jaxft.config.__file__).read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert "pydantic" in modules
    ours = [module for module in modules if module.split(".")[0] == "jaxft"]
    assert ours == ["jaxft.config_rules", "jaxft.paths"]


# Types and limits


@pytest.mark.parametrize("key, value, problem", [
    ("lora_r", 12.5, "must be a valid integer (got 12.5)"),
    ("lora_r", 16.0, "must be a valid integer (got 16.0)"),
    ("lora_r", True, "must be a valid integer (got true)"),
    ("lora_r", "8", 'must be a valid integer (got "8")'),
    ("lora_r", None, "must be a valid integer (got null)"),
    ("lora_r", 0, "must be greater than 0 (got 0)"),
    ("lora_alpha", 0, "must be greater than 0 (got 0)"),
    ("lora_dropout", 1, "must be less than 1 (got 1)"),
    ("lora_dropout", -0.1, "must be greater than or equal to 0 (got -0.1)"),
    ("learning_rate", "1e-4", 'must be a valid number (got "1e-4")'),
    ("learning_rate", True, "must be a valid number (got true)"),
    ("learning_rate", 0, "must be greater than 0 (got 0)"),
    ("learning_rate", float("inf"), "must be a finite number (got Infinity)"),
    ("learning_rate", float("nan"), "must be a finite number (got NaN)"),
    ("max_grad_norm", -1, "must be greater than or equal to 0 (got -1)"),
    ("warmup_ratio", 1.5, "must be less than 1 (got 1.5)"),
    ("seed", 2**32, "must be less than 4294967296 (got 4294967296)"),
    ("max_steps", 0, "must be greater than 0 (got 0)"),
    ("quant_group_size", 0, "must be greater than 0 (got 0)"),
    ("quant_group_size", 33, "must be a multiple of 2 (got 33)"),
    ("packing", "true", 'must be true or false (got "true")'),
    ("packing", 1, "must be true or false (got 1)"),
    ("model_revision", 123, "must be a valid string (got 123)"),
    ("model_revision", "", 'must not be empty (got "")'),
    ("model_revision", b"a", "must be a valid string (got a bytes)"),
    ("model_revision", 90 * "x" + "\n", None),
    ("model_revision", ["x"], "must be a valid string (got a list)"),
    ("dtype", "float16", "must be 'float32' or 'bfloat16' (got \"float16\")"),
    ("adapter", "prompt", "must be 'lora', 'dora' or 'none' (got \"prompt\")"),
    ("adapter", ["lora"], "must be 'lora', 'dora' or 'none' (got a list)"),
    ("quant_type", "fp4", "must be 'nf4', 'int4' or 'int8' (got \"fp4\")"),
    ("quant_type", ["nf4"], "must be 'nf4', 'int4' or 'int8' (got a list)"),
    ("optim", "sgd", "must be 'adamw' (got \"sgd\")"),
    ("optim", ["adamw"], "must be 'adamw' (got a list)"),
    ("remat", 90 * "x", f"must be 'none', 'full' or 'dots' or a valid list (got \"{80 * 'x'}\"...)"),
    ("report_to", "mlflow", "must be 'tensorboard', 'wandb' or 'trackio' (got \"mlflow\")"),
    ("report_to", 3, "must be a valid list (got 3)"),
    ("lora_target_modules", 5, "must be a valid list or a valid string (got 5)"),
    ("lora_target_modules", [], "must not be empty or a valid string (got a list)"),
    ("lora_target_modules", "(q", 'is not a regular expression: missing ), unterminated subpattern at '
                                  'position 0 (got "(q")'),
    ("rank_pattern", ["q"], "must be a mapping (got a list)"),
    ("datasets", [], "must not be empty (got a list)"),
    ("datasets", "train.jsonl", 'must be a valid list (got "train.jsonl")'),
    ("val_set_size", True, "must be a valid integer or a valid number (got true)"),
    ("val_set_size", -1, "must be greater than or equal to 0 (got -1)"),
    ("val_set_size", 1.0, "must be a whole number of examples, or a fraction below 1 (got 1.0)"),
    ("val_set_size", 2.5, "must be a whole number of examples, or a fraction below 1 (got 2.5)"),
    ("mesh", 3, "must be a mapping (got 3)"),
    ("mesh", {"data": -1, "fsdp": -1}, "only one axis can be -1, not data and fsdp"),
    ("mesh", {"fsdp": -1, "tensor": -1}, "only one axis can be -1, not fsdp and tensor"),
])  # fmt: skip
def test_a_wrong_value(key, value, problem):
    if problem is None:
        assert getattr(load_config(BASE | {key: value}), key) == value
    else:
        assert complaint(**{key: value}) == f"config: {key}: {problem}"


@pytest.mark.parametrize("given, problem", [
    ({"lora_target_modules": ["q", 5]}, "lora_target_modules.1: must be a valid string (got 5)"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern.q: must be greater than 0 (got 0)"),
    ({"rank_pattern": {"q": 1.5}}, "rank_pattern.q: must be a valid integer (got 1.5)"),
    ({"rank_pattern": {3: 1}}, "rank_pattern.3: must be a valid string (got 3)"),
    ({"alpha_pattern": {"a.q": -1}}, "alpha_pattern.a.q: must be greater than 0 (got -1)"),
    ({"report_to": ["wandb", "x"]}, "report_to.1: must be 'tensorboard', 'wandb' or 'trackio' (got \"x\")"),
    ({"datasets": [3]}, "datasets.0: must be a mapping (got 3)"),
    ({"datasets": ["a", ""]}, 'datasets.1: must not be empty (got "")'),
    ({"datasets": [{"type": "text"}]}, "datasets.0.path: is required"),
    ({"datasets": [{"path": "a", "weight": 0}]}, "datasets.0.weight: must be greater than 0 (got 0)"),
    ({"datasets": [{"path": "a", "max_examples": 0}]},
     "datasets.0.max_examples: must be greater than 0 (got 0)"),
    ({"datasets": [{"path": "a", "type": "csv"}]},
     "datasets.0.type: must be 'messages', 'sharegpt', 'alpaca', 'completion' or 'text' (got \"csv\")"),
    ({"eval_datasets": [{"path": "a", "columns": {"prompt": 1}}]},
     "eval_datasets.0.columns.prompt: must be a valid string (got 1)"),
    ({"mesh": {"fsdp": 0}}, "mesh.fsdp: must be a number of devices, 1 or more, or -1 for the rest (got 0)"),
    ({"mesh": {"fsdp": -2}},
     "mesh.fsdp: must be a number of devices, 1 or more, or -1 for the rest (got -2)"),
    ({"mesh": {"fsdp": 2.0}}, "mesh.fsdp: must be a valid integer (got 2.0)"),
])  # fmt: skip
def test_a_wrong_part(given, problem):
    assert complaint(**given) == f"config: {problem}"


def test_right_values():
    config = load_config(BASE | {"learning_rate": 1, "val_set_size": 100, "lora_target_modules": r".*\.q_proj"})
    assert (config.learning_rate, type(config.learning_rate)) == (1.0, float)
    assert (config.val_set_size, type(config.val_set_size)) == (100, int)
    assert config.lora_target_modules == r".*\.q_proj"
    source = {"path": "a", "type": "alpaca", "split": "test", "name": "x", "weight": 2, "max_examples": 9}
    source["columns"] = {"prompt": "question", "completion": "answer"}
    datasets = load_config(BASE | {"datasets": [source, "b"]}).datasets
    assert datasets == [DatasetConfig(**source), DatasetConfig(path="b")]


@pytest.mark.parametrize("name", ["adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf"])
def test_optimizer_names(name):
    assert load_config(BASE | {"optim": name}).optim == "adamw"


@pytest.mark.parametrize(
    "given, names",
    [("none", []), ("wandb", ["wandb"]), (["trackio", "tensorboard"], ["trackio", "tensorboard"])],
)
def test_report_to(given, names):
    assert load_config(BASE | {"report_to": given}).report_to == names


@pytest.mark.parametrize(
    "given, sizes",
    [
        ({}, (-1, 1, 1, 1, 1)),
        ({"fsdp": 8}, (-1, 8, 1, 1, 1)),
        ({"fsdp": -1}, (1, -1, 1, 1, 1)),
        ({"tensor": -1}, (1, 1, 1, 1, -1)),
        ({"data": 2, "fsdp": -1, "tensor": 4}, (2, -1, 1, 1, 4)),
        ({"expert": 4}, (-1, 1, 4, 1, 1)),
    ],
)
def test_mesh(given, sizes):
    assert tuple(load_config(BASE | {"mesh": given}).mesh.model_dump().values()) == sizes


# One setting, several spellings


@pytest.mark.parametrize(
    "given, quantization",
    [
        ({}, None),
        ({"load_in_4bit": True}, "nf4"),
        ({"load_in_8bit": True}, "int8"),
        ({"quant_type": "nf4"}, "nf4"),
        ({"quant_type": "int4"}, "int4"),
        ({"quant_type": "int8"}, "int8"),
        ({"load_in_4bit": True, "quant_type": "int4", "load_in_8bit": False}, "int4"),
        ({"load_in_4bit": True, "quant_type": None}, "nf4"),
        ({"load_in_8bit": True, "quant_type": "int8"}, "int8"),
        ({"quant_type": "int4", "quant_group_size": 32}, "int4"),
        ({"load_in_4bit": True, "use_double_quant": True}, "nf4"),
    ],
)
def test_quantization(given, quantization):
    config = load_config(BASE | given)
    assert config.quant_type == quantization
    assert config.load_in_4bit is (quantization in ("nf4", "int4"))
    assert config.load_in_8bit is (quantization == "int8")
    assert load_config(config.model_dump()) == config


@pytest.mark.parametrize(
    "given, adapter",
    [
        ({"adapter": "dora"}, "dora"),
        ({"use_dora": True}, "dora"),
        ({"adapter": "lora", "use_dora": True}, "dora"),  # DoRA as PEFT says it
        ({"adapter": "dora", "use_dora": True}, "dora"),
        ({"adapter": "lora"}, "lora"),
        ({"adapter": "none", "use_dora": False}, "none"),
    ],
)
def test_dora(given, adapter):
    config = load_config(BASE | given)
    assert (config.adapter, config.use_dora) == (adapter, adapter == "dora")
    assert load_config(config.model_dump()) == config


@pytest.mark.parametrize("given, problem", [
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit are both true"),
    ({"load_in_4bit": True, "quant_type": "int8"},
     "quant_type is int8, but load_in_4bit is true and load_in_8bit is false"),
    ({"load_in_8bit": True, "quant_type": "nf4"},
     "quant_type is nf4, but load_in_4bit is false and load_in_8bit is true"),
    ({"load_in_4bit": False, "quant_type": "int4"},
     "quant_type is int4, but load_in_4bit is false and load_in_8bit is false"),
    ({"use_double_quant": True}, "use_double_quant belongs to nf4"),
    ({"use_double_quant": True, "quant_type": "int4"}, "use_double_quant belongs to nf4"),
    ({"quant_group_size": 32, "load_in_4bit": True}, "quant_group_size belongs to int4"),
    ({"adapter": "dora", "use_dora": False}, "use_dora is false, but adapter is dora"),
    ({"adapter": "none", "use_dora": True}, "use_dora is true, but adapter is none"),
    ({"adapter": "none", "load_in_8bit": True}, "adapter is none, but quantized weights cannot be trained"),
    ({"adapter": "none", "adapter_name_or_path": "a"}, "adapter is none, so nothing can go on from"),
    ({"adapter_name_or_path": "a", "lora_r": 8}, "lora_r is that of the adapter in adapter_name_or_path"),
    ({"adapter_name_or_path": "a", "lora_target_modules": ["q_proj"]}, "lora_target_modules is that of the adapter"),
    (HELD_OUT | {"val_set_size": 3}, "eval_datasets and val_set_size are both given"),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio and warmup_steps are both given"),
    ({"mask_history": True, "assistant_only_loss": False}, "mask_history learns the last answer only"),
    ({"early_stopping_patience": 3}, "early_stopping_patience needs held-out examples"),
    ({"exact_match_samples": 3}, "exact_match_samples needs held-out examples"),
    ({"eval_steps": 5}, "eval_steps needs held-out examples"),
    ({"adapter": "none", "lora_r": 8}, "lora_r is that of an adapter, but adapter is none"),
    ({"adapter": "none", "lora_alpha": 8}, "lora_alpha is that of an adapter, but adapter is none"),
    ({"adapter": "none", "lora_dropout": 0.1}, "lora_dropout is that of an adapter, but adapter is none"),
    ({"adapter": "none", "use_rslora": True}, "use_rslora is that of an adapter, but adapter is none"),
    ({"adapter": "none", "rank_pattern": {"q_proj": 4}}, "rank_pattern is that of an adapter, but adapter is none"),
    ({"adapter": "none", "lora_target_modules": ["q_proj"]}, "lora_target_modules is that of an adapter"),
    ({"adapter": "none", "remat": ["lora", "mlp"]}, "remat keeps lora, but adapter is none"),
    ({"adapter": "dora", "adapter_name_or_path": "a"}, "adapter and use_dora are those of the adapter in"),
    ({"use_dora": True, "adapter_name_or_path": "a"}, "adapter and use_dora are those of the adapter in"),
    ({"eval_datasets": ["a", {"path": "b", "weight": 2}]}, "weight of eval_datasets.1 has no effect"),
    ({"quant_group_size": 128}, "quant_group_size belongs to int4"),
])  # fmt: skip
def test_contradictions(given, problem):
    message = complaint(**given)
    assert message.startswith(f"config: {problem}")
    assert "\n" not in message
    with pytest.raises(ValidationError) as caught:
        Config(**(BASE | given))
    assert problem in str(caught.value).replace("`", "")


# Keys without an effect


@pytest.mark.parametrize("given, told", [
    ({"max_steps": 5, "num_train_epochs": 3}, ["num_train_epochs has no effect beside max_steps"]),
    ({"max_new_tokens": 9}, ["max_new_tokens has no effect, as the model is asked nothing"]),
    ({"val_set_size": 2, "sample_prompts": 0, "max_new_tokens": 9}, ["max_new_tokens has no effect"]),
    ({"load_best_model_at_end": True}, ["load_best_model_at_end needs held-out examples"]),
    ({"sample_prompts": 3}, ["sample_prompts needs held-out examples"]),
    ({"finetuning_type": "full", "lora_rank": 16, "lora_alpha": 32.0},
     ["lora_rank is that of an adapter", "lora_alpha is that of an adapter"]),
    ({"adapter_name_or_path": "a", "adapter": "lora", "lora_target": "all"},
     ["lora_target is that of the adapter"]),
    ({"quant_type": "nf4", "quant_group_size": 64}, ["quant_group_size belongs to int4"]),
    ({"datasets": [{"path": "a", "weight": 2}]}, ["weight of datasets.0 has no effect"]),
    ({"lora_r": 64}, ["lora_alpha is not given, so it is 32, whatever lora_r is (64 here)"]),
    ({"lora_r": 64, "lora_alpha": 16}, []),
    ({"lora_r": 16}, []),
    ({"val_set_size": 2, "exact_match_samples": 3, "sample_prompts": 0, "max_new_tokens": 9}, []),
    ({"adapter": "none", "use_rslora": False, "lora_dropout": 0.0, "load_best_model_at_end": False,
      "exact_match_samples": 0, "eval_steps": None, "use_dora": False}, []),
    ({"datasets": [{"path": "a", "weight": 2}, {"path": "b", "weight": 1}]}, []),
])  # fmt: skip
def test_what_is_given_and_has_no_effect_is_told(caplog, given, told):
    load_config(BASE | given)
    assert len(caplog.messages) == len(told)
    for message, beginning in zip(caplog.messages, told, strict=True):
        assert message.startswith(beginning)


@pytest.mark.parametrize("override", ["adapter=none", "finetuning_type=full", "adapter_name_or_path=a"])
def test_the_command_line_takes_back_what_has_no_effect_with_it(caplog, override):
    given = {"lora_r": 8, "lora_alpha": 16, "use_rslora": False}
    config = load_config(BASE | given, [override])
    assert config == load_config(BASE, [override])
    key = override.partition("=")[0].replace("finetuning_type", "adapter")
    assert caplog.messages == [f"{key} on the command line: lora_r, lora_alpha of config no longer apply"]
    assert "lora_r is that of" in complaint(**given, **{key: "none" if key == "adapter" else "a"})
    with pytest.raises(ConfigError, match="lora_r is that of"):
        load_config(BASE, [override, "lora_r=8"])


def test_the_command_line_may_set_a_key_back(caplog):
    load_config(BASE | {"lora_r": 8, "lora_alpha": 16}, ["adapter=none", "lora_r=16", "lora_alpha=32"])
    assert not caplog.messages
    load_config(BASE, ["max_new_tokens=9"])
    assert caplog.messages == ["max_new_tokens has no effect, as the model is asked nothing"]


@pytest.mark.parametrize(
    "given, without",
    [
        ({"max_steps": 5}, {"num_train_epochs"}),
        ({"adapter": "none"}, {*OF_A_NEW_ADAPTER}),
        ({"adapter_name_or_path": "a"}, {"adapter", "use_dora", *OF_A_NEW_ADAPTER}),
        ({"load_in_8bit": True}, set()),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_what_has_no_effect_is_a_comment_in_a_written_config(tmp_path, caplog, given, without, held_out):
    idle = without | {"quant_group_size"}
    if not held_out:
        idle |= {"early_stopping_patience", "exact_match_samples", "eval_steps", "sample_prompts", "max_new_tokens"}
        idle |= {"load_best_model_at_end"}
    config = load_config(BASE | given | (HELD_OUT if held_out else {}))
    text = config.to_yaml()
    assert set(re.findall(r"^(\w+):", text, re.MULTILINE)) == {*Config.model_fields} - idle
    assert set(re.findall(r"^# (\w+) .{10,}", text, re.MULTILINE)) == idle
    (tmp_path / "dump.yaml").write_text(text)
    caplog.clear()
    assert load_config(tmp_path / "dump.yaml") == config
    assert not caplog.messages


def test_a_written_config_shows_the_adapter_it_goes_on_from():
    config = load_config(BASE | {"adapter_name_or_path": "a"})
    text = config.to_yaml({"use_dora": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v\n_proj"]})
    assert "# use_dora: true is that of the adapter in adapter_name_or_path\n" in text
    assert "# lora_r: 8 is that of the adapter in adapter_name_or_path\n" in text
    assert '# lora_target_modules: ["q_proj", "v\\n_proj"] is that of' in text
    assert "# lora_alpha is that of" in text


def test_contradictions_are_reported_together():
    assert len(complaint(load_in_4bit=True, adapter="none", exact_match_samples=2).splitlines()) == 2


@pytest.mark.parametrize("held_out", [HELD_OUT, {"val_set_size": 0.1}, {"val_set_size": 10}])
def test_what_held_out_examples_allow(held_out):
    config = load_config(BASE | held_out | {"early_stopping_patience": 3, "exact_match_samples": 4})
    assert (config.early_stopping_patience, config.exact_match_samples) == (3, 4)


# Secrets: every canary holds CaNaRy, and no message may


@pytest.mark.parametrize("secret", [
    "hf_" + "CaNaRy" * 5, "sk-proj-" + "CaNaRy1" * 4, "ghp_" + "CaNaRy1" * 5, "https://user:CaNaRy@host/x",
    "https://CaNaRy@host/x", "https://host/x.jsonl?a=1&token=CaNaRy",
])  # fmt: skip
@pytest.mark.parametrize("place", [
    lambda secret: {"model_name_or_path": secret},
    lambda secret: {"adapter_name_or_path": secret},
    lambda secret: {"output_dir": f"runs/{secret}"},
    lambda secret: {"datasets": ["a", secret]},
    lambda secret: {"datasets": [{"path": secret}]},
    lambda secret: {"datasets": [{"path": "a", "columns": {"prompt": secret}}]},
    lambda secret: {"lora_target_modules": ["q", secret]},
    lambda secret: {"rank_pattern": {secret: 3}},
])  # fmt: skip
def test_a_secret_is_refused_as_a_value_and_not_shown(place, secret):
    message = complaint(**place(secret))
    assert "looks like a token or a login" in message
    assert "CaNaRy" not in message
    with pytest.raises(ValidationError) as caught:
        Config(**(BASE | place(secret)))
    assert "CaNaRy" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "org/hf_model",
        "hf_cache/train.jsonl",
        "sk-learn",
        "gs://bucket/a@1",
        "https://host/a@b?split=x",
        "a" * 40,
    ],
)
def test_what_is_no_secret_is_let_through(text):
    assert load_config(BASE | {"model_revision": text}).model_revision == text


# Paths

PLACES = {
    "model_name_or_path": lambda text: {"model_name_or_path": text},
    "adapter_name_or_path": lambda text: {"adapter_name_or_path": text},
    "chat_template": lambda text: {"chat_template": text},
    "output_dir": lambda text: {"output_dir": text},
    "datasets.0": lambda text: {"datasets": [text]},
    "eval_datasets.0.path": lambda text: {"eval_datasets": [{"path": text}]},
}


@pytest.mark.parametrize("key", PLACES)
def test_home_is_meant_by_a_tilde_wherever_a_path_is(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/me")
    same = ("a/~/b", "./~", "a~")
    for text, expected in {"~": "/home/me", "~/a b": "/home/me/a b", **dict(zip(same, same, strict=True))}.items():
        config = load_config(BASE | PLACES[key](text))
        value = config.model_dump()
        for part in key.split("."):
            value = value[int(part) if part.isdigit() else part]
        assert (value["path"] if part == "0" else value) == expected
        assert load_config(config.model_dump()) == config
    assert f"{key}: ~nobody-here is nobody's home here" in complaint(**PLACES[key]("~nobody-here/x"))


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize(
    "address, advice",
    [
        ("gs://bucket/run", "gcsfuse BUCKET DIR"),
        ("gs:/bucket/run", "gcloud storage cp -r"),
        ("S3://bucket/run", "aws s3 cp --recursive"),
        ("hf://buckets/me/run", "give ORG/NAME"),
        ("abfss://box/run", "mount it, or copy from or to it"),
        ("https://host/x", "download it"),
        ("file:///data/x", "leave `file://` out"),
    ],
)
def test_an_address_is_no_path(key, address, advice):
    message = complaint(**PLACES[key](address))
    scheme = address.partition(":")[0].lower()
    assert f"{key}: is an address ({scheme}://), and files are read and written in directories here: " in message
    assert advice in message
    assert f'(got "{address}")' in message


@pytest.mark.parametrize("key", ["model_name_or_path", "output_dir", "adapter_name_or_path"])
@pytest.mark.parametrize("path, variable", [("$SCRATCH/run", "$SCRATCH"), ("${SLURM_TMPDIR}", "${SLURM_TMPDIR}")])
def test_a_variable_is_no_path(path, variable, key):
    """The directory of that name would be made here, and not be where the run is looked for."""
    message = complaint(**{key: path})
    assert f"{key}: {variable} is not replaced here; write it out, or give the key on the command line" in message
    for kept in (f"./{path}", f"a/{path}", "$5 a day", "cost$"):
        assert load_config(BASE | {key: kept}).model_dump()[key] == kept


# To YAML and back


def test_dump_of_every_key(tmp_path):
    given = {"quant_type": "int4", "use_dora": True, "rank_pattern": {"a.b": 3}, "model_revision": "1e-4"}
    config = load_config(BASE | HELD_OUT | given)
    text = config.to_yaml()
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == [*Config.model_fields]
    (tmp_path / "dump.yaml").write_text(text)
    again = load_config(tmp_path / "dump.yaml")
    assert again == config
    assert again.model_revision == "1e-4"
    assert again.to_yaml() == text


# fmt: off
TEXT = st.text(min_size=1, max_size=12) | st.sampled_from([
    "1e-4", "1E4", "2.e-5", ".inf", ".nan", "-.5", "12", "010", "0x1F", "1_000", "no", "on", "true", "null",
    "~", "2024-01-01", "12:30", "<<", "=", "-", "? a", "- a", "a: b", "a #b", "#", "&a", "*a", "!a", "|", ">",
    "%a", "@a", "`a", "'", '"', "''", " a ", "a\n", "\n a", "\r\n", "\t", "\x85", "\u2028", "\ufeff", "\0",
    "é😀", "word " * 40,
])
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
COUNT = st.integers(1, 10**12)
OF_A_SOURCE = {
    "type": st.sampled_from([None, "messages", "sharegpt", "alpaca", "completion", "text"]),
    "split": st.none() | TEXT,
    "columns": st.dictionaries(TEXT, TEXT, max_size=3),
    "max_examples": st.none() | COUNT,
}
UNWEIGHTED = TEXT | st.fixed_dictionaries({"path": TEXT}, optional=OF_A_SOURCE)
SOURCE = UNWEIGHTED | st.fixed_dictionaries({"path": TEXT, "weight": POSITIVE}, optional=OF_A_SOURCE)
METHOD = st.sampled_from([
    {}, {"load_in_4bit": True, "adapter": "dora"}, {"load_in_8bit": True, "use_dora": True},
    {"quantization_bit": 4, "use_double_quant": True}, {"quant_type": "int4", "quant_group_size": 128},
    {"quant_type": None, "adapter": "lora"}, {"finetuning_type": "full"}, {"use_peft": True},
])
EVALUATION = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"eval_datasets": st.lists(UNWEIGHTED, min_size=1, max_size=2)},
                          optional={"early_stopping_patience": COUNT, "eval_steps": COUNT}),
    st.fixed_dictionaries({"val_set_size": COUNT | st.floats(0.001, 0.999)},
                          optional={"exact_match_samples": COUNT}),
)
WARMUP = st.one_of(
    st.fixed_dictionaries({"warmup_ratio": st.floats(0, 0.99)}),
    st.fixed_dictionaries({"warmup_steps": COUNT}),
)
REST = st.fixed_dictionaries({
    "model_name_or_path": TEXT, "datasets": st.lists(SOURCE, min_size=1, max_size=3), "output_dir": TEXT,
}, optional={
    "model_revision": st.none() | TEXT,
    "lora_r": COUNT,
    "lora_alpha": POSITIVE | COUNT,
    "lora_target_modules": st.lists(TEXT, min_size=1, max_size=3) | TEXT.map(re.escape),
    "rank_pattern": st.dictionaries(TEXT, COUNT, max_size=3),
    "alpha_pattern": st.dictionaries(TEXT, POSITIVE, max_size=3),
    "learning_rate": POSITIVE,
    "max_steps": st.none() | COUNT,
    "train_on_inputs": st.booleans(),
    "gradient_checkpointing": st.booleans(),
    "report_to": st.sampled_from(["none", "wandb", ["tensorboard", "wandb"], []]),
    "mesh": st.sampled_from([{}, {"fsdp": -1}, {"data": 2, "tensor": -1}, {"data": 1, "fsdp": 2}]),
    "seed": st.integers(0, 2**32 - 1),
})
# fmt: on


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parts=st.tuples(REST, METHOD, EVALUATION, WARMUP))
def test_any_valid_config_dumps_and_loads_to_an_equal_one(tmp_path, parts):
    source = {key: value for part in parts for key, value in part.items()}
    if source.get("finetuning_type") == "full":
        source = {key: value for key, value in source.items() if key not in OF_A_NEW_ADAPTER}
    config = load_config(source)
    path = tmp_path / "dump.yaml"
    path.write_bytes(config.to_yaml().encode())
    again = load_config(path)
    assert again == config
    assert again.learning_rate == source.get("learning_rate", 2e-4)
    assert again.to_yaml() == config.to_yaml()
