"""The embedded model and task: as their script makes them, sound, small; and what the quickstart does with them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

import jaxft

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART, MODEL = ROOT / "quickstart", ROOT / "quickstart" / "model"
TRAIN, HELD_OUT = QUICKSTART / "train.jsonl", QUICKSTART / "held_out.jsonl"
SEED = 0

sys.path.insert(0, str(ROOT / "scripts"))
import make_quickstart  # noqa: E402
import quickstart_corpus as corpus  # noqa: E402

sys.path.remove(str(ROOT / "scripts"))


def pairs(path: Path) -> list[tuple[str, str]]:
    """Message and answer of each line."""
    records = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert all([turn["role"] for turn in record] == ["user", "assistant"] for record in records)
    return [(question["content"], answer["content"]) for question, answer in records]


class Reading(NamedTuple):
    """What a message says, read from its text alone."""

    category: str
    urgency: str
    product: str
    phrase: str


def read(message: str) -> Reading:
    products = [product for product in corpus.PRODUCTS if product in message]
    issues = [
        (category, product, phrase)
        for category in corpus.CATEGORIES
        for kind in ("phrases", "new_phrases")
        for phrase in corpus.lines("categories", category, kind)
        for product in products
        if corpus.said(phrase, {"p": product}) in message
    ]
    urgencies = [
        urgency
        for urgency in corpus.URGENCIES
        for phrase in corpus.lines("urgencies", urgency, "phrases")
        if phrase != corpus.SILENCE and corpus.said(phrase, {}) in message
    ]
    assert len(issues) == 1, f"{message!r} says {issues}"
    assert len(urgencies) <= 1, f"{message!r} says {urgencies}"
    (category, product, phrase), urgency = issues[0], (urgencies or ["normal"])[0]
    return Reading(category, urgency, product, phrase)


@pytest.mark.parametrize("path", [TRAIN, HELD_OUT], ids=lambda path: path.stem)
def test_every_label_follows_from_its_message(path):
    for message, label in pairs(path):
        found = read(message)
        assert label == f"category: {found.category} | urgency: {found.urgency} | product: {found.product}"


def test_held_out_messages_say_something_new():
    known = [read(message) for message, _ in pairs(TRAIN)]
    phrases, products = {r.phrase for r in known}, {r.product for r in known}
    joined = {(r.product, r.category) for r in known}
    held_out = [read(message) for message, _ in pairs(HELD_OUT)]
    new_phrase = [r.phrase not in phrases for r in held_out]
    new_product = [r.product not in products for r in held_out]
    new_pair = [(r.product, r.category) not in joined for r in held_out]
    assert all(map(any, zip(new_phrase, new_product, new_pair, strict=True)))
    assert sum(new_phrase) >= 50
    assert sum(new_product) >= 20


def test_pretraining_never_shows_the_answers_form_or_a_held_out_message():
    held_out = {message for message, _ in pairs(HELD_OUT)}
    texts, dialogues = (
        list(corpus.texts(SEED, make_quickstart.TEXTS)),
        list(corpus.dialogues(SEED, make_quickstart.DIALOGUES)),
    )
    assert min(map(len, (held_out, texts, dialogues))) > 100
    for text in texts:
        assert "category:" not in text
    for message, answer in dialogues:
        assert message not in held_out
        assert "category:" not in answer


def test_the_script_makes_the_committed_task(tmp_path):
    make_quickstart.write_task(tmp_path, SEED)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "held_out.jsonl"}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (QUICKSTART / path.name).read_bytes()
    assert (len(pairs(TRAIN)), len(pairs(HELD_OUT))) == (1500, 200)


def test_the_script_makes_the_committed_tokenizer(tmp_path):
    make_quickstart.write_tokenizer(tmp_path, SEED)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes()
    made, committed = (json.loads((where / "tokenizer.json").read_text()) for where in (tmp_path, MODEL))
    for part in ("model", "added_tokens", "pre_tokenizer", "decoder"):
        assert made[part] == committed[part]


def test_transformers_reads_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    specials = tokenizer.convert_ids_to_tokens(range(4))
    assert specials == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    text = "Grüße! The kettle costs 45 euros."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert chat == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_size():
    files = [path for path in QUICKSTART.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".jinja", ".safetensors"}


@pytest.mark.parity
def test_logits_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = np.array([tokenizer(message).input_ids[:16] for message, _ in pairs(TRAIN)[:8] if len(message) > 100])
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = jaxft.load_model(MODEL, "float32")(jnp.asarray(tokens, jnp.int32))
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(logits, expected, atol=5e-4)


def run_quickstart(output: Path, *overrides: str) -> dict:
    """The command of the config, as on a machine with one CPU device; what it recorded at its end."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    arguments = ["--config", "configs/quickstart.yaml", f"output_dir={output}", *overrides]
    ran = subprocess.run(
        [sys.executable, "scripts/train.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert (output / "report.html").exists()
    return json.loads((output / "run.json").read_text())["final"]


@pytest.mark.core
def test_the_quickstart_starts(tmp_path):
    final = run_quickstart(
        tmp_path / "run", "max_steps=3", "exact_match_samples=0", "eval_datasets=[]", "eval_steps=null"
    )
    assert (final["steps"], final["exact_match"]) == (3, None)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("quickstart") / "run"
    return output, run_quickstart(output)


@pytest.mark.slow
def test_the_quickstart_learns(finished):
    _, final = finished
    match = final["exact_match"]
    assert match["examples"] == 200
    assert match["base"] <= 0.05 * 200
    assert match["tuned"] >= 0.9 * 200


@pytest.mark.slow
@pytest.mark.parity
def test_peft_answers_with_the_adapter(finished):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    output, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, output / "adapter")
    asked = pairs(HELD_OUT)[:50]
    chats = [[{"role": "user", "content": message}] for message, _ in asked]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
    )
    written = tuned.generate(**prompts, max_new_tokens=24, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    right = sum(answer == label for answer, (_, label) in zip(answers, asked, strict=True))
    assert right >= 40, "the base is quantized in training and not here: a few answers may differ"
