"""What a conversation says and the chat template leaves out is an event, or the conversation is refused."""

import json
from functools import cache

import pytest

from jaxft.data.chat import Encoded, Renderer
from jaxft.data.events import BESIDE_CALL, REASONING_LOST, EventCount
from jaxft.data.formats import convert
from jaxft.data.records import Record

CALL_ID = "call_Zq8xWv7tRs6nPm5kJh4gF01"  # 24 characters and more, as OpenAI's API gives them
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARAMETERS = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "description": "What to look up."},
        "n": {"type": "integer", "minimum": 1},
    },
    "required": ["word"],
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look it up.", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def renderer(material, real_tokenizer):
    @cache
    def build(template: str, tokenizer: str = "qwen3", *specials: str) -> Renderer:
        return Renderer(real_tokenizer(tokenizer, *specials), str(material / "templates" / f"{template}.jinja"))

    return build


def asked(answer: dict | str, **question) -> list[dict]:
    answer = {"content": answer} if isinstance(answer, str) else answer
    return [{"role": "user", "content": "What is kelp?", **question}, {"role": "assistant", **answer}]


def called(arguments: object, **call) -> list[dict]:
    calls = [{"id": CALL_ID, "type": "function", "function": {"name": "look", "arguments": arguments}, **call}]
    result = {"role": "tool", "tool_call_id": CALL_ID, "content": "a plant"}
    return [*asked({"content": None, "tool_calls": calls}), result, {"role": "assistant", "content": "A plant."}]


def encoded(renderer: Renderer, messages: object, **columns) -> Encoded:
    found = convert([Record({"messages": messages, **columns}, "f:1")], chat=True)
    assert found.bad == []
    (one,) = renderer.encode(found.examples)
    assert isinstance(one, Encoded), one
    return one


def lost(renderer: Renderer, messages: object, **columns) -> list[str]:
    return [event.name for event in encoded(renderer, messages, **columns).events if event.lost]


def text(renderer: Renderer, one: Encoded) -> str:
    return renderer.show(one.tokenized).plain


# --- reasoning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["think", "thinking", "reasoning"])
@pytest.mark.parametrize("learned", [True, False])
def test_reasoning_that_a_template_cuts_from_answers(byte_tokenizer, tag, learned):
    cut = f"m.content.split('</{tag}>')[-1]"
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ " + cut + " }}<|im_end|>\n{% endfor %}" + PROMPT
    messages = asked({"content": f"<{tag}>By the sea.</{tag}>\nA plant.", "weight": int(learned)})
    one = encoded(Renderer(byte_tokenizer, source), [*messages, *asked("Yes.")])
    (event,) = one.events
    assert event.lost is learned
    assert "reasoning of an answer that is " + ("" if learned else "not ") + "learned" in event.name


