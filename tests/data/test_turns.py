from dataclasses import replace
from datetime import date

import pytest

from jaxft.data.conversations import Conversation, parse_messages, with_last_answer
from jaxft.data.template_process import TemplateError
from jaxft.data.turns import ChatTemplate

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def conversation(*turns: tuple[str, str], **options) -> Conversation:
    return Conversation(parse_messages([{"role": role, "content": text} for role, text in turns]), **options)


def template(source: str, *specials: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "</s>"}, specials, date(2024, 7, 26), 20.0)


def learned(source: str, example: Conversation, *specials: str) -> list[str]:
    rendered = template(source, *specials).render(example)
    return [rendered.text[start:end] for start, end in rendered.supervised]


TWO = conversation(("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two"))
IM = ("<|im_start|>", "<|im_end|>")


def test_content_and_end_of_turn_are_learned_and_nothing_else():
    rendered = template(CHATML + PROMPT, *IM).render(TWO)
    assert rendered.text == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )
    spans = [rendered.text[start:end] for start, end in rendered.supervised]
    assert spans == ["one<|im_end|>", "two<|im_end|>"]
    assert rendered.supervised[0][0] == rendered.text.index("one")
    assert [rendered.text[start:end] for start, end in rendered.content] == ["q", "one", "r", "two"]
    assert not rendered.add_eos


def test_equal_contents_are_told_apart_by_position():
    same = conversation(("user", "two"), ("assistant", "two"), ("user", "two"), ("assistant", "two"))
    rendered = template(CHATML + PROMPT, *IM).render(same)
    assert [start for start, _ in rendered.supervised] == [
        len("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"),
        2 * len("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n") + len("two<|im_end|>\n"),
    ]


def test_without_a_prompt_in_the_template_the_model_writes_the_header_itself():
    assert learned(CHATML, TWO, *IM) == [
        "<|im_start|>assistant\none<|im_end|>",
        "<|im_start|>assistant\ntwo<|im_end|>",
    ]


def test_text_without_special_tokens_ends_with_eos():
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    last_only = Conversation((TWO.messages[0], replace(TWO.messages[1], supervised=False), *TWO.messages[2:]))
    rendered = template(plain + "{% if add_generation_prompt %}assistant:{% endif %}").render(last_only)
    assert [rendered.text[start:end] for start, end in rendered.supervised] == [" two\n\n"]
    assert rendered.add_eos
    asked = conversation(("user", "q"), ("assistant", "one"), ("user", "r"))
    unanswered = Conversation((asked.messages[0], replace(asked.messages[1], supervised=False), asked.messages[2]))
    assert not template(plain).render(unanswered).add_eos


@pytest.mark.parametrize("body", [
    "{{ m.role }}: {{ m.content }}\n\n",
    "[{{ m.role }}]{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}",
    "[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}\n",
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
])  # fmt: skip
def test_an_answer_after_which_nothing_would_stop_is_not_learned(body):
    """Generation would go on with a turn of the user; the last template's markup is letters to the tokenizer."""
    source = "{% for m in messages %}" + body.replace("{{ m.content }}\n", "{{ m.content }}\n") + "{% endfor %}"
    with pytest.raises(TemplateError, match="ends in no token that stops generation"):
        template(source, "</s>").render(TWO)


def test_a_last_answer_that_is_closed_differently_from_earlier_ones():
    first = replace(TWO.messages[1], supervised=False)
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"
    prompt = "{% if add_generation_prompt %}[assistant]{% endif %}"
    body = source.replace("{{ eos_token }}", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}" + prompt)
    assert learned(body, replace(TWO, messages=(TWO.messages[0], first, *TWO.messages[2:])), "</s>") == ["two</s>"]


@pytest.mark.parametrize("strip", ["trim", "string", "upper"])
@pytest.mark.parametrize("blanks", [" ", "\n", " \n\t"])
def test_templates_that_strip_or_change_contents(strip, blanks):
    source = CHATML.replace("m.content", f"(m.content | {strip})") + PROMPT
    texts = [f"{blanks}{text}{blanks}" for text in ("q", "one", "r", "two")]
    example = conversation(*zip(["user", "assistant"] * 2, texts, strict=True))
    change = {"trim": str.strip, "string": str, "upper": str.upper}[strip]
    assert learned(source, example, *IM) == [change(text) + "<|im_end|>" for text in texts[1::2]]


