import pytest

from jaxft.data.conversations import Message, parse_messages, parse_tools


def turns(*pairs: tuple[str, object]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_roles_and_keys_in_all_spellings():
    expected = (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a", supervised=True),
        Message("user", "r"),
    )
    pairs = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r")]
    assert parse_messages(turns(*pairs)) == expected
    assert parse_messages(turns(("developer", "s"), *pairs[1:])) == expected
    sharegpt = [("system", "s"), ("human", "q"), ("gpt", "a"), ("human", "r")]
    assert parse_messages([{"from": role, "value": text} for role, text in sharegpt]) == expected


def test_content_in_parts_and_columns_that_hold_none():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": " b"}]
    answer = {"role": "assistant", "content": "c", "tool_calls": None, "weight": None, "from": None}
    assert [m.content for m in parse_messages([*turns(("user", parts)), answer])] == ["a b", "c"]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weights_choose_what_is_learned(key):
    question = {"role": "user", "content": "q", key: 0}
    given = [question, {"role": "assistant", "content": "a", key: 0.0}, question]
    messages = parse_messages([*given, {"role": "assistant", "content": "b", key: 1.0}])
    assert [message.supervised for message in messages] == [False, False, False, True]
    for weight, reason in [(0.5, "learned .1. or not"), (-1, "learned .1. or not")]:
        with pytest.raises(ValueError, match=rf"message 2: `{key}` is {weight}; .*{reason}"):
            parse_messages([question, {"role": "assistant", "content": "a", key: weight}])
    with pytest.raises(ValueError, match=r"message 1: .*only assistant messages can be learned"):
        parse_messages([{**question, key: 1}, *turns(("assistant", "a"))])


@pytest.mark.parametrize(
    "given, reason",
    [
        ([], "the list of messages is empty"),
        ("text", "must be a list, not str"),
        (None, "must be a list, not NoneType"),
        (["hi"], "message 1: must be an object, not str"),
        ([{"content": "q"}], "message 1: no `role` .nor `from`.; there are: content"),
        (turns(("moderator", "q")), "message 1: unknown role 'moderator'; known roles: system"),
        (turns((7, "q")), "message 1: unknown role 7"),
        (turns(("user", None), ("assistant", "a")), "message 1: `content` of the user message is missing"),
        ([{"role": "user"}], "message 1: `content` of the user message is missing"),
        (
            turns(("user", "q"), ("assistant", " \n")),
            "message 2: `content` of the assistant message is empty",
        ),
        (turns(("user", 5)), "message 1: .* must be text, not int"),
        (turns(("user", "\ud800")), "message 1: .* half of a surrogate pair"),
        (turns(("user", [{"type": "image_url"}])), "content of type 'image_url' is not supported"),
        (turns(("user", [{"type": "text"}])), "the text of a content part is missing"),
        (
            [*turns(("user", "q")), {"role": "assistant", "content": "a", "reasoning_content": "r"}],
            "not supported",
        ),
        (turns(("user", "q")), "no assistant message"),
        (turns(("assistant", "a")), "message 1: role assistant comes first; expected system or user"),
        (turns(("user", "q"), ("system", "s"), ("assistant", "a")), "message 2: role system follows user"),
        (turns(("system", "s"), ("system", "s")), "message 2: role system follows system; expected user"),
        (
            turns(("user", "q"), ("assistant", "a"), ("assistant", "b")),
            "message 3: role assistant follows assistant",
        ),
        (turns(("user", "q"), ("user", "q"), ("assistant", "b")), "message 2: role user follows user"),
        (turns(("user", "q"), ("assistant", "a"), ("tool", "t")), "message 3: role tool follows assistant"),
    ],
)
def test_what_cannot_be_rendered_as_meant(given, reason):
    with pytest.raises(ValueError, match=reason):
        parse_messages(given)


def test_tool_calls_of_openai_and_sharegpt_are_the_same():
    call = {"name": "add", "arguments": {"x": 1}}
    openai = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {**call, "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "a"},
    ]
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
        {"from": "observation", "value": ""},
        {"from": "gpt", "value": "a"},
    ]
    expected = {"id": "call00000", "type": "function", "function": call}
    messages = parse_messages(openai)
    assert messages == parse_messages(sharegpt)
    assert messages[1] == Message("assistant", "", True, (expected,))
    assert messages[2] == Message("tool", "", tool_call_id="call00000")


def test_several_calls_are_answered_in_order_unless_the_results_say_otherwise():
    calls = [{"id": name, "function": {"name": name, "arguments": {}}} for name in ("one", "two", "three")]
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]
    results = [{"role": "tool", "content": "r", "tool_call_id": given} for given in ("two", None, None)]
    messages = parse_messages([*asked, *results])
    assert [message.tool_call_id for message in messages[2:]] == ["two", "one", "three"]


@pytest.mark.parametrize(
    "call, reason",
    [
        ({"function": {"name": "f", "arguments": "{x}"}}, "arguments of f are not JSON"),
        ({"function": {"name": "f", "arguments": [1]}}, "arguments of f must be an object"),
        ({"function": {"arguments": {}}}, "without a function name"),
        ("f", "without a function name"),
    ],
)
def test_bad_tool_calls(call, reason):
    with pytest.raises(ValueError, match=rf"message 2: .*{reason}"):
        parse_messages([{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}])


def test_calls_by_others_and_calls_that_are_no_json():
    calls = [{"function": {"name": "f"}}]
    with pytest.raises(ValueError, match=r"tool calls by role user"):
        parse_messages([{"role": "user", "content": "q", "tool_calls": calls}])
    with pytest.raises(ValueError, match=r"message 2: the function call is not JSON"):
        parse_messages([{"from": "human", "value": "q"}, {"from": "function_call", "value": "add(1)"}])


def test_tools():
    function = {"name": "add", "parameters": {}}
    wrapped = {"type": "function", "function": function}
    assert parse_tools([function]) == parse_tools([wrapped]) == (wrapped,)
    assert parse_tools('[{"name": "add", "parameters": {}}]') == (wrapped,)
    assert parse_tools(None) == parse_tools("[]") == parse_tools("") == ()
    for bad, reason in [("{", "not JSON"), ({"name": "f"}, "must be a list"), ([{"x": 1}], "without a name")]:
        with pytest.raises(ValueError, match=reason):
            parse_tools(bad)
