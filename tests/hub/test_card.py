"""What a model card tells, and that its commands name what is there."""

from dataclasses import replace

import pytest

from jaxft.hub.card import Card, write_card
from jaxft.hub.consumers import Adapter

ADAPTER = Adapter({"model.layers.0.self_attn.q_proj": (8, 16.0)}, False, False, frozenset(), False, False)
CARD = Card("title", "org/model", None, ADAPTER, {"<end>": 2}, "chatml", {"data": "0" * 64}, {"jaxft": "0"})


def written(directory, card: Card) -> str:
    write_card(directory, card)
    return (directory / "README.md").read_text()


@pytest.mark.parametrize(
    "file, option",
    [
        ("chat_template.jinja", " --jinja --chat-template-file DIR/chat_template.jinja"),
        ("chat_template.json", " --jinja"),
        ("tokenizer_config.json", " --jinja"),
    ],
)
def test_the_template_is_named_where_it_is(tmp_path, file, option):
    """A base's own template may stand in other files, and is in the GGUF that is made of the base."""
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / file).write_text("{}")
    text = written(tmp_path, CARD)
    assert f"Chat template: chatml ({file})." in text
    assert f"llama-cli -m base.gguf --lora adapter.gguf{option}\n" in text
    assert "llama-cli -m base.gguf --lora adapter.gguf\n" in written(tmp_path, replace(CARD, template=None))


@pytest.mark.parametrize(
    "base, revision, local",
    [
        ("org/model", None, '"$(hf download org/model)"'),
        ("org/model", "abc", '"$(hf download org/model --revision abc)"'),
        ("/models/a base", None, "'/models/a base'"),
    ],
)
def test_a_converter_is_given_a_directory(tmp_path, base, revision, local):
    text = written(tmp_path, replace(CARD, base=base, revision=revision))
    assert f"python convert_hf_to_gguf.py {local} --outfile base.gguf\n" in text
    assert f"python convert_lora_to_gguf.py DIR --base {local} --outfile adapter.gguf\n" in text


def test_no_command_loads_a_gguf_file_as_the_base_of_an_adapter(tmp_path):
    text = written(tmp_path, replace(CARD, base="/models/base.gguf", adapter=replace(ADAPTER, gguf=True)))
    assert "PEFT, vLLM and SGLang cannot load a GGUF file as the base: name the repository" in text
    assert "```" not in text
