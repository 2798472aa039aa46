"""Where other programs stop, on real tokenizers: what an export names, and that nothing else of a tokenizer changes."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from jaxft.cli.command import end_of_turn, load_tokenizer, stop_ids
from jaxft.data.chat import Renderer
from jaxft.data.templates import CHATML
from jaxft.hub.tokenizer_files import drop_tokens_beyond, forget_text_eos, write_json
from jaxft.training.companions import dress, stop_tokens

TEXTS = ["Hello world", "  two  spaces\n", "naïve 你好 <|im_end|> x"]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
ENDING_WITH_EOS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
)


def edit(directory: Path, **changes) -> None:
    path = directory / "tokenizer_config.json"
    settings = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


@pytest.fixture
def base(material, tmp_path):
    """`base(name, generation=..., **settings)`: a copy of a real tokenizer, with other settings."""

    def make(name: str, generation: dict | None = None, **settings) -> Path:
        source = next(path for path in (material / "tokenizers" / name, material / "models" / name) if path.is_dir())
        directory = tmp_path / "base"
        directory.mkdir()
        for path in source.iterdir():
            if path.name.startswith(("token", "chat_template", "special", "added")):
                shutil.copyfile(path, directory / path.name)
        edit(directory, **settings)
        if generation is not None:
            (directory / "generation_config.json").write_text(json.dumps(generation))
        return directory

    return make


def dressed(base: Path, template: str | None = None, rows: int = 10**6, learned: bool = True) -> Path:
    """The files that a run with this template leaves."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    renderer = Renderer(tokenizer, template)
    stops = stop_tokens(base, tokenizer, end_of_turn(renderer), learned, rows)
    out = Path(shutil.copytree(base, base.parent / "out"))
    dress(out, renderer.template and renderer.template.source, stops, rows)
    return out


def ids_in(directory: Path) -> set[int]:
    found = GenerationConfig.from_pretrained(directory).eos_token_id
    return set(found if isinstance(found, list) else [found])


BASE_MODEL = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|im_end|>", chat_template=None)


def test_a_base_model_taught_a_template_stops_at_its_end_of_turn(base):
    """The tokenizer's eos_token alone would do, and the settings alone; texts stay the same tokens."""
    before = base("SmolLM2-135M-Instruct", {"eos_token_id": 0, "temperature": 0.6}, **BASE_MODEL)
    (before / "chat_template.jinja").unlink()
    out = dressed(before, "chatml")
    plain, tuned = (AutoTokenizer.from_pretrained(path) for path in (before, out))
    end = plain.convert_tokens_to_ids("<|im_end|>")
    assert (plain.eos_token_id, tuned.eos_token_id, tuned.eos_token) == (0, end, "<|im_end|>")
    assert ids_in(out) == {0, end}
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert tuned.pad_token == "<|endoftext|>", "padding is masked by trainers, and the end of an answer must not be"
    assert tuned(TEXTS).input_ids == plain(TEXTS).input_ids
    assert len(tuned) == len(plain)
    assert tuned.apply_chat_template(CHAT, tokenize=False) == plain.apply_chat_template(
        CHAT, tokenize=False, chat_template=CHATML
    )


def test_texts_end_as_they_did_when_jaxft_goes_on_from_the_export(base):
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL)
    out = dressed(before, "chatml")
    assert load_tokenizer(before, out).eos_token == load_tokenizer(before).eos_token == "<|endoftext|>"
    assert stop_ids(before / "none", None, load_tokenizer(before)) == {0}
    assert stop_ids(before / "none", out, load_tokenizer(before, out)) == {0, 2}


def test_texts_and_completions_teach_the_tokenizers_own_eos(base):
    out = dressed(base("SmolLM2-135M-Instruct", {"eos_token_id": 0}, **BASE_MODEL), "chatml", learned=False)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert ids_in(out) == {0, 2}