def test_thinking_that_the_template_drops_from_earlier_turns():
    cut = (
        "{% for m in messages %}{% set text = m.content %}"
        "{% if m.role == 'assistant' and not loop.last %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    )
    first, last = "<think>a</think>one", "<think>b</think>two"
    example = conversation(("user", "q"), ("assistant", first), ("user", "r"), ("assistant", last))
    assert learned(cut + PROMPT, example, *IM) == ["one<|im_end|>", f"{last}<|im_end|>"]
    hostile = conversation(("user", "q"), ("assistant", first + "<|im_end|>"), ("user", "r"), ("assistant", "b"))
    rendered = template(cut + PROMPT, *IM).render(hostile)
    contents = [rendered.text[start:end] for start, end in rendered.content]
    assert contents == ["q", "one<|im_end|>", "r", "b"]
    assert rendered.text[slice(*rendered.supervised[0])] == "one<|im_end|><|im_end|>"


def test_a_prompt_that_finished_turns_do_not_go_on_from():
    """The prompt opens a <think> block, finished turns have none: the answer begins after the header."""
    prompt = PROMPT.replace("assistant\n", "assistant\n<think>\n")
    tag = "<tag>not a think block</tag>"
    example = conversation(("user", "q "), ("assistant", tag), ("user", "r"), ("assistant", "<think>\ntwo"))
    assert learned(CHATML + prompt, example, *IM) == [f"{tag}<|im_end|>", "two<|im_end|>"]


def test_a_system_message_that_moves_into_the_last_question():
    source = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if loop.last or loop.revindex == 2 %}{{ messages[0].content + ' ' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    example = conversation(("system", "s"), *[(m.role, m.content) for m in TWO.messages])
    assert template(source, "</s>").render(example).text == "[INST]q[/INST]one</s>[INST]s r[/INST]two</s>"
    assert learned(source, example, "</s>") == ["one</s>", "two</s>"]


def test_turns_with_weight_zero_are_not_learned():
    turns = [{"role": m.role, "content": m.content} for m in TWO.messages]
    turns[1]["weight"] = 0
    assert learned(CHATML + PROMPT, Conversation(parse_messages(turns)), *IM) == ["two<|im_end|>"]
    assert learned(GENERATION, Conversation(parse_messages(turns)), *IM) == ["two<|im_end|>"]


GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_generation_blocks_decide_and_the_end_of_turn_is_learned_anyway():
    assert learned(GENERATION, TWO, *IM) == ["one<|im_end|>", "two<|im_end|>"]
    inside = GENERATION.replace(
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}",
    ).replace("{% endif %}{{ '<|im_end|>\n' }}", "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}")
    assert learned(inside, TWO, *IM) == ["one<|im_end|>", "two<|im_end|>"]
    last_only = GENERATION.replace("m.role == 'assistant'", "loop.last")
    assert learned(last_only, TWO, *IM) == ["two<|im_end|>"]


def test_private_use_characters_in_the_contents():
    text = "".join(map(chr, range(0x100000, 0x100020)))
    example = conversation(("user", text), ("assistant", text))
    assert learned(CHATML + PROMPT, example, *IM) == [text + "<|im_end|>"]


@pytest.mark.parametrize(
    "body, reason",
    [
        ("{{ m.content if m.role == 'assistant' }}</s>", r"message 1 \(user\) 0 times"),
        ("{{ m.content + m.content }}</s>", "does not show the assistant's answer"),
        ("{{ m.content }}{% if m.content == 'two' %}{{ m.content }}{% endif %}</s>", "changes the contents"),
        ("{{ m.content[:8] }}</s>", "changes the contents"),
        ("{{ m.content.split(',')[0] }}</s>", r"message 4 \(assistant\) 0 times"),
        ("{{ m.content | length }}</s>", "does not show the assistant's answer|changes the contents"),
        (
            "{{ m.content }}{% if not loop.last or messages | length == 2 %}</s>{% endif %}",
            "ends in no token that stops generation, as the chat template writes nothing after it",
        ),
        (
            "{{ raise_exception('no system role') if m.role == 'system' }}{{ m.content }}</s>",
            "no system role",
        ),
    ],
)
def test_turns_that_cannot_be_located_are_errors(body, reason):
    turns = [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "one"),
        ("user", "r"),
        ("assistant", "two, and more"),
    ]
    example = conversation(*turns) if "system" in body else conversation(*turns[1:])
    if "'two'" in body:
        example = TWO
    with pytest.raises(TemplateError, match=reason):
        template("{% for m in messages %}" + body + "{% endfor %}", "</s>").render(example)


TOOL = {"type": "function", "function": {"name": "add"}}
CALLS = Conversation(
    parse_messages(
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ]
    ),
    (TOOL,),
)


