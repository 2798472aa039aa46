"""Texts that went through the chat template before they came here, and ends that the data spells already."""

import copy
from datetime import date
from functools import cache

import pytest

from jaxft.data.chat import Encoded, Renderer
from jaxft.data.events import FOREIGN_MARKUP, MARKUP_SPELT, RENDERED, WRITTEN_ENDS
from jaxft.data.formats import Completion, Text, convert
from jaxft.data.records import Record
from tests.data.test_chat import TEMPLATES

TALK = [
    {"role": "user", "content": "What is a heron?"},
    {"role": "assistant", "content": "A bird."},
    {"role": "user", "content": "Name a metal."},
    {"role": "assistant", "content": "Copper."},
]


def one(renderer: Renderer, **columns) -> Encoded:
    found = convert([Record(columns, "f:1")], chat=renderer.template is not None, is_rendered=renderer.is_rendered)
    assert found.bad == []
    return renderer.encode(found.examples)[0]


def render(renderer: Renderer, messages: list[dict], prompt: bool = False) -> str:
    source = renderer.template.source
    return renderer.tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
    )


@pytest.fixture(scope="module")
def build(material, real_tokenizer):
    @cache
    def build(name: str) -> Renderer:
        tokenizer, specials, *_ = TEMPLATES[name]
        return Renderer(
            real_tokenizer(tokenizer, *specials), str(material / "templates" / f"{name}.jinja"), today=date.today()
        )

    return build


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_rendered_text_gives_the_tokens_of_its_conversation(build, name):
    renderer = build(name)
    text = render(renderer, TALK)
    conversation, rendered = one(renderer, messages=TALK), one(renderer, text=text)
    assert rendered.tokenized.tokens.tolist() == conversation.tokenized.tokens.tolist()
    assert rendered.tokenized.loss_mask[1:].all()
    assert RENDERED in rendered.events
    assert not any(event.lost for event in rendered.events)
    without_bos = text.strip().removeprefix(renderer.tokenizer.bos_token or "\0").lstrip()
    again = one(renderer, text=without_bos).tokenized.tokens.tolist()
    assert again.count(renderer.tokenizer.bos_token_id) == conversation.tokenized.tokens.tolist().count(
        renderer.tokenizer.bos_token_id
    )


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"deepseek-ai-DeepSeek-R1-Distill-Llama-8B"}))
def test_a_rendered_prompt_and_its_completion_are_not_wrapped_again(build, name):
    """The end of turn is added where the data lacks it: every answer ends in what stops generation."""
    renderer = build(name)
    prompt, end = render(renderer, TALK[:3], prompt=True), renderer.template.end_of_turn
    for completion in ("Copper.", "Copper." + end, "Copper." + end + "\n"):
        found = one(renderer, prompt=prompt, completion=completion)
        learned = renderer.tokenizer.decode(found.tokenized.tokens[found.tokenized.loss_mask])
        assert learned.strip() == ("Copper." + end).strip()
        assert RENDERED in found.events


@pytest.mark.parametrize("template", ["Qwen3.5-4B", "chatml", "Qwen-Qwen3-0.6B"])
def test_other_blanks_and_no_thought_are_the_same_markup(material, real_tokenizer, template):
    """The template that rendered the text may be an older one of the same model."""
    renderer = Renderer(real_tokenizer("qwen3"), str(material / "templates" / f"{template}.jinja"))
    for blank in ("\n", "\n\n", ""):
        text = f"<|im_start|>user\nhi<|im_end|>{blank}<|im_start|>assistant\nhello<|im_end|>{blank}"
        found = one(renderer, text=text)
        assert found.events == (RENDERED,)
        assert found.tokenized.tokens.tolist() == renderer.tokenizer(text).input_ids


def test_a_text_that_only_speaks_of_markup_is_read_as_letters(build):
    renderer = build("Qwen-Qwen2.5-7B-Instruct")
    for text in (
        "In ChatML a question ends with <|im_end|>\n<|im_start|>assistant and the answer follows.",
        "<|im_start|> opens a turn.",
        "Write <|endoftext|> twice.",
    ):
        found = one(renderer, text=text)
        assert found.events == (MARKUP_SPELT,)
        special = set(renderer.tokenizer.all_special_ids)
        assert [int(token) in special for token in found.tokenized.tokens] == [False] * (
            len(found.tokenized.tokens) - 1
        ) + [True]
    for text in (
        "<|start_header_id|>user<|end_header_id|>\n\nhi",
        "[INST] hi [/INST] hello",
        "<start_of_turn>user\nhi",
    ):
        assert one(renderer, text=text).events == (FOREIGN_MARKUP,)
        assert FOREIGN_MARKUP in one(renderer, prompt=text, completion="hello").events


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gpt2"])
def test_bos_and_eos_that_the_data_spells_are_there_once(real_tokenizer, name):
    tokenizer = copy.deepcopy(real_tokenizer(name))
    tokenizer.chat_template = None
    renderer, eos = Renderer(tokenizer), tokenizer.eos_token
    bos = tokenizer.bos_token if name == "llama2" else ""
    (plain,) = renderer.encode([Text("A heron wades.")])
    for text in (f"{bos}A heron wades.{eos}", f"A heron wades.{eos}", f"A heron wades.{eos}\n", f"{bos}A heron wades."):
        (found,) = renderer.encode([Text(text)])
        assert found.tokenized.tokens.tolist() == plain.tokenized.tokens.tolist()
        assert found.events == ((WRITTEN_ENDS,) if text != "A heron wades." else ())
    (expected,) = renderer.encode([Completion("Q: heron? A:", " wades")])
    (found,) = renderer.encode([Completion(f"{bos}Q: heron? A:", f" wades{eos}")])
    assert found.tokenized.tokens.tolist() == expected.tokenized.tokens.tolist()
    assert found.tokenized.loss_mask.tolist() == expected.tokenized.loss_mask.tolist()
    assert (
        renderer.prompt(Completion(f"{bos}Q: heron? A:", " wades"))[0].tolist() == tokenizer("Q: heron? A:").input_ids
    )