@pytest.mark.parametrize(
    "name, generation, eos, stops",
    [
        ("llama3_2", [128001, 128008, 128009], "<|eot_id|>", {128001, 128008, 128009}),
        ("llama3_2", 128001, "<|eot_id|>", {128001, 128009}),
        ("qwen3", [151645, 151643], "<|im_end|>", {151645, 151643}),
        ("mistral_nemo", 2, "</s>", {2}),
        ("mistral_nemo", None, "</s>", {2}),
    ],
)
def test_nothing_that_a_model_stops_at_is_lost(base, name, generation, eos, stops):
    before = base(name, {"top_p": 0.9} | ({} if generation is None else {"eos_token_id": generation}))
    out = dressed(before)
    assert AutoTokenizer.from_pretrained(out).eos_token == eos
    assert ids_in(out) == stops
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names & {path.name for path in before.iterdir()}:
        assert (out / name).read_bytes() == (before / name).read_bytes(), name


def test_gemma_stops_at_the_end_of_turn_and_where_it_did(base, material):
    """Its tokenizer's EOS, 1, ends texts; its settings name the end of turn too, which programs that ask the tokenizer
    do not see."""
    template = (material / "templates/google-gemma-2-2b-it.jinja").read_text()
    out = dressed(base("gemma2", {"eos_token_id": [1, 107]}), template)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<end_of_turn>"
    assert ids_in(out) == {1, tokenizer.eos_token_id}
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def test_a_config_with_eos_names_them_too(base):
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL)
    nested = {"model_type": "x", "eos_token_id": 0, "text_config": {"eos_token_id": 0, "pad_token_id": 99}}
    (before / "config.json").write_text(json.dumps(nested))
    config = json.loads((dressed(before, "chatml", rows=99) / "config.json").read_text())
    assert config == {"model_type": "x", "eos_token_id": [0, 2], "text_config": {"eos_token_id": [0, 2]}}


def test_a_template_that_writes_eos_still_writes_the_old_one(base):
    """Otherwise the same conversation would be other tokens than in training."""
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL)
    out = dressed(before, ENDING_WITH_EOS)
    plain, tuned = (AutoTokenizer.from_pretrained(path) for path in (before, out))
    expected = plain.apply_chat_template(CHAT, tokenize=False, chat_template=ENDING_WITH_EOS)
    assert expected.endswith("<|im_end|>\n<|endoftext|>")
    assert tuned.eos_token == "<|im_end|>"
    assert tuned.apply_chat_template(CHAT, tokenize=False) == expected
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    dress(out, ENDING_WITH_EOS, {"<|im_end|>": 2, "<|endoftext|>": 0}, 10**6)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files, "as when a run is exported"


def test_a_run_on_an_export_has_its_eos(base):
    """Its texts end with the EOS that the export names, and its template still writes the older one."""
    out = dressed(base("SmolLM2-135M-Instruct", **BASE_MODEL), ENDING_WITH_EOS)
    first = AutoTokenizer.from_pretrained(out)
    rendered = first.apply_chat_template(CHAT, tokenize=False)
    forget_text_eos(out)
    dress(out, first.chat_template, {"<|im_end|>": 2, "<|endoftext|>": 0}, 10**6)
    assert load_tokenizer(out).eos_token == "<|im_end|>"
    assert load_tokenizer(out).apply_chat_template(CHAT, tokenize=False) == rendered


