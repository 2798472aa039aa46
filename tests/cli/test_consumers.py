"""What a run leaves, used by programs that know nothing of jaxft: it loads, answers as trained, and stops."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxft.cli import evaluate, export, generate
from jaxft.cli.train import main
from jaxft.hub.digests import check_digests
from jaxft.training.manifest import sealed

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("quick_compiles", "one_device")]

QUESTION, ANSWER = "the cat sees a bird ?", "the old dog likes one"
CHAT = [{"role": "user", "content": QUESTION}]
SETTINGS = {
    "model_name_or_path": "model",
    "dtype": "float32",
    "lora_r": 8,
    "lora_alpha": 16,
    "remat": "none",
    "max_steps": 60,
    "max_length": 48,
    "micro_batch_size": 4,
    "logging_steps": 20,
    "val_set_size": 1,
    "max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def runs(chat_model, tmp_path_factory):
    """A directory with `lora` and `full`: a base whose EOS is not its end of turn learned one answer by heart; and
    `texts`, from texts alone."""
    place = tmp_path_factory.mktemp("place")
    model = Path(shutil.copytree(chat_model(), place / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # id 27; the embedding has 32 rows
    tokenizer.add_tokens([f"<more{i}>" for i in range(7)])  # ids up to 34
    tokenizer.save_pretrained(model)
    (model / "README.md").write_text("---\nlicense: mit\n---\nthe base")
    with open(place / "chats.jsonl", "w") as chats, open(place / "texts.jsonl", "w") as texts:
        for _ in range(20):
            turns = [*CHAT, {"role": "assistant", "content": ANSWER}]
            chats.write(json.dumps({"messages": turns}) + "\n")
            texts.write(json.dumps({"text": f"{QUESTION} {ANSWER}"}) + "\n")
        chats.write(json.dumps({"messages": [{"role": "user", "content": "a"}, turns[-1]]}) + "\n")
        texts.write(json.dumps({"text": "a dog"}) + "\n")
    variants = {
        "lora": {"datasets": ["chats.jsonl"], "lora_target_modules": ["q_proj", "v_proj", "up_proj", "lm_head"]},
        "full": {"datasets": ["chats.jsonl"], "adapter": "none"},
        "texts": {"datasets": [{"path": "texts.jsonl", "type": "text"}], "use_rslora": True, "lora_alpha": 6},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, more in variants.items():
            settings = SETTINGS | {"output_dir": name, "learning_rate": 0.03 if name == "lora" else 0.01} | more
            if name == "full":
                settings = {key: value for key, value in settings.items() if not key.startswith("lora")}
            (place / f"{name}.yaml").write_text(yaml.safe_dump(settings))
            assert main(["--config", f"{name}.yaml"]) == 0
    return place


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Everything is used from another directory than it was made in."""
    monkeypatch.chdir(tmp_path)


def answer(model, tokenizer, **options) -> tuple[str, int]:
    """The answer, special tokens included, and how many tokens it took."""
    inputs = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    torch.manual_seed(0)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24, **options)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens), len(tokens)


WHOLE = (f"{ANSWER} <|im_end|>", 6)


def test_an_adapter_stops_in_peft(runs):
    directory = runs / "lora" / "adapter"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert model.get_base_model().lm_head.base_layer.weight.shape[0] == 32
    assert answer(model, tokenizer, eos_token_id=tokenizer.eos_token_id) == WHOLE
    settings = transformers.GenerationConfig.from_pretrained(directory)
    assert answer(model, tokenizer, generation_config=settings) == WHOLE
    text, count = answer(model, tokenizer)
    assert count == 24
    assert text.startswith(WHOLE[0]), "the base's own settings, which know nothing of the end of turn, let it run on"


@pytest.mark.parametrize("portable", [False, True])
def test_an_exported_adapter_is_found_from_anywhere(runs, tmp_path, portable):
    out = tmp_path / "out"
    assert run_export(runs / "lora", "peft", out, *["--portable"] * portable) == 0
    check_digests(out)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert answer(model, tokenizer, eos_token_id=tokenizer.eos_token_id) == WHOLE


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_model_stops_without_a_word(runs, tmp_path, name, capsys):
    out = tmp_path / "out"
    assert run_export(runs / name, "merged", out) == 0
    told = "not carried from the base: README.md; its terms may ask you to add them" in capsys.readouterr().out
    assert told == (name == "lora")
    for directory in (out, *[runs / "full" / "model"] * (name == "full")):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        assert answer(model, tokenizer) == WHOLE
        assert answer(model, tokenizer, eos_token_id=tokenizer.eos_token_id) == WHOLE
        assert len(tokenizer) <= 32