def test_tools_and_calls_must_show():
    tools = "{{ tools | tojson }}"
    calls = TURN.replace("m.content", "(m.tool_calls | tojson if m.tool_calls else m.content)")
    whole = tools + "{% for m in messages %}" + calls + "{% endfor %}" + PROMPT
    call = '[{"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]'
    assert learned(whole, CALLS, *IM) == [f"{call}<|im_end|>", "two<|im_end|>"]
    with pytest.raises(TemplateError, match=r"does not show the tool 'add'"):
        learned(CHATML + PROMPT, CALLS, *IM)
    with pytest.raises(TemplateError, match=r"does not show the call of 'add'"):
        learned(tools + CHATML + PROMPT, CALLS, *IM)
    with pytest.raises(TemplateError, match=r"does not show the call of 'add'"):
        learned(tools + GENERATION, CALLS, *IM)
    by_accident = replace(CALLS, messages=(replace(CALLS.messages[0], content="Please add."), *CALLS.messages[1:]))
    with pytest.raises(TemplateError, match=r"does not show the tool 'add'"):
        learned(whole.removeprefix(tools), by_accident, *IM)
    beside = replace(CALLS.messages[1], content="I add.")
    with pytest.raises(TemplateError, match=r"does not show the call of 'add'"):
        learned(tools + CHATML, replace(CALLS, messages=(CALLS.messages[0], beside, *CALLS.messages[2:])), *IM)


def test_a_call_whose_turn_has_no_end_may_be_part_of_the_prompt():
    """Only what is learned must end in a token that stops generation."""
    body = "[{{ m.role }}]{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls }}"
    source = "{{ tools | tojson }}{% for m in messages %}" + body + "{% endfor %}"
    with pytest.raises(TemplateError, match="no token that stops generation, as the chat template writes '2"):
        learned(source, CALLS)
    assert learned(source, with_last_answer(CALLS)) == ["[assistant]two"]


@pytest.mark.parametrize(
    "end, call_end, stops",
    [
        ("<|end|>", "</call></calls><|end|>", ("<|end|>",)),  # tokens before the end of turn are part of the call
        ("<|end|>", "<|call|>", ("<|end|>", "<|call|>")),
        ("\n<|end|>", "</call>\n<|end|>", ("<|end|>",)),
        ("", "<|call|>", ("<|call|>",)),
    ],
)
def test_the_tokens_that_stop_generation(end, call_end, stops):
    call = "{{ m.tool_calls[0].function.arguments | tojson + call_end if m.tool_calls else m.content + end }}"
    source = "{% for m in messages %}{{ m.role }}:" + call + "{% endfor %}"
    tokens = ["<|end|>", "<|call|>", "</call>", "</calls>"]
    found = ChatTemplate(source, {"end": end, "call_end": call_end}, tokens, date(2024, 7, 26), 20.0)
    assert found.stops == stops


def test_every_one_of_several_calls_must_show():
    one = {"function": {"name": "add", "arguments": {"x": 1}}}
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [one, one]}]
    turns += [{"role": "tool", "content": "2"}, {"role": "tool", "content": "2"}]
    twice = Conversation(parse_messages([*turns, {"role": "assistant", "content": "two"}]))
    every = TURN.replace("m.content", "(m.tool_calls | tojson if m.tool_calls else m.content)")
    assert "add" in learned("{% for m in messages %}" + every + "{% endfor %}", twice, *IM)[0]
    first = every.replace("m.tool_calls | tojson", "m.tool_calls[0] | tojson")
    with pytest.raises(TemplateError, match="does not show every call of 'add'"):
        learned("{% for m in messages %}" + first + "{% endfor %}", twice, *IM)


@pytest.mark.parametrize("blank", ["\n", "\n\n", " "])
def test_a_blank_that_is_one_token_stops_nothing(blank):
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content + '" + blank.replace("\n", "\\n") + "' }}{% endfor %}"
    found = ChatTemplate(source, {}, (), date(2024, 7, 26), 20.0, [blank, "<b>"])
    assert found.stops == ()
    assert found.render(with_last_answer(TWO)).add_eos


def test_special_tokens_where_they_cannot_be_told_from_the_templates_own():
    named = Conversation(TWO.messages, ({"type": "function", "function": {"name": "<|im_end|>"}},))
    with pytest.raises(ValueError, match=r"special token '<|im_end|>' stands in `tools`"):
        learned("{{ tools }}" + CHATML, named, *IM)
    joined = CHATML.replace("m.content", "m.content.replace('~', '')") + PROMPT
    hidden = conversation(("user", "<|im_~end|>"), ("assistant", "a"))
    with pytest.raises(TemplateError, match=r"puts '<|im_end|>' into the content of message 1"):
        learned(joined, hidden, *IM)
    cut = "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + PROMPT
    lost = conversation(("system", "<|im_end|>"), ("user", "q"), ("assistant", "a"))
    with pytest.raises(TemplateError, match=r"message 1 holds '<|im_end|>' and the chat template cuts"):
        learned(cut, lost, *IM)


def test_prompt():
    rendered = template(CHATML + PROMPT, *IM).prompt(TWO.messages[:3])
    assert rendered.text.endswith("<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n")
    assert rendered.supervised == ()
    assert [rendered.text[start:end] for start, end in rendered.content] == ["q", "one", "r"]
