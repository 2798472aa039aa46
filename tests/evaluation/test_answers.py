"""What is asked of a held-out conversation, and what the answer is compared with."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from jaxft.data.chat import Renderer
from jaxft.data.conversations import Conversation, parse_messages
from jaxft.data.formats import Completion, Text
from jaxft.data.tool_calls import parse_tools
from jaxft.evaluation.answers import exact_matches, questions

WEATHER, _ = parse_tools([{"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}])
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
RESULT = {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefghi"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def renderer(material):
    """`renderer(tokenizer, template)`, of real ones."""

    def make(tokenizer: str, template: str) -> Renderer:
        loaded = AutoTokenizer.from_pretrained(material / "tokenizers" / tokenizer)
        return Renderer(loaded, str(material / "templates" / f"{template}.jinja"))

    return make


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def model(text: str) -> dict:
    return {"role": "assistant", "content": text}


def ask(renderer: Renderer, *turns: dict, tools: tuple = ()):
    (question,) = questions([Conversation(parse_messages(turns, tools), tools)], renderer, 1, 10_000)
    return question


TEMPLATES = [
    ("qwen3", "Qwen-Qwen2.5-7B-Instruct"),
    ("qwen3", "Qwen-Qwen3-0.6B"),
    ("llama3_2", "meta-llama-Llama-3.1-8B-Instruct"),
    ("mistral_nemo", "mistralai-Mistral-Nemo-Instruct-2407"),
]


@pytest.mark.parametrize("tokenizer, template", TEMPLATES)
def test_the_last_turn_that_is_answered_is_asked_for(renderer, tokenizer, template):
    r = renderer(tokenizer, template)
    turns = [user("One?"), model("First."), user("Two?"), model("Second.")]
    closed, open_ = ask(r, *turns), ask(r, *turns, user("Three?"))
    assert (open_.text, open_.tokens.tolist()) == (closed.text, closed.tokens.tolist())
    assert open_.reference == closed.reference
    assert closed.text == "Two?"
    assert closed.reference.endswith("Second.")
    prompt = r.tokenizer.decode(closed.tokens)
    assert "Two?" in prompt
    assert "Second." not in prompt


@pytest.mark.parametrize("tokenizer, template", TEMPLATES)
def test_the_reference_is_what_a_model_writes_that_has_learned_its_lesson(renderer, tokenizer, template):
    """Given the prompt, it would write the tokens that the whole conversation goes on with, and stop."""
    r = renderer(tokenizer, template)
    conversation = Conversation(parse_messages([user("One?"), model("First."), user("Two?"), model("Second.")]))
    (question,) = questions([conversation], r, 1, 10_000)
    tokens = r.encode([conversation])[0].tokenized.tokens.tolist()
    start = len(question.tokens)
    assert tokens[:start] == question.tokens.tolist()
    written = r.tokenizer.decode(tokens[start:], skip_special_tokens=True)
    assert exact_matches([written, f" {written}\n", written + "x", ""], [question] * 4) == 2


@pytest.mark.parametrize(
    "tokenizer, template, call",
    [
        (
            "qwen3",
            "Qwen-Qwen2.5-7B-Instruct",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>',
        ),
        (
            "llama3_2",
            "meta-llama-Llama-3.1-8B-Instruct",
            '{"name": "weather", "parameters": {"city": "Bonn"}}',
        ),
    ],
)
def test_a_call_is_compared_as_the_template_writes_it(renderer, tokenizer, template, call):
    r = renderer(tokenizer, template)
    asked = ask(r, user("How is Bonn?"), CALLS, tools=WEATHER)
    assert asked.reference == call
    assert asked.text == "How is Bonn?"
    assert exact_matches([call + "\n", "", "12 degrees"], [asked] * 3) == 1

    after = ask(r, user("How is Bonn?"), CALLS, RESULT, model("Cool."), tools=WEATHER)
    assert after.text == "How is Bonn?\n12 degrees"
    assert after.reference.endswith("Cool.")
    before = ask(r, user("Hi"), model("Hello."), user("How is Bonn?"), CALLS, RESULT, tools=WEATHER)
    assert (before.text, before.reference) == ("How is Bonn?", call)


def test_a_turn_that_is_not_learned_is_not_asked_for(renderer):
    r = renderer("qwen3", "Qwen-Qwen2.5-7B-Instruct")
    first, answer, second, other = parse_messages([user("One?"), model("First."), user("Two?"), model("Second.")])
    unlearned = type(other)("assistant", other.content, supervised=False)
    (question,) = questions([Conversation((first, answer, second, unlearned))], r, 1, 10_000)
    assert (question.text, question.reference) == ("One?", "First.")


def test_a_conversation_that_cannot_be_cut_at_its_answer_is_passed_over(material):
    """It was trained as a whole; its template refuses one that ends there. The next one is asked."""
    template = (
        "{% if messages|length == 4 %}{{ raise_exception('no end here') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    r = Renderer(AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen3"), template)
    short = [user("One?"), model("First.")]
    long = Conversation(parse_messages([*short, user("Two?"), model("Second."), user("Three?")]))
    assert r.encode([long])[0].tokenized.loss_mask.any()
    asked = questions([long, Conversation(parse_messages(short))], r, 2, 10_000)
    assert [question.text for question in asked] == ["One?"]


def test_completions_are_asked_and_texts_are_not(renderer):
    r = renderer("qwen3", "Qwen-Qwen2.5-7B-Instruct")
    examples = [Text("A story."), Completion("2+2=", " 4"), Completion("3+3=", " 6"), Completion("long " * 50, "x")]
    asked = questions(examples, r, 5, positions=30)
    assert [(question.text, question.reference) for question in asked] == [("2+2=", " 4"), ("3+3=", " 6")]
    assert len(questions(examples, r, 1, positions=30)) == 1
    assert questions(examples, r, 0, positions=30) == []


def test_a_conversation_that_its_template_writes_only_whole_asks_nothing(material, tmp_path):
    """The last turn that is learned is not the last: up to there the template refuses it."""
    template = (
        "{% if messages|length == 4 %}{{ raise_exception('too few') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "whole.jinja").write_text(template)
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / "qwen3")
    r = Renderer(tokenizer, str(tmp_path / "whole.jinja"))
    turns = parse_messages([turn for n in ("One", "Two", "Three") for turn in (user(f"{n}?"), model(f"{n}."))])
    early = Conversation((*turns[:5], replace(turns[5], supervised=False)))
    late = Conversation(turns)
    assert [question.text for question in questions([early, late], r, 2, 10_000)] == ["Three?"]
