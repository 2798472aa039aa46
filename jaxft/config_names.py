"""What other trainers call our keys and values.

A name or value that stands in these tables means here what it means in PEFT, TRL, axolotl or LLaMA-Factory. One that
they know and that has no counterpart here is an error that says what to do instead (`ELSEWHERE`, `ADVICE`), unless it
is switched off (`OFF`): then it asks for nothing.
"""

import re
from typing import Any

Settings = dict[str, Any]
"""Our keys and their values; empty: what is asked for is what happens anyway."""

#: Other trainers' names for our keys.
ALIASES: dict[str, str] = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "revision": "model_revision",
    "torch_dtype": "dtype",
    "bnb_4bit_compute_dtype": "dtype",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "use_double_quant",
    "double_quantization": "use_double_quant",
    "use_bnb_nested_quant": "use_double_quant",
    "peft_use_dora": "use_dora",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "peft_use_rslora": "use_rslora",
    "lora_model_dir": "adapter_name_or_path",
    "test_datasets": "eval_datasets",
    "val_size": "val_set_size",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "chat_template_path": "chat_template",
    "chat_template_jinja": "chat_template",
    "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "micro_batch_size",
    "clip_grad_norm": "max_grad_norm",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
}

#: Other trainers' keys whose values differ from ours too: value there -> what it means here.
TRANSLATIONS: dict[str, dict[str | int | bool | None, Settings]] = {
    "quantization_bit": {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}},
    "quantization_method": {"bnb": {}, "bitsandbytes": {}},
    "finetuning_type": {"lora": {"adapter": "lora"}, "full": {"adapter": "none"}, "none": {"adapter": "none"}},
    "use_peft": {True: {"adapter": "lora"}, False: {"adapter": "none"}},
    "lora_target_linear": {True: {"lora_target_modules": "all-linear"}, False: {}},
    "bf16": {True: {"dtype": "bfloat16"}, "auto": {}, False: {"dtype": "float32"}, None: {}},
    "pure_bf16": {True: {"dtype": "bfloat16"}, False: {}},
    "train_on_inputs": {True: {"assistant_only_loss": False}, False: {"assistant_only_loss": True}},
    "train_on_prompt": {True: {"assistant_only_loss": False}, False: {"assistant_only_loss": True}},
    "use_dft_loss": {True: {"loss_type": "dft"}, False: {"loss_type": "nll"}},
    "gradient_checkpointing": {True: {"remat": "full"}, False: {"remat": "none"}},
    "activation_offloading": {True: {"offload": ["activations"]}, False: {"offload": []}},
    "save_strategy": {"epoch": {"save_steps": None}, "steps": {}},
    "eval_strategy": {"epoch": {"eval_steps": None}, "steps": {}, "no": {"eval_datasets": [], "val_set_size": 0}},
    "evaluation_strategy": {"epoch": {"eval_steps": None}, "steps": {}, "no": {"eval_datasets": [], "val_set_size": 0}},
    "logging_strategy": {"steps": {}},
    "metric_for_best_model": {"eval_loss": {}, "loss": {}, None: {}},
    "stage": {"sft": {}},
    "do_train": {True: {}},
    "task_type": {"CAUSAL_LM": {}},
    "peft_type": {"LORA": {}},
    "bias": {"none": {}},
    "init_lora_weights": {True: {}},
}

#: A value of such a key that says half: the key that it cannot do without.
NEEDS: dict[tuple[str, str], str] = {
    ("save_strategy", "steps"): "save_steps",
    ("eval_strategy", "steps"): "eval_steps",
    ("evaluation_strategy", "steps"): "eval_steps",
}

_BF16, _F32 = {"dtype": "bfloat16"}, {"dtype": "float32"}

#: Our keys with the values of other trainers: value there -> what it means here.
VALUES: dict[str, dict[str | int | bool | None, Settings]] = {
    "adapter": {"qlora": {"adapter": "lora", "load_in_4bit": True}},
    "dtype": {"torch.bfloat16": _BF16, "bf16": _BF16, "torch.float32": _F32, "fp32": _F32, "float": _F32},
    "lora_target_modules": {"all": {"lora_target_modules": "all-linear"}},
    "chat_template": {"tokenizer_default": {"chat_template": None}},
    "lr_scheduler_type": {"constant_with_warmup": {"lr_scheduler_type": "constant"}},
    "max_steps": {-1: {"max_steps": None}},
    "resume_from_checkpoint": {None: {"resume_from_checkpoint": False}},
}

OFF = (None, 0, "", "none", "no")
"""Values of a key in `ELSEWHERE` that ask for nothing, false among them; so do an empty list and an empty mapping."""

