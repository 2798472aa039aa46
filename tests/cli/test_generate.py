import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jaxft
from jaxft.adapters.attach import attach, sites
from jaxft.adapters.targets import LoraConfig
from jaxft.cli import command
from jaxft.cli.generate import main, plain_prompt
from jaxft.generation.generate import generate
from jaxft.hub.resolve import ResolvedModel
from jaxft.quantization.nf4 import NF4
from jaxft.sharding.mesh import make_mesh

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def stories(material) -> Path:
    return material / "models/stories260K"


@pytest.fixture(scope="module")
def chatty(stories, tmp_path_factory) -> Path:
    """The same model with a chat template, and without a generation_config.json."""
    directory = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(stories, directory, copy_function=shutil.copyfile)
    (directory / "generation_config.json").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def adapter(stories, tmp_path_factory) -> Path:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["v_proj"])
    model = attach(jaxft.load_model(stories), config, jax.random.key(0))
    for site in sites(model):
        if (lora := site.linear.adapter) is not None:
            lora.B.set_value(0.2 * jax.random.normal(jax.random.key(1), lora.B.get_value().shape))
    return jaxft.save_adapter(model, tmp_path_factory.mktemp("adapters") / "lora")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = main(["--dtype", "float32", "--max-new-tokens", "12", *map(str, arguments)])
    return code, *capsys.readouterr()


def completion(model, tokenizer, prompt: list[int]) -> str:
    (new,) = generate(model, [prompt], max_new_tokens=12, eos_ids=[2])
    whole, before = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt + new, prompt)
    )
    assert whole.startswith(before)
    return whole[len(before) :]


def test_prints_the_completion_and_nothing_else(stories, capsys):
    story = json.loads((stories / "reference.json").read_text())["prompt"]
    code, out, err = run(capsys, "--model", stories, "--prompt", story[:17])
    assert code == 0
    assert len(out) > 15
    assert story[17:].startswith(out.removesuffix("\n")), "the space before the next word belongs to it"
    assert "12 tokens" in err


def test_a_name_on_the_hub_is_looked_up_once(stories, asked, capsys, monkeypatch):
    """A branch that moves meanwhile gives weights of one commit and a tokenizer of another."""
    looks = []

    def look(name, revision):
        looks.append((name, revision))
        return ResolvedModel(stories, "0123abc")

    monkeypatch.setattr("jaxft.cli.generate.resolve_model", look)
    monkeypatch.setattr("jaxft.hub.load.resolve_model", look)
    assert run(capsys, "--model", "org/name", "--revision", "dev", "--prompt", "Lily")[0] == 0
    assert looks == [("org/name", "dev")]
    assert asked["model"].source.revision == "0123abc"
    assert asked["model"].source.name == "org/name"


def test_each_prompt_gets_its_completion(stories, capsys):
    _, first, _ = run(capsys, "--model", stories, "--prompt", "Lily")
    _, second, _ = run(capsys, "--model", stories, "--prompt", "The big dog")
    _, both, _ = run(capsys, "--model", stories, "--prompt", "Lily", "--prompt", "The big dog")
    assert both == first + second
    assert first != second


def test_chat_applies_the_template(chatty, capsys):
    model, tokenizer = jaxft.load_model(chatty), AutoTokenizer.from_pretrained(chatty)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me a story"}]
    code, out, _ = run(capsys, "--model", chatty, "--chat", "--system", "Be kind.", "--prompt", "Tell me a story")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (code, out) == (0, completion(model, tokenizer, prompt) + "\n")
    _, out, _ = run(capsys, "--model", chatty, "--chat", "--prompt", "Tell me a story")
    prompt = tokenizer.apply_chat_template(messages[1:], add_generation_prompt=True, return_dict=False)
    assert out == completion(model, tokenizer, prompt) + "\n"


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What the command asks `generate` for; nothing is generated."""
    asked = {}

    def record(model, prompts, **options):
        asked.update(options, model=model)
        return [[]]

    monkeypatch.setattr("jaxft.cli.generate.generate", record)
    return asked


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_also_ends_with_the_end_of_turn(stories, tmp_path, capsys, asked, chat):
    """A base model's files do not name the token that a chat template ends its turns with."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE.replace("\n", " <|end|>\n")
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(stories / name, tmp_path / name)
    assert run(capsys, "--model", tmp_path, "--prompt", "Lily", *["--chat"] * chat)[0] == 0
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")
    assert asked["eos_ids"] == ({2, end_of_turn} if chat else {2})