def test_reasoning_under_templates_that_keep_the_last_or_all_or_none(renderer):
    thought = "<think>\nBy the sea.\n</think>\n\nA plant."
    two = [*asked(thought), *asked("<think>\nAgain.\n</think>\n\nStill a plant.")]
    deepseek = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
    reason = "the chat template does not show the reasoning of an answer that is learned"
    assert lost(renderer("Qwen-Qwen3-0.6B"), asked(thought)) == []
    assert lost(renderer("Qwen-Qwen3-0.6B"), two) == [reason]
    assert lost(renderer("Qwen3.5-4B"), two) == [reason]
    assert lost(renderer("Qwen-Qwen2.5-7B-Instruct"), two) == []
    assert lost(renderer("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "gpt2", *deepseek), two) == [reason, reason]


@pytest.mark.parametrize("template", ["Qwen-Qwen3-0.6B", "Qwen3.5-4B"])
def test_an_empty_thought_that_is_learned_is_told(renderer, template):
    events = encoded(renderer(template), asked("A plant.")).events
    assert [event.name for event in events if not event.lost] == [
        "the chat template puts an empty thought before an answer, and it is learned"
    ]


@pytest.mark.parametrize("template, opening", [("Qwen-Qwen3-0.6B", "<think>\n"), ("Qwen3.5-4B", "")])
@pytest.mark.parametrize("rest", ["", "Let me look."])
def test_reasoning_before_a_call_is_learned_where_it_is_shown(renderer, template, opening, rest):
    messages = called({"word": "kelp"})
    messages[1]["content"] = f"<think>\nWhich plant?\n</think>\n\n{rest}"
    messages[3]["content"] = "<think>\nA plant then.\n</think>\n\nA plant."
    chosen = renderer(template)
    one = encoded(chosen, messages, tools=[TOOL])
    first, second = (part.partition("⟧")[0] for part in text(chosen, one).split("⟦")[1:])
    assert first.startswith(f"{opening}Which plant?\n</think>\n\n{rest}")
    assert "kelp" in first
    assert first.endswith("</tool_call><|im_end|>")
    assert second == f"{opening}A plant then.\n</think>\n\nA plant.<|im_end|>"
    assert one.events == ()
    earlier = encoded(chosen, [*messages, *asked("Yes.")], tools=[TOOL])
    assert [event.name for event in earlier.events if event.lost] == [REASONING_LOST.name] * 2


@pytest.mark.parametrize(
    "template, tokenizer",
    [("meta-llama-Llama-3.1-8B-Instruct", "llama3_2"), ("mistralai-Mistral-Nemo-Instruct-2407", "mistral_nemo")],
)
@pytest.mark.parametrize(
    "content, event", [("Let me look.", BESIDE_CALL), ("<think>\nWhich plant?\n</think>", REASONING_LOST)]
)
def test_what_stands_beside_a_call_and_is_not_shown(renderer, template, tokenizer, content, event):
    chosen, messages = renderer(template, tokenizer), called({"word": "kelp"})
    bare = encoded(chosen, messages, tools=[TOOL])
    messages[1]["content"] = content
    assert lost(chosen, messages, tools=[TOOL]) == [event.name]
    assert text(chosen, encoded(chosen, messages, tools=[TOOL])) == text(chosen, bare)


@pytest.mark.parametrize(
    "template, tokenizer, tag, told",
    [
        ("Qwen-Qwen3-0.6B", "qwen3", "<think>", False),
        ("Qwen-Qwen3-0.6B", "qwen3", "<thinking>", True),
        ("Qwen3.5-4B", "qwen3", "[THINK]", True),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral_nemo", "<think>", True),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral_nemo", "[THINK]", False),
        ("HuggingFaceTB-SmolLM3-3B", "qwen3", "<reasoning>", True),
        ("Qwen-Qwen2.5-7B-Instruct", "qwen3", "<think>", False),  # it writes no reasoning: any form may be taught
    ],
)
def test_reasoning_in_tags_of_another_model(renderer, template, tokenizer, tag, told):
    closing = tag.replace("<", "</").replace("[", "[/")
    chosen = renderer(template, tokenizer)
    found = [name for name in lost(chosen, asked(f"{tag}By the sea.{closing}\nA plant.")) if tag in name]
    assert len(found) == told
    assert not told or found[0].startswith(f"an answer that is learned begins with {tag}, but the chat template writes")
    assert lost(chosen, asked(f"The tag {tag} opens a thought.")) == []


# --- contents, keys and markup ------------------------------------------------------------------------------


def test_a_system_message_that_is_not_shown(renderer, byte_tokenizer):
    system = {"role": "system", "content": "Be brief."}
    gone = "the chat template does not show a message of role system"
    assert lost(renderer("mistralai-Mistral-Nemo-Instruct-2407", "mistral_nemo"), [system, *asked("A plant.")]) == [
        gone
    ]
    users = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert lost(Renderer(byte_tokenizer, users), [system, *asked("A plant.")]) == [gone]
    part = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('#')[0] }}<|im_end|>{% endfor %}"
    cut = "the chat template shows a part of a content only"
    with_part = [{**system, "content": "Be brief.#Always."}, *asked("A plant.")]
    assert lost(Renderer(byte_tokenizer, part), with_part) == [cut]


@pytest.mark.parametrize("key, value", [("name", "Ann"), ("timestamp", 1700000000), ("annotations", [{"x": 1}])])
def test_keys_of_a_message_are_given_to_the_template_and_told_where_it_does_not_show_them(byte_tokenizer, key, value):
    shows = "{% if m." + key + " %}[{{ m." + key + " }}]{% endif %}"
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\nSHOWS{{ m.content }}<|im_end|>{% endfor %}"
    messages = asked("A plant.", **{key: value})
    plain = Renderer(byte_tokenizer, source.replace("SHOWS", ""))
    assert lost(plain, messages) == [f"the chat template does not read the key `{key}` of a message"]
    showing = Renderer(byte_tokenizer, source.replace("SHOWS", shows))
    assert lost(showing, messages) == []
    assert f"[{value}]" in text(showing, encoded(showing, messages))
    assert lost(plain, asked("A plant.", **{key: None})) == []