def run_export(run: Path, form: str, out: Path, *more: str) -> int:
    return export.main(["--run", str(run), "--format", form, "--output", str(out), *more])


def test_texts_teach_the_bases_own_end(runs, capsys):
    """With a chat template in the tokenizer that no example went through."""
    directory = runs / "texts" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token == "<eos>"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = tokenizer(QUESTION, return_tensors="pt").input_ids
    tokens = model.generate(input_ids=prompt, eos_token_id=tokenizer.eos_token_id, max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(tokens[0, prompt.shape[1] :]) == f"{ANSWER} <eos>"
    generated = [
        "--model",
        str(runs / "model"),
        "--adapter",
        str(directory),
        "--prompt",
        QUESTION,
        "--dtype",
        "float32",
    ]
    assert generate.main(generated) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == ANSWER
    assert "llama.cpp and SGLang do not know rsLoRA" in printed.err


def test_generate_stops_too(runs, capsys):
    asked = ["--model", runs / "model", "--adapter", runs / "lora" / "adapter", "--prompt", QUESTION, "--chat"]
    assert generate.main([*map(str, asked), "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert (printed.out.strip(), "5 tokens in" in printed.err) == (ANSWER, True)


def test_files_that_changed_are_used_by_no_command(runs, tmp_path, capsys):
    """And are exported by none: run.json knows them too."""
    copy = Path(shutil.copytree(runs / "lora", tmp_path / "run"))
    path = copy / "adapter" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|im_start|>"))
    common = ["--model", str(runs / "model"), "--adapter", str(copy / "adapter")]
    capsys.readouterr()
    for command, options in ((generate, ["--prompt", "the dog"]), (evaluate, ["--data", str(runs / "chats.jsonl")])):
        assert command.main([*common, *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} is not as it was written")
        assert error.count("\n") == 1
    assert run_export(copy, "peft", tmp_path / "out") == 2
    assert f"{path} does not match the SHA-256 in run.json" in capsys.readouterr().err


def test_a_moved_model_is_named(runs, tmp_path, capsys):
    copy = Path(shutil.copytree(runs / "lora", tmp_path / "run"))
    record = json.loads((copy / "run.json").read_text())
    assert record["base"] == {"name": "model", "path": str(runs / "model"), "revision": None}
    moved = Path(shutil.copytree(runs / "model", tmp_path / "elsewhere"))
    record["base"]["path"] = str(runs / "gone")
    del record["sha256"]
    (copy / "run.json").write_text(json.dumps(sealed(record)))
    assert run_export(copy, "merged", tmp_path / "out") == 2
    assert f"error: {runs / 'gone'}: no such directory or file; " in capsys.readouterr().err
    assert run_export(copy, "merged", tmp_path / "out", "--base", str(moved)) == 0


# The model card


def test_cards_are_read_and_tell_no_secrets(runs, tmp_path):
    for name, library in (("lora", "peft"), ("full", "transformers")):
        result = runs / name / ("adapter" if name == "lora" else "model")
        text = (result / "README.md").read_text()
        _, front, body = text.split("---\n", 2)
        facts = yaml.safe_load(front)
        assert facts["library_name"] == library
        assert "base_model" not in facts  # registries know repositories only
        assert f"Base: `{runs / 'model'}`" in body
        assert facts["tags"] == (["jaxft", "lora"] if name == "lora" else ["jaxft"])
        record = json.loads((runs / name / "run.json").read_text())
        for told in (record["fingerprints"]["data"], "`<|im_end|>` (2), `<eos>` (0)", "jaxft 0", "vllm serve"):
            assert told in body, told
        assert ("convert_lora_to_gguf.py DIR --base" in body) == (name == "lora")
        assert "chats.jsonl" not in text
        assert (record["data"]["held_out"], record["fingerprints"]["held-out data"] in body) == (1, True)


def test_the_program_on_the_card_runs_and_stops(runs, tmp_path, capsys):
    directory = runs / "lora" / "adapter"
    program = (directory / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(program.replace('"DIR"', repr(str(directory))).replace('"..."', repr(QUESTION)), {})
    assert capsys.readouterr().out.strip() == ANSWER


def test_the_losses_of_texts_are_those_of_training(runs, tmp_path, capsys):
    """Texts end with the EOS of training, whatever the exported tokenizer calls its EOS."""
    common = ["--model", str(runs / "model"), "--data", str(runs / "texts.jsonl"), "--type", "text", "--json"]
    found = []
    for name in ("lora", "texts"):
        capsys.readouterr()
        adapter = str(runs / name / "adapter")
        assert evaluate.main([*common, "--adapter", adapter, "--dtype", "float32"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["base"] == found[1]["base"]
    assert np.isfinite(found[0]["adapter"]["loss"])