def test_options_arrive(stories, capsys, asked):
    options = ["--temperature", 0.7, "--top-p", 0.9, "--seed", 3, "--quantization", "int8", "--dtype", "bfloat16"]
    assert run(capsys, "--model", stories, "--prompt", "Lily", *options)[0] == 0
    model = asked.pop("model")
    assert model.dtype == "bfloat16"
    assert {str(site.linear.weight.get_value().codes.dtype) for site in sites(model)} == {"int8"}
    assert asked == {"max_new_tokens": 12, "eos_ids": {2}, "temperature": 0.7, "top_p": 0.9, "seed": 3}


def test_double_quantization_arrives(stories, capsys, asked):
    options = ["--quantization", "nf4", "--double-quant"]
    assert run(capsys, "--model", stories, "--prompt", "Lily", *options)[0] == 0
    forms = {site.linear.weight.get_value().format for site in sites(asked["model"])}
    assert forms == {NF4(double_quant=True)}


MESHES = ["fsdp=-1", "tensor=2", "tensor=4,fsdp=-1", "data=2,fsdp=2,tensor=2", "context=2"]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_no_token(stories, adapter, capsys, monkeypatch, mesh):
    """Of three prompts, where eight devices share out rows, weights and heads, with an adapter."""
    prompts = [word for text in ("Lily", "The big dog", "Once upon a time there was") for word in ("--prompt", text)]
    arguments = ["--model", stories, "--adapter", adapter, *prompts]
    assert jax.device_count() == 8
    code, together, _ = run(capsys, *arguments, "--mesh", mesh)
    assert code == 0
    monkeypatch.setattr(command, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1]))
    assert run(capsys, *arguments)[1] == together
    assert len(together) > 60


