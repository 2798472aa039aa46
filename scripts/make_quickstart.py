"""Make what `configs/quickstart.yaml` trains: a small base model with its tokenizer, and the messages of a task.

    python scripts/make_quickstart.py

writes `quickstart/` anew, from nothing but a seed. `quickstart_corpus` gives the texts and the messages; a byte-level
BPE tokenizer is trained on the texts, and a Llama with random weights is pre-trained on them by jaxft itself, as
`configs/quickstart_pretrain.yaml` says. That takes minutes, all else seconds.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import quickstart_corpus as corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import jaxft
from jaxft.data.templates import CHATML
from jaxft.hub.checkpoint import write_checkpoint
from jaxft.models.decoder import initialize, parameters
from jaxft.models.hf_config import decoder_config

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING = ROOT / "configs" / "quickstart_pretrain.yaml"
TEXTS, DIALOGUES = 20_000, 14_000
TOKENIZED_TEXTS, TOKENIZED_DIALOGUES = 3000, 2000
VOCABULARY = 1280
SPECIAL_TOKENS = END_OF_TEXT, TURN, END_OF_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
INITIAL_SCALE = 0.06

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
    "dtype": "float32",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the base model and the task of the quickstart.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "quickstart", help="its files are replaced")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quickstart-pretrain", help="must not exist yet")
    parsed = parser.parse_args(arguments)
    output, work, seed = parsed.output, parsed.work, parsed.seed
    if work.exists():
        parser.error(f"{work} is there already; remove it, or give another --work")
    write_corpus(work, seed)
    write_initial_model(work / "initial", seed)
    jaxft.train(
        PRETRAINING,
        model_name_or_path=work / "initial",
        datasets=[{"path": work / name} for name in ("texts.jsonl", "dialogues.jsonl")],
        output_dir=work / "run",
        seed=seed,
    )
    write_task(output, seed)
    shutil.copytree(work / "run" / "model", output / "model", dirs_exist_ok=True)


def write_corpus(directory: Path, seed: int) -> None:
    """`texts.jsonl` and `dialogues.jsonl`, for pre-training."""
    directory.mkdir(parents=True)
    write_jsonl(directory / "texts.jsonl", ({"text": text} for text in corpus.texts(seed, TEXTS)))
    write_jsonl(directory / "dialogues.jsonl", map(conversation, corpus.dialogues(seed, DIALOGUES)))


def write_task(directory: Path, seed: int) -> None:
    """`train.jsonl` and `held_out.jsonl`: a customer's message, and one line that says what it is about."""
    directory.mkdir(parents=True, exist_ok=True)
    write_jsonl(directory / "train.jsonl", map(conversation, corpus.task(seed, "train").items()))
    write_jsonl(directory / "held_out.jsonl", map(conversation, corpus.task(seed, "held out").items()))


def conversation(turns: tuple[str, str]) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]}


def write_initial_model(directory: Path, seed: int) -> None:
    """A model directory with random weights."""
    directory.mkdir(parents=True)
    write_tokenizer(directory, seed)
    write_json(directory / "config.json", MODEL)
    ends = [SPECIAL_TOKENS.index(END_OF_TURN), SPECIAL_TOKENS.index(END_OF_TEXT)]
    write_json(directory / "generation_config.json", {"eos_token_id": ends, "pad_token_id": MODEL["pad_token_id"]})
    weights = {}
    for parameter, variable in parameters(initialize(decoder_config(MODEL), jax.random.key(seed), scale=INITIAL_SCALE)):
        value = variable.get_value()
        weights |= zip(parameter.names, [value] if parameter.layers is None else value, strict=True)
    write_checkpoint(directory, weights, weights.__getitem__)


def write_tokenizer(directory: Path, seed: int) -> None:
    """A byte-level BPE tokenizer of the corpus and a chat template, as transformers reads them."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = (turn for dialogue in corpus.dialogues(seed, TOKENIZED_DIALOGUES) for turn in dialogue)
    tokenizer.train_from_iterator([*corpus.texts(seed, TOKENIZED_TEXTS), *turns], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [TURN, END_OF_TURN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL["max_position_embeddings"],
    }
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