@pytest.mark.parametrize("name, end", [("llama2", "</s>"), ("gpt2", "<|endoftext|>"), ("llama3_2", None)])
def test_chatml_on_a_tokenizer_without_its_tokens_ends_turns_in_eos(real_tokenizer, name, end):
    renderer = Renderer(real_tokenizer(name), "chatml")
    tokenizer, end = renderer.tokenizer, end or real_tokenizer(name).eos_token
    found = one(renderer, messages=TALK)
    learned = found.tokenized.tokens[found.tokenized.loss_mask].tolist()
    assert learned.count(tokenizer.eos_token_id) == 2
    assert learned[-1] == tokenizer.eos_token_id
    assert renderer.template.stops == (end,)
    puts_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert found.tokenized.tokens.tolist().count(tokenizer.bos_token_id) == (
        1 if puts_bos else 4 if name == "gpt2" else 0
    )
    served = tokenizer.apply_chat_template(TALK, chat_template=renderer.template.source, return_dict=False)
    assert found.tokenized.tokens.tolist() == served


def test_chatml_on_a_tokenizer_with_neither_its_tokens_nor_eos(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    assert Renderer(tokenizer, "chatml").template.stops == ("<|im_end|>",)
    bare = copy.deepcopy(tokenizer)
    bare._tokenizer = type(bare._tokenizer).from_str(bare._tokenizer.to_str().replace("<|im_end|>", "<|ends|>"))
    with pytest.raises(ValueError, match=r"chatml: the tokenizer has neither <\|im_end\|> nor an eos_token"):
        Renderer(bare, "chatml")


def test_a_template_file_with_a_byte_order_mark(byte_tokenizer, tmp_path):
    source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / f"{encoding}.jinja").write_text(source, encoding=encoding)
        renderer = Renderer(byte_tokenizer, str(tmp_path / f"{encoding}.jinja"))
        assert renderer.template.source == source
    (tmp_path / "wide.jinja").write_text(source, encoding="utf-16")
    with pytest.raises(ValueError, match=r"wide\.jinja': not UTF-8"):
        Renderer(byte_tokenizer, str(tmp_path / "wide.jinja"))


def test_a_template_of_the_users_that_forgets_bos_is_told(real_tokenizer, caplog):
    body = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    Renderer(real_tokenizer("llama2"), "{{ bos_token }}" + body)
    assert caplog.text == ""
    Renderer(real_tokenizer("llama2"), body)
    assert "the chat template does not begin with <s>, which the tokenizer puts before every text" in caplog.text


@pytest.mark.parametrize(
    "template, tokenizer, markup",
    [
        ("Qwen-Qwen3-0.6B", "llama3_2", "<|im_start|>, <|im_end|>"),
        ("google-gemma-2-2b-it", "qwen3", "<start_of_turn>, <end_of_turn>"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama3_2", "<｜User｜>, <｜Assistant｜>"),
        ("Qwen-Qwen3-0.6B", "qwen3", None),
        ("llama-2-chat", "llama2", None),
        ("google-gemma-2-2b-it", "gemma2", None),
        ("meta-llama-Llama-3.1-8B-Instruct", "llama3_2", None),
    ],
)
def test_a_template_of_another_model_is_told(material, real_tokenizer, caplog, template, tokenizer, markup):
    """Its borders of turns are many tokens of letters, so the answers are no longer what the model knows."""
    Renderer(real_tokenizer(tokenizer), str(material / "templates" / f"{template}.jinja"))
    words = f"the chat template writes {markup}, which this tokenizer has as letters" if markup else "as letters"
    assert (words in caplog.text) is bool(markup)
    caplog.clear()
    Renderer(real_tokenizer(tokenizer), "chatml")
    assert caplog.text == ""
