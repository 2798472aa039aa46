"""Make what `configs/quickstart.yaml` trains on: a small base model, its tokenizer and a task.

    python scripts/make_quickstart.py

writes `quickstart/` anew, from nothing but a seed: the texts of `quickstart_corpus`, a byte-level BPE tokenizer of
them, a Llama with random weights, which jaxft pre-trains in full (`configs/quickstart_pretrain.yaml`), and the
training and held-out messages of the task. On one machine the same seed gives the same files.
"""

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import quickstart_corpus as corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxft.cli.train import train
from jaxft.data.chat import CHATML
from jaxft.hub.checkpoint import write_checkpoint
from jaxft.hub.load import load_model
from jaxft.hub.save import save_model
from jaxft.models.decoder import initialize, parameters
from jaxft.models.families import decoder_config

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)
VOCABULARY = 1280
TEXTS, DIALOGUES = 20_000, 14_000
TRAIN, HELD_OUT = 1500, 200
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
    "dtype": "bfloat16",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the base model, the tokenizer and the task of the quickstart.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "quickstart", help="is replaced")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quickstart-pretrain", help="is replaced")
    parsed = parser.parse_args(arguments)
    output, work = parsed.output, parsed.work
    for directory in (output, work):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    write_task(output, parsed.seed)
    write_corpus(work, parsed.seed)
    write_initial_model(work / "initial", parsed.seed)
    result = train(
        ROOT / "configs" / "quickstart_pretrain.yaml",
        model_name_or_path=str(work / "initial"),
        datasets=[{"path": str(work / name)} for name in ("texts.jsonl", "dialogues.jsonl")],
        output_dir=str(work / "run"),
    )
    save_model(load_model(result.adapter_dir, "bfloat16"), output / "model")


def write_task(directory: Path, seed: int) -> None:
    """`train.jsonl` and `held_out.jsonl`: a customer's message, and one line that says what it is about."""
    for name, kind, count in (("train", "train", TRAIN), ("held_out", "held out", HELD_OUT)):
        write_jsonl(directory / f"{name}.jsonl", map(conversation, corpus.task(seed, kind, count).items()))


def write_corpus(directory: Path, seed: int) -> None:
    """`texts.jsonl` and `dialogues.jsonl`, for pre-training."""
    write_jsonl(directory / "texts.jsonl", ({"text": text} for text in corpus.texts(seed, TEXTS)))
    held_out = set(corpus.task(seed, "held out", HELD_OUT))
    dialogues = corpus.dialogues(seed, DIALOGUES, without=held_out)
    write_jsonl(directory / "dialogues.jsonl", map(conversation, dialogues))


def conversation(turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant"), turns, strict=True)]}


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_initial_model(directory: Path, seed: int) -> None:
    """A model directory with random weights."""
    directory.mkdir()
    write_tokenizer(directory, seed)
    write_json(directory / "config.json", MODEL)
    ends = [SPECIAL_TOKENS.index(END_OF_TURN), SPECIAL_TOKENS.index(END_OF_TEXT)]
    write_json(directory / "generation_config.json", {"eos_token_id": ends, "pad_token_id": MODEL["pad_token_id"]})
    model = initialize(decoder_config(MODEL), jax.random.key(seed), scale=INITIAL_SCALE)
    weights = {
        name: value if parameter.layers is None else value[index]
        for parameter, variable in parameters(model)
        for value in [variable.get_value()]
        for index, name in enumerate(parameter.names)
    }
    write_checkpoint(directory, weights, weights.__getitem__)


def write_tokenizer(directory: Path, seed: int) -> None:
    """A byte-level BPE tokenizer of the corpus, with a chat template, as transformers reads it."""
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
    turns = (turn for pair in corpus.dialogues(seed, 4000, without=set()) for turn in pair)
    tokenizer.train_from_iterator([*corpus.texts(seed, 4000), *turns], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [START_OF_TURN, END_OF_TURN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL["max_position_embeddings"],
    }
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
