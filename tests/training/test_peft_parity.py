"""Fifty updates beside PEFT and torch: same model, adapter, batches, AdamW and schedule; same losses, same adapter."""

import json

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxft
from jaxft.adapters.attach import attach, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.config import Config
from jaxft.data.batch import Batch
from jaxft.models.linear import Adapter
from jaxft.objectives.sft import Sft
from jaxft.training.optimizer import make_optimizer
from jaxft.training.state import Partition
from jaxft.training.step import initial_state, make_train_step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

STEPS, ACCUMULATION, ROWS, LENGTH = 50, 2, 2, 48
SETTINGS = dict(learning_rate=1e-3, weight_decay=0.01, warmup_steps=5, lr_scheduler_type="cosine", max_grad_norm=1.0)


def gsm8k_batches(material, model_dir) -> Batch:
    """[steps, accumulation, rows, length] of padded GSM8K examples, the answer supervised."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    shape = (STEPS, ACCUMULATION, ROWS, LENGTH)
    tokens, mask, segments = (np.zeros(shape, np.int32).reshape(-1, LENGTH) for _ in range(3))
    with open(material / "data/gsm8k/train.jsonl") as lines:
        for row, line in zip(range(len(tokens)), lines, strict=False):
            record = json.loads(line)
            prompt = tokenizer(record["question"][-80:])["input_ids"]
            whole = (prompt + tokenizer(record["answer"])["input_ids"])[:LENGTH]
            tokens[row, : len(whole)] = whole
            mask[row, len(prompt) : len(whole)] = 1
            segments[row, : len(whole)] = 1
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    return Batch(tokens.reshape(shape), mask.reshape(shape).astype(bool), segments.reshape(shape), positions)


def torch_run(model_dir, adapter_dir, batches: Batch) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same run in PEFT, dividing by all supervised tokens of an update."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=SETTINGS["learning_rate"], weight_decay=SETTINGS["weight_decay"])
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, SETTINGS["warmup_steps"], STEPS)
    losses = []
    for step in range(STEPS):
        labels = np.where(batches.loss_mask[step], batches.tokens[step], -100)[:, :, 1:]
        count, total = (labels != -100).sum(), 0.0
        for micro in range(ACCUMULATION):
            tokens, mask = (
                torch.tensor(batches.tokens[step, micro]),
                torch.tensor(batches.segment_ids[step, micro]),
            )
            logits = model(tokens, attention_mask=mask).logits[:, :-1]
            target = torch.tensor(labels[micro]).long()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, SETTINGS["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    state = peft.get_peft_model_state_dict(model)
    return losses, {name: value.numpy() for name, value in state.items()}


@pytest.mark.parity
@pytest.mark.slow
def test_fifty_updates_equal_peft(material, smollm2, tmp_path):
    config = Config(model_name_or_path=str(smollm2), output_dir="x", datasets=[{"path": "x"}], **SETTINGS)
    model = attach(jaxft.load_model(smollm2), LoraConfig(r=8, lora_alpha=16), jax.random.key(0))
    jaxft.save_adapter(model, tmp_path / "start")
    batches = gsm8k_batches(material, smollm2)

    partition = Partition(model, Adapter)
    trained, frozen = partition.split(model)
    optimizer = make_optimizer(config, STEPS, partition.names)
    state = initial_state(trained, optimizer)
    step = make_train_step(partition, Sft(), optimizer, state)
    ours = []
    for index in range(STEPS):
        state, metrics = step(state, frozen, Batch(*(field[index] for field in batches)))
        ours.append(float(metrics.loss))
    tuned = factors_of(partition.join(state.trained, frozen))

    theirs, adapter = torch_run(smollm2, tmp_path / "start", batches)
    assert theirs[-1] < 0.9 * theirs[0], "the run should learn something"
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    for module, factors in tuned.items():
        for part, name in ((factors.A, "lora_A"), (factors.B, "lora_B")):
            expected = adapter[f"base_model.model.{module}.{name}.weight"]
            error = np.linalg.norm(part - expected) / np.linalg.norm(expected)
            assert error < 1e-3, f"{module}.{name}: relative error {error:.1e}"