def test_a_tokenizer_that_appends_its_eos_keeps_it(base, caplog):
    """A changed one would be appended in its place to every text, at least by versions of transformers before 5."""
    settings = BASE_MODEL | dict(tokenizer_class="PreTrainedTokenizerFast", add_eos_token=True)
    before = base("SmolLM2-135M-Instruct", **settings)
    plain = AutoTokenizer.from_pretrained(before)
    out = dressed(before, "chatml")
    tuned = AutoTokenizer.from_pretrained(out)
    assert tuned(TEXTS).input_ids == plain(TEXTS).input_ids
    assert (tuned.eos_token, tuned.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert ids_in(out) == {0, 2}
    assert "appends its eos_token, <|endoftext|>, to every text" in caplog.text


def test_a_tokenizer_of_sentencepiece_alone_that_appends_its_eos_keeps_it(base):
    pytest.importorskip("sentencepiece")
    before = base("stories15M", tokenizer_class="LlamaTokenizer", add_eos_token=True, eos_token="</s>", bos_token="<s>")
    (before / "tokenizer.json").unlink()
    plain = AutoTokenizer.from_pretrained(before)
    out = Path(shutil.copytree(before, before.parent / "out"))
    dress(out, None, {"<unk>": 0, "</s>": 2}, 32000)
    tuned = AutoTokenizer.from_pretrained(out)
    assert plain("Once upon").input_ids[-1] == 2
    assert tuned(TEXTS).input_ids == plain(TEXTS).input_ids
    assert tuned.eos_token == "</s>"


def test_a_missing_bos_is_told(base, caplog):
    """Of a sentencepiece model alone, unless the settings say what is meant, or tokenizer.json is there."""
    pytest.importorskip("sentencepiece")
    directory = base(
        "stories15M", tokenizer_class="LlamaTokenizer", eos_token="</s>", bos_token="<s>", add_bos_token=None
    )
    assert load_tokenizer(directory)("a").input_ids[0] == 1
    (directory / "tokenizer.json").unlink()
    assert caplog.text == ""
    assert load_tokenizer(directory)("a").input_ids[0] != 1
    assert f"{directory} holds tokenizer.model and no tokenizer.json" in caplog.text
    caplog.clear()
    for choice in (True, False):
        edit(directory, add_bos_token=choice)
        assert (load_tokenizer(directory)("a").input_ids[0] == 1) == choice
    assert caplog.text == ""


def test_ends_that_are_no_tokens_are_left_out_and_told(base, caplog):
    """Beyond the tokenizer, within spare rows of the embedding or not, and beyond the embedding."""
    before = base("SmolLM2-135M-Instruct", {"eos_token_id": [0, 49151, 49160, 60000]}, **BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(before)
    stops = stop_tokens(before, tokenizer, [2], True, 50000)
    assert list(stops.items()) == [
        ("<|im_end|>", 2),
        ("<|endoftext|>", 0),
        (tokenizer.convert_ids_to_tokens(49151), 49151),
    ]
    assert f"{before} names ends of text that are no tokens of it" in caplog.text
    assert "left out of the export: 49160, 60000" in caplog.text
    assert stop_tokens(before, tokenizer, [2], True, 3) == {"<|im_end|>": 2, "<|endoftext|>": 0}
    dress(before, None, {}, 50000)
    assert json.loads((before / "generation_config.json").read_text()) == {}


# Tokens without a row


def test_added_tokens_without_a_row_are_left_out(base, caplog):
    """Loaders that grow the embedding to the tokenizer would give it another shape than the adapter knows."""
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL | {"pad_token": "<|endoftext|>"})
    tokenizer = AutoTokenizer.from_pretrained(before)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(before)
    write_json(before / "added_tokens.json", {"<pad>": rows, "<more>": rows + 1, "<|im_end|>": 2})
    write_json(before / "special_tokens_map.json", {"pad_token": {"content": "<pad>"}})
    assert len(AutoTokenizer.from_pretrained(before)) == rows + 2
    out = dressed(before, "chatml", rows)
    tuned = AutoTokenizer.from_pretrained(out)
    assert len(tuned) == rows
    assert tuned.pad_token == "<|endoftext|>"
    assert max(tuned.get_vocab().values()) == rows - 1
    assert tuned(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|im_end|>": 2}
    assert "2 tokens of the tokenizer have no row in the embedding of 49152 rows" in caplog.text
    assert "<more>, <pad>" in caplog.text


def test_a_pad_token_that_only_the_settings_name_is_appended_and_left_out(base):
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL | {"pad_token": "[PAD]"})
    rows = 49152
    assert AutoTokenizer.from_pretrained(before).pad_token_id == rows
    tuned = AutoTokenizer.from_pretrained(dressed(before, "chatml", rows))
    assert (len(tuned), tuned.pad_token) == (rows, "<|endoftext|>")


@pytest.mark.parametrize("name, rows", [("qwen3", 151936), ("SmolLM2-135M-Instruct", 49152), ("gpt2", 50304)])
def test_rows_without_a_token_are_normal(base, name, rows):
    directory = base(name)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert drop_tokens_beyond(directory, rows) == []
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == files


def test_within_spare_rows_an_added_token_stays(base):
    before = base("SmolLM2-135M-Instruct", **BASE_MODEL | {"pad_token": "[PAD]"})
    tuned = AutoTokenizer.from_pretrained(dressed(before, "chatml", 49153))
    assert (len(tuned), tuned.pad_token) == (49153, "[PAD]")