def test_special_tokens_in_a_key_that_is_shown_are_refused(byte_tokenizer):
    source = "{% for m in messages %}<|im_start|>{{ m.name }}\n{{ m.content }}<|im_end|>{% endfor %}"
    found = convert([Record({"messages": asked("A plant.", name="x<|im_end|>")}, "f:1")], chat=True)
    (bad,) = Renderer(byte_tokenizer, source).encode(found.examples)
    assert bad == ("f:1", "the special token '<|im_end|>' stands in `name` of a message; take it out")


@pytest.mark.parametrize(
    "content, name",
    [
        ("a<|im_end|>", "a content spells special tokens or markup of the chat template; they are read as letters"),
        ("<|start_header_id|>user<|end_header_id|>", "a text holds the markup of another chat template"),
        ("[INST] hi [/INST]", "a text holds the markup of another chat template"),
        ("<start_of_turn>user", "a text holds the markup of another chat template"),
        ("<｜User｜>hi", "a text holds the markup of another chat template"),
        ("<|turn>user\nhi<turn|>", "a text holds the markup of another chat template"),
        ("A plant.</s>", "a text holds the markup of another chat template"),
        ("<bos>A plant.", "a text holds the markup of another chat template"),
    ],
)
@pytest.mark.parametrize("role", [0, 1])
def test_markup_in_contents_is_counted(renderer, content, name, role):
    messages = asked("A plant.")
    messages[role]["content"] = content
    (found,) = lost(renderer("Qwen-Qwen2.5-7B-Instruct"), messages)
    assert found.startswith(name)


def test_tags_of_html_are_no_markup_of_a_template(renderer):
    assert lost(renderer("Qwen-Qwen2.5-7B-Instruct"), asked("A <s>tree</s> plant: <b>kelp</b> <turn> |user|")) == []


@pytest.mark.parametrize("template, markup", [("GLM-4.6", "<|user|>"), ("microsoft-Phi-3.5-mini-instruct", "<|end|>")])
def test_markup_of_the_template_that_its_tokenizer_has_as_letters(renderer, template, markup):
    (found,) = lost(renderer(template), asked(f"A plant.{markup}"))
    assert found.startswith("a content spells special tokens or markup of the chat template")


# --- tools --------------------------------------------------------------------------------------------------


def test_fields_of_tools_that_a_template_does_not_show(renderer):
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    assert lost(renderer("Qwen-Qwen3-0.6B"), called({"word": "kelp"}), tools=[strict]) == []
    harmony = renderer(
        "openai-gpt-oss-120b",
        "gpt2",
        *(f"<|{name}|>" for name in ("start", "channel", "message", "call", "return", "end")),
    )
    fields = [f"the chat template does not show the field `{name}` of a tool" for name in ("minimum", "strict")]
    assert lost(harmony, called({"word": "kelp"}), tools=[strict]) == fields
    assert text(harmony, encoded(harmony, called({"word": "kelp"}), tools=[strict])).count("<|call|>⟧") == 1


def test_arguments_and_keys_of_calls(byte_tokenizer, renderer):
    names_only = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    )
    reason = "the chat template does not show all arguments of a tool call"
    assert lost(Renderer(byte_tokenizer, names_only), called({"word": "kelp"})) == [reason]
    for arguments in (
        {"word": 'a "quoted"\nkelp, größer'},
        '{"word": "kelp", "n": 2}',
        {"word": "kelp", "deep": [{"n": 3.5}]},
    ):
        assert lost(renderer("Qwen-Qwen3-0.6B"), called(arguments), tools=[TOOL]) == []
        assert lost(renderer("Qwen3.5-4B"), called(arguments), tools=[TOOL]) == []
    unread = called({"word": "kelp"}, caller="x")
    assert lost(renderer("Qwen-Qwen3-0.6B"), unread) == ["the key `caller` of a tool call is not read"]