_ATTENTION = "which kernel computes attention is the choice of `attn_implementation`, by default the best one; drop it"
_DROP = "nothing here depends on it; drop it"
_TYPES = "the kind of model and of tokenizer is told by their own files; drop it"
_HELD_OUT = "what is held out by `val_set_size` or `eval_datasets` is evaluated; drop it"
_MODULES = "beside an adapter no module is trained whole; list it in `lora_target_modules`, or set adapter: none"
_SHARDING = "devices share a model by `mesh`, as in mesh: {fsdp: -1}; drop it"
_PER_EPOCH = "give the number of updates instead: "
_WANDB = "set `report_to: wandb`; the rest comes from the environment (WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID)"
_HUB = "nothing is pushed; when the run has ended: hf upload NAME {output_dir}/adapter"
_FP16 = "float16 overflows where bfloat16 does not, and is not offered; set dtype: bfloat16, or float32"
_SOURCES = "sources are a list: `datasets: [{path: train.jsonl}]`, with `split` and `name` in it for a hub dataset"
_TEMPLATE = "the model's own chat template is used; drop it, or set `chat_template` to chatml or a Jinja file"
_INIT = "adapters begin as PEFT's default does; drop it"
_SPECIAL = "special tokens are those of the tokenizer's own files; drop it, or set them there"
_SCHEDULE = "after warm-up the learning rate goes down to 0, or stays, as `lr_scheduler_type` says; drop it"

#: Keys of other trainers without a counterpart -> what to do.
ELSEWHERE: dict[str, str] = {
    "fp16": _FP16,
    "float16": _FP16,
    "tf32": "products are as exact as `dtype` says; drop it",
    "upcast_layernorm": "norms are computed in float32 in any case; drop it",
    "trust_remote_code": "code that comes with a model is never run, and none is needed; drop it",
    "model_type": _TYPES,
    "tokenizer_type": _TYPES,
    "tokenizer_name": _TYPES,
    "tokenizer_config": _TYPES,
    "strict": "keys are always checked; drop it",
    "special_tokens": _SPECIAL,
    "tokens": _SPECIAL,
    "eos_token": _SPECIAL,
    "pad_token": _SPECIAL,
    "template": _TEMPLATE,
    "dataset": _SOURCES,
    "dataset_name": _SOURCES,
    "dataset_config": _SOURCES,
    "dataset_train_split": _SOURCES,
    "dataset_test_split": _SOURCES + "; what is held out goes into `eval_datasets`",
    "eval_dataset": _SOURCES.replace("datasets:", "eval_datasets:"),
    "dataset_dir": _SOURCES,
    "dataset_text_field": "name the column in the source: `columns: {text: NAME}`",
    "dataset_prepared_path": "examples are tokenized anew at each start; drop it",
    "max_samples": "say it of a source: `datasets: [{path: train.jsonl, max_examples: 1000}]`",
    "shuffle_merged_datasets": "sources are always shuffled together; drop it",
    "pad_to_sequence_len": "packed rows are `max_length` long, others as long as the longest example; drop it",
    "group_by_length": "rows are not sorted by length; set `packing: true`, which wastes less",
    "eval_sample_packing": "held-out examples are always packed, which changes no loss; drop it",
    "eval_packing": "held-out examples are always packed, which changes no loss; drop it",
    "packing_strategy": "rows are filled by best fit; drop it",
    "padding_free": "set `packing: true`",
    "per_device_eval_batch_size": "held-out rows come as `micro_batch_size` says; drop it",
    "eval_batch_size": "held-out rows come as `micro_batch_size` says; drop it",
    "do_eval": _HELD_OUT,
    "eval_on_start": "what is held out is evaluated before the first update, too; drop it",
    "greater_is_better": "the lowest held-out loss is the best; drop it",
    "evals_per_epoch": _PER_EPOCH + "`eval_steps`; null is once an epoch",
    "saves_per_epoch": _PER_EPOCH + "`save_steps`; null is once an epoch",
    "eval_table_size": "set `sample_prompts`: as many held-out prompts are answered in the report",
    "modules_to_save": _MODULES,
    "lora_modules_to_save": _MODULES,
    "additional_target": _MODULES,
    "unfrozen_parameters": "with adapter: none all weights are trained, with an adapter none of them; drop it",
    "lora_fan_in_fan_out": "how a family stores its weights is known; drop it",
    "fan_in_fan_out": "how a family stores its weights is known; drop it",
    "pissa_init": _INIT,
    "loftq_config": _INIT,
    "loraplus_lr_ratio": "all factors have one learning rate; drop it",
    "layers_to_transform": "name them in `lora_target_modules`, as a regex: .*layers\\.(0|1)\\..*q_proj",
    "neftune_noise_alpha": "no noise is added to embeddings; drop it",
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "enable_liger_kernel": "the loss never holds the logits in any case; drop it",
    "use_liger_kernel": "the loss never holds the logits in any case; drop it",
    "plugins": "there are no plugins; drop it",
    "torch_compile": "everything is compiled by XLA; drop it",
    "gradient_checkpointing_kwargs": "`remat` says it all; drop it",
    "deepspeed": _SHARDING,
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "ddp_timeout": _DROP,
    "ddp_find_unused_parameters": _DROP,
    "local_rank": "processes find each other as docs/launching.md says; drop it",
    "lr_scheduler_kwargs": _SCHEDULE,
    "cosine_min_lr_ratio": _SCHEDULE,
    "data_seed": "`seed` fixes the order of the data, too; drop it",
    "overwrite_cache": _DROP,
    "overwrite_output_dir": "an output_dir that holds something is never overwritten; choose another, or remove it",
    "preprocessing_num_workers": _DROP,
    "dataset_num_proc": _DROP,
    "dataset_processes": _DROP,
    "dataloader_num_workers": _DROP,
    "dataloader_pin_memory": _DROP,
    "remove_unused_columns": _DROP,
    "plot_loss": "the curves are in report.html; drop it",
    "logging_first_step": "set `logging_steps: 1`, or drop it",
    "logging_dir": "logs go to `output_dir`; drop it",
    "run_name": "a run is called as its `output_dir` is; drop it",
    "save_only_model": "a checkpoint holds what a run needs to go on; drop it",
    "save_safetensors": "nothing else is written; drop it",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "use_wandb": _WANDB,
    "wandb_project": _WANDB,
    "wandb_entity": "set WANDB_ENTITY in the environment",
    "wandb_name": _WANDB,
    "wandb_run_id": _WANDB,
    "wandb_watch": _WANDB,
    "wandb_log_model": _WANDB,
    "rl": "preferences are not learned, only examples; drop it, and give `datasets` of examples",
}