def test_experts_are_shared_out(random_checkpoint, stories, tmp_path, capsys, monkeypatch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = json.loads((stories / "config.json").read_text())
    sizes = {"vocab_size": config["vocab_size"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    directory = random_checkpoint({"model_type": "qwen3_moe", "tie_word_embeddings": True} | sizes | heads | experts)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(stories / name, directory / name)
    arguments = ["--model", directory, "--prompt", "Lily", "--prompt", "The big dog"]
    code, together, _ = run(capsys, *arguments, "--mesh", "expert=4,tensor=2")
    assert code == 0
    monkeypatch.setattr(command, "make_mesh", lambda sizes: make_mesh({}, jax.devices()[:1]))
    assert run(capsys, *arguments)[1] == together


# What a plain prompt is


class Surrounded:
    """A tokenizer of words that puts these tokens around every text."""

    def __init__(self, before: list[int], after: list[int]):
        self._before, self._after = before, after

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = [1 if word == "<s>" else 10 + len(word) for word in text.split()]
        return SimpleNamespace(input_ids=[*self._before, *ids, *self._after] if add_special_tokens else ids)


@pytest.mark.parametrize(
    "before, after, text, ids",
    [
        ([1], [2], "a dog", [1, 11, 13]),
        ([1], [], "a dog", [1, 11, 13]),
        ([], [2], "a dog", [11, 13]),
        ([], [], "a dog", [11, 13]),
        ([1], [2], "<s> dog", [1, 13]),
        ([], [2], "<s> dog", [1, 13]),
        ([5, 6], [2, 2], "dog", [5, 6, 13]),
        ([1], [2], "", [1]),
        ([], [2], "", []),
    ],
)
def test_a_prompt_begins_as_a_text_does_and_does_not_end(before, after, text, ids):
    assert plain_prompt(Surrounded(before, after), text) == ids


@pytest.mark.parametrize("name", ["llama2", "llama3_2", "gemma2", "mistral_nemo", "qwen3", "gpt2"])
@pytest.mark.parametrize("appends", [False, True])
def test_a_prompt_of_real_tokenizers(material, name, appends):
    backend = Tokenizer.from_file(str(material / "tokenizers" / name / "tokenizer.json"))
    bos = {"llama2": "<s>", "llama3_2": "<|begin_of_text|>", "gemma2": "<bos>", "mistral_nemo": "<s>"}.get(name)
    eos = {"llama3_2": "<|eot_id|>", "gemma2": "<eos>", "qwen3": "<|im_end|>", "gpt2": "<|endoftext|>"}.get(
        name, "</s>"
    )
    if appends:
        tokens = [(token, backend.token_to_id(token)) for token in filter(None, (bos, eos))]
        single = " ".join(filter(None, (bos, "$A", eos)))
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    ids = plain_prompt(tokenizer, "The dog sat")
    begins = bos is not None and tokenizer("x").input_ids[0] == backend.token_to_id(bos)
    assert tokenizer("x").input_ids[-1] == backend.token_to_id(eos) or not appends
    assert ids.count(backend.token_to_id(bos) if bos else -1) == begins
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "The dog sat"
    if begins:
        assert plain_prompt(tokenizer, f"{bos}The dog sat").count(ids[0]) == 1


def test_a_template_of_ones_own(stories, tmp_path, capsys):
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE.replace("assistant: ", "answer:"))
    code, out, _ = run(capsys, "--model", stories, "--chat", "--chat-template", path, "--prompt", "Tell me a story")
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt = tokenizer("user: Tell me a story\nanswer:", add_special_tokens=False).input_ids
    assert (code, out) == (0, completion(jaxft.load_model(stories), tokenizer, prompt) + "\n")


def test_adapter_and_its_own_tokenizer(stories, chatty, adapter, tmp_path, capsys):
    model = jaxft.load_adapter(jaxft.load_model(stories), adapter)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    code, out, _ = run(capsys, "--model", stories, "--adapter", adapter, "--prompt", "Lily")
    assert (code, out) == (0, completion(model, tokenizer, tokenizer("Lily").input_ids) + "\n")
    assert out != run(capsys, "--model", stories, "--prompt", "Lily")[1]

    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(chatty / name, own / name)
    assert run(capsys, "--model", stories, "--adapter", own, "--chat", "--prompt", "Lily")[0] == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "./nowhere"], "no such directory"),
        (["--model", "{empty}"], "no tokenizer can be loaded"),
        (["--model", "{damaged}"], "no tokenizer can be loaded"),
        (["--adapter", "nowhere"], "adapter_config.json: no such file"),
        (["--revision", "main"], "a revision .* applies to the Hub only"),
        (["--system", "Be kind."], "add --chat"),
        (["--chat-template", "chatml"], "add --chat"),
        (["--chat"], "needs a chat template"),
        (["--chat", "--chat-template", "none.jinja"], "no such file"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--mesh", "tensor"], "--mesh must look like fsdp=-1 or tensor=2,data=4, not 'tensor'"),
        (["--mesh", "tensor=2,tensor=4"], "--mesh must look like"),
        (["--mesh", "rows=2"], r"mesh: unknown axes \['rows'\]; known: data, fsdp, expert, context, tensor"),
        (["--mesh", "tensor=3"], "3 does not divide the number of devices, 8"),
        (["--mesh", "expert=2"], "but this model has none; use data or fsdp"),
        (["--mesh", "fsdp=-1,tensor=-1"], "-1 on at most one axis"),
        (["--double-quant"], "--double-quant is for the scales of nf4"),
        (["--double-quant", "--quantization", "int8"], "double_quant compresses the scales of nf4; int8 has none"),
        (["--prompt", "word " * 600], r"prompts\[0\] has .* tokens and the model 512 positions"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(stories, tmp_path, capsys, options, message):
    for name in ("empty", "damaged"):
        (tmp_path / name).mkdir()
        shutil.copyfile(stories / "config.json", tmp_path / name / "config.json")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    given = [option.format(empty=tmp_path / "empty", damaged=tmp_path / "damaged") for option in options]
    required = [] if "--model" in options else ["--model", stories]
    prompt = [] if "--prompt" in options else ["--prompt", "Lily"]
    code, out, err = run(capsys, *required, *prompt, *given)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_prompt_without_tokens_is_refused_before_weights_are_loaded(chat_model, capsys, monkeypatch):
    monkeypatch.setattr("jaxft.cli.generate.base_of", lambda *_, **__: pytest.fail("weights were loaded"))
    code, out, err = run(capsys, "--model", chat_model(), "--prompt", "the dog", "--prompt", "")
    assert (code, out) == (2, "")
    assert err == "error: --prompt '' holds no token to go on from; give it a text\n"


@pytest.mark.parametrize(
    "settings, message",
    [
        (None, "no such file; "),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "LORA", "target_modules": ["q_proj"], "r": "8"}, "r is '8'; it must be a whole number"),
    ],
)
def test_an_adapter_is_refused_before_weights_are_loaded(chat_model, tmp_path, capsys, monkeypatch, settings, message):
    monkeypatch.setattr("jaxft.cli.generate.base_of", lambda *_, **__: pytest.fail("weights were loaded"))
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    code, out, err = run(capsys, "--model", chat_model(), "--prompt", "the dog", "--adapter", tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'adapter_config.json'}: {message}")


@pytest.mark.parametrize("arguments", [[], ["--model", "x"], ["--model", "x", "--prompt", "y", "--dtype", "int3"]])
def test_a_command_that_cannot_be_read(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_script_is_the_command(monkeypatch, capfd):
    script = Path(__file__).resolve().parents[2] / "scripts/generate.py"
    monkeypatch.setattr(sys, "argv", ["generate.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    assert "--max-new-tokens" in capfd.readouterr().out