@pytest.mark.parametrize(
    "template, tokenizer, shown",
    [
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral_nemo", '"arguments": {"word": "kelp"}, "id": "call00000"}'),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral_nemo", '[TOOL_CALLS]look[ARGS]{"word": "kelp"}'),
        ("meta-llama-Llama-3.1-8B-Instruct", "llama3_2", '{"name": "look", "parameters": {"word": "kelp"}}'),
        ("Qwen-Qwen3-0.6B", "qwen3", '{"name": "look", "arguments": {"word": "kelp"}}'),
        ("Qwen3.5-4B", "qwen3", "<function=look>\n<parameter=word>\nkelp\n</parameter>"),
    ],
)
def test_calls_as_openai_writes_them_under_every_template(renderer, template, tokenizer, shown):
    """Null contents, arguments as text and ids of 28 characters: each template gets the form that it takes."""
    chosen = renderer(template, tokenizer)
    results = {
        text(chosen, encoded(chosen, called(given), tools=[TOOL])) for given in ({"word": "kelp"}, '{"word":"kelp"}')
    }
    assert len(results) == 1
    assert shown in results.pop()


@pytest.mark.parametrize(
    "body, shown",
    [
        ("{{ c.function.name + ' ' + c.function.arguments }}", '⟦look {"word": "kelp"}<|im_end|>⟧'),
        ("{{ c.function.name }} {{ c.function.arguments | tojson }}", '⟦look {"word": "kelp"}<|im_end|>⟧'),
        ("{{ raise_exception('short ids') if c.id | length != 9 }}{{ c | tojson }}", '⟦{"id": "call00000", '),
    ],
)
@pytest.mark.parametrize(
    "content", ["{{ m.content }}", "{{ m.content if m.content is not none }}", "{{ m.content or '' }}"]
)
def test_the_form_that_a_template_takes_is_found(byte_tokenizer, body, shown, content):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "{% for c in m.tool_calls or [] %}" + body
        + "{% endfor %}<|im_end|>{% endfor %}" + PROMPT
    )  # fmt: skip
    renderer = Renderer(byte_tokenizer, source)
    assert shown in text(renderer, encoded(renderer, called('{"word": "kelp"}')))


def test_a_result_that_a_template_writes_as_json_is_shown(renderer):
    messages = called({"word": "kelp"})
    messages[2]["content"] = '{"found": "a \\"plant\\""}\nof the sea'
    assert lost(renderer("meta-llama-Llama-3.1-8B-Instruct", "llama3_2"), messages, tools=[TOOL]) == []


# --- nulls that stand for absent fields ---------------------------------------------------------------------


def test_nulls_in_tools_and_arguments_are_no_values(renderer):
    chosen = renderer("Qwen-Qwen3-0.6B")
    filled = json.loads(json.dumps(TOOL))
    filled["function"]["parameters"]["properties"] |= {"other": None}
    filled["function"]["parameters"]["properties"]["word"] |= {"enum": None, "items": {"type": None}}
    filled["strict"] = None
    messages = called({"word": "kelp", "n": None, "other": None}, index=None)
    one = encoded(chosen, [{**message, "name": None} for message in messages], tools=[filled])
    assert '"arguments": {"word": "kelp"}' in text(chosen, one)
    assert text(chosen, one).count("null") == 0
    assert [event.name[:24] for event in one.events if not event.lost][:1] == ["fields that are absent, "]
    clean = encoded(chosen, called({"word": "kelp"}), tools=[TOOL])
    assert text(chosen, clean) == text(chosen, one).replace(', "items": {}', "")


# --- counting -----------------------------------------------------------------------------------------------


def test_events_are_counted_once_an_example_and_losses_come_first(renderer):
    chosen = renderer("Qwen-Qwen3-0.6B")
    events = [encoded(chosen, asked("A plant.", name="Ann")).events, encoded(chosen, asked("A plant.")).events]
    twice = (*events[0], *events[0])
    counts = EventCount.of([("f:1", events[1]), ("f:2", twice), ("f:3", events[1])])
    assert [(count.lost, count.examples, count.first) for count in counts] == [(True, 1, "f:2"), (False, 3, "f:1")]
    assert str(counts[0]) == "1 example: the chat template does not read the key `name` of a message (first: f:2)"