_OPTIMIZER = "the optimizer is AdamW; `offload: [optimizer]` keeps its state in the memory of the host"
_FORMAT = "leave `type` out, and the format is found and told; `columns` names other columns"

#: Our key -> values that people bring along (a regular expression for how they are written), and what to do.
ADVICE: dict[str, tuple[tuple[str, str], ...]] = {
    "attn_implementation": ((r"flash.*|sdpa|eager|fa2|xformers", "auto takes the best kernel there is"),),
    "dtype": ((r"auto", "leave it out for bfloat16"), (r"torch\.float16|fp16|half", _FP16)),
    "eval_steps": ((r"0?\.\d+", "it is a number of updates, not a fraction of the run"),),
    "save_steps": ((r"0?\.\d+", "it is a number of updates, not a fraction of the run"),),
    "logging_steps": ((r"0?\.\d+", "it is a number of updates, not a fraction of the run"),),
    "warmup_steps": ((r"0?\.\d+", "a fraction of the run is `warmup_ratio`"),),
    "optim": ((r".*(8bit|8_bit|4bit|paged|lion|adafactor|muon|galore|apollo|schedule_free).*", _OPTIMIZER),),
    "remat": ((r"unsloth|offload.*", "`offload: [activations]` keeps them in the memory of the host"),),
    "report_to": ((r"null|all", "name those you want, or none"),),
    "resume_from_checkpoint": (
        (r".*[/\d].*", "true goes on from the newest checkpoint in `output_dir`, which is the one of that run"),
    ),
    "save_total_limit": ((r"null", "all are kept where it is larger than their number"),),
    "type": (
        (r"chat_template.*", "conversations with role and content are `messages`; " + _FORMAT),
        (r"(alpaca|sharegpt|completion|text|input_output|gpteacher|oasst|chatml|pygmalion|context_qa)\S*", _FORMAT),
    ),
}

_FIELDS = "`columns` says how the file calls them, as in columns: {messages: conversations}"
#: Keys of a source elsewhere -> what to do.
OF_A_SOURCE: dict[str, str] = {
    "field_messages": _FIELDS,
    "field": _FIELDS,
    "message_field_role": "role and content, and from and value, are known; drop it",
    "message_field_content": "role and content, and from and value, are known; drop it",
    "message_property_mappings": "role and content, and from and value, are known; drop it",
    "conversation": _TEMPLATE,
    "chat_template": "say it of the whole run; all sources have one template",
    "roles_to_train": "the assistant's turns are learned, or with `assistant_only_loss: false` all tokens; drop it",
    "train_on_eos": "the end of a learned turn is learned; drop it",
    "ds_type": "what a file holds is told by its name; drop it",
    "data_files": "give the file as `path`",
    "shards": "`max_examples` reads a part",
    "num_samples": "`max_examples` reads a part",
    "ratio": "`weight` says how often a source comes, relative to the others",
    "trust_remote_code": "code that comes with a dataset is never run; drop it",
}

_NAME = re.compile(r"[A-Za-z]\w*(\.\w+)*")


def meaning(key: str, value: Any) -> Settings:
    """What a value of our key says, however it is spelt."""
    for theirs, settings in VALUES.get(key, {}).items():
        if theirs == value and type(theirs) is type(value):
            return settings
    if key == "lora_target_modules" and isinstance(value, str):
        names = [name.strip() for name in value.split(",")]
        if all(map(_NAME.fullmatch, names)) and (len(names) > 1 or "." not in value):
            return {key: names}
    return {key: value}


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing."""
    return value in ([], {}, *OFF)


def advice(key: str, value: Any) -> str:
    """What to do about a wrong value of our key, if it is one that people bring along; else nothing."""
    written = "null" if value is None else str(value)
    return next((text for pattern, text in ADVICE.get(key, ()) if re.fullmatch(pattern, written)), "")
