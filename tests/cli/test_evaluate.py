"""Losses beside those of training and of transformers; the printed account; and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.cli import evaluate, export
from jaxft.cli.train import train
from jaxft.data.chat import Renderer, load_tokenizer
from jaxft.hub.resolve import ResolvedModel

STORIES = [
    "Once upon a time there was a little dog. He liked to run.",
    "Lily saw a big red ball in the park. " * 3,
    "The cat sat on the mat and slept all day.",
    "Tom and Sam went to the shop to buy milk and bread. It was fun!",
    "One day, a bird flew to the top of a tall tree.",
    'Her mom said, "Don\'t be sad. We can play again tomorrow."',
]
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day to you"}]


@pytest.fixture(scope="module")
def stories(material) -> Path:
    return material / "models" / "stories260K"


@pytest.fixture
def evaluated(stories, capsys):
    """`evaluated(*arguments)`: what `evaluate.py --json` prints, for stories260K in float32."""

    def run(*arguments: str | Path) -> dict:
        capsys.readouterr()
        options = ["--model", stories, "--dtype", "float32", "--json", *arguments]
        assert evaluate.main(list(map(str, options))) == 0
        return json.loads(capsys.readouterr().out)

    return run


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_name_on_the_hub_is_looked_up_once(stories, evaluated, tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl", [{"text": story} for story in STORIES])
    expected, looks = evaluated("--data", data)["base"], []

    def look(name, revision):
        looks.append((name, revision))
        return ResolvedModel(stories, "0123abc")

    monkeypatch.setattr("jaxft.cli.evaluate.resolve_model", look)
    monkeypatch.setattr("jaxft.hub.load.resolve_model", look)
    assert evaluated("--data", data, "--model", "org/name")["base"] == expected
    assert looks == [("org/name", None)]


def test_equals_the_held_out_loss_of_training(stories, evaluated, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", [{"text": story} for story in STORIES])
    trained_on = write(tmp_path / "train.jsonl", [{"text": f"{story} The end."} for story in STORIES])
    result = train(
        {
            "model_name_or_path": str(stories),
            "output_dir": str(tmp_path / "run"),
            "datasets": [str(trained_on)],
            "eval_datasets": [str(held_out)],
            "dtype": "float32",
            "quant_type": "int8",
            "remat": "none",
            "max_steps": 2,
            "learning_rate": 0.01,
            "max_length": 300,
        }
    )
    with open(tmp_path / "run" / "metrics.jsonl") as lines:
        losses = [record["eval_loss"] for record in map(json.loads, lines) if "eval_loss" in record]
    # What is exported is what was trained.
    peft = ["--run", str(result.output_dir), "--format", "peft", "--output", str(tmp_path / "peft")]
    assert export.main(peft) == 0

    found = evaluated("--adapter", tmp_path / "peft", "--data", held_out, "--quantization", "int8")
    assert found["base"]["loss"] == pytest.approx(losses[0], rel=1e-6)
    assert found["adapter"]["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert losses[-1] == result.metrics["eval_loss"]
    assert abs(losses[0] - losses[-1]) > 0.1


@pytest.mark.parity
@pytest.mark.parametrize("all_tokens", [False, True], ids=["answers", "all-tokens"])
def test_equals_transformers(stories, evaluated, tmp_path, all_tokens):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    pairs = [(story[:20], story[20:]) for story in STORIES * 2]  # more than a batch on eight devices
    data = write(tmp_path / "data.jsonl", [{"question": a, "answer": b, "id": 3} for a, b in pairs])
    arguments = ["--columns", "prompt=question,completion=answer", "--max-length", "40", "--batch-size", "1"]
    found = evaluated("--data", data, *arguments, *["--all-tokens"] * all_tokens)

    tokenizer, total, count, too_long = AutoTokenizer.from_pretrained(stories), 0.0, 0, 0
    model = LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    for question, answer in pairs:
        encoded = tokenizer(question + answer, return_offsets_mapping=True)
        ids = torch.tensor([[*encoded.input_ids, tokenizer.eos_token_id]])
        if ids.shape[1] > 40:
            too_long += 1
            continue
        from_answer = [start >= len(question) for start, _ in encoded.offset_mapping] + [True]
        wanted = torch.tensor([True] * ids.shape[1] if all_tokens else from_answer)
        labels = torch.where(wanted, ids[0], -100)
        labels[0] = -100  # nothing stands before it
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels != -100).sum())
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert found["data"]["too_long"] == too_long > 0
    assert found["base"]["tokens"] == count
    assert found["base"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["base"]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-4)
    assert "adapter" not in found
    assert found["settings"] == {
        "model": str(stories),
        "revision": None,
        "adapter": None,
        "data": str(data),
        "type": None,
        "columns": {"prompt": "question", "completion": "answer"},
        "chat_template": None,
        "max_length": 40,
        "all_tokens": all_tokens,
        "batch_size": 1,
        "dtype": "float32",
        "quantization": None,
        "double_quant": False,
        "mesh": "fsdp=-1",
    }


@pytest.fixture(scope="module")
def adapter(stories, tmp_path_factory) -> Path:
    """An adapter that changes the model, with a tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("adapter")
    base, config, random = jaxft.load_model(stories), LoraConfig(r=2, lora_alpha=4), np.random.default_rng(0)
    factors = {
        module: Factors(*(random.normal(0, 0.1, part.shape).astype(np.float32) for part in (one.A, one.B)))
        for module, one in factors_of(attach(base, config, jax.random.key(0))).items()
    }
    jaxft.save_adapter(attach_factors(base, config, factors), directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, directory / name)
    template = Renderer(load_tokenizer(stories), "chatml").template.source  # whose turns end in EOS here
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_table(stories, adapter, evaluated, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", [{"messages": TURNS * times} for times in (1, 20, 2)])
    arguments = ["--data", str(data), "--max-length", "200"]
    common = ["--model", str(stories), "--dtype", "float32"]
    assert evaluate.main([*common, *arguments, "--adapter", str(adapter)]) == 0
    account, table = capsys.readouterr().out.split("\n\n")
    assert "3 examples read, 2 kept; dropped: 1 too long" in account
    assert "chat template" in account
    header, *rows = [line.split() for line in table.splitlines()]
    assert header == ["loss", "perplexity", "tokens"]
    # The template is the adapter's for both models; named, it is the same without the adapter.
    found = evaluated(*arguments, "--chat-template", "chatml")
    (_, loss, perplexity, tokens), (name, tuned, *_) = rows
    assert float(loss) == pytest.approx(found["base"]["loss"], abs=1e-6)
    assert float(perplexity) == pytest.approx(found["base"]["perplexity"], rel=1e-5)
    assert int(tokens) == found["base"]["tokens"] == found["data"]["supervised"]
    assert name == "adapter"
    assert abs(float(tuned) - float(loss)) > 0.01


@pytest.mark.parametrize(
    "records, more, message",
    [
        ([{"text": "x"}], ["--model", "./gone"], "no such directory: './gone'"),
        ([{"text": "x"}], ["--adapter", "./gone"], "gone/adapter_config.json: no such file"),
        ([{"text": "x"}], ["--revision", "main"], "a revision (main) applies to the Hub only"),
        ([{"q": "x"}], [], "data.jsonl:1: no known format"),
        ([{"q": "x"}], ["--columns", "text=body"], "data.jsonl:1: no column `body`"),
        ([{"text": "word " * 30}], ["--max-length", "9"], "none of 1 examples is left: 1 are longer than"),
        ([{"messages": TURNS}], [], "data.jsonl:1: a conversation needs a chat template"),
    ],
)
def test_refuses(stories, tmp_path, capsys, records, more, message):
    data = write(tmp_path / "data.jsonl", records)
    assert evaluate.main(["--model", str(stories), "--data", str(data), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_refuses_a_tokenizer_that_is_larger_than_the_embedding(chat_model, write_chats, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "base_of", None)  # told before weights are read
    data = write_chats(tmp_path / "chats.jsonl", 30)
    assert evaluate.main(["--model", str(chat_model(vocab_size=20)), "--data", str(data)]) == 2
    assert "but the model's embedding has 20 rows; use the tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--columns", "prompt"], "must look like prompt=question,completion=answer"),
        (["--columns", "text=a,text=b"], "must look like"),
        (["--columns", "text= "], "must look like"),
        (["--max-length", "0"], "must be a whole number, 1 or more (got '0')"),
        (["--batch-size", "1.5"], "must be a whole number, 1 or more (got '1.5')"),
        (["--type", "chat"], "invalid choice: 'chat'"),
        (["--quantization", "int3"], "invalid choice: 'int3'"),
    ],
)
def test_refuses_arguments(capsys, more, message):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--model", "x", "--data", "y", *more])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "scale, with_adapter, message",
    [
        (np.nan, False, "the loss is nan; look for NaN or inf in the weights"),
        (2.0, True, "the adapter was trained on other weights"),
    ],
)
def test_refuses_weights(stories, adapter, tmp_path, capsys, scale, with_adapter, message):
    weights, model = load_file(stories / "model.safetensors"), tmp_path / "model"
    weights["model.norm.weight"] = weights["model.norm.weight"] * np.float32(scale)
    model.mkdir()
    save_file(weights, model / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, model / name)
    data = write(tmp_path / "data.jsonl", [{"text": STORIES[0]}])
    arguments = ["--model", str(model), "--data", str(data), *["--adapter", str(adapter)] * with_adapter]
    assert evaluate.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
