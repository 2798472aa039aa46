import json

import pytest

from jaxft.data.conversations import Message, parse_messages
from jaxft.data.events import FILLED_NULLS, RESULT_OF_NO_CALL
from jaxft.data.tool_calls import parse_tools


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


def test_results_that_name_no_call_are_given_to_the_first_that_waits():
    calls = [{"id": "a", "function": {"name": "f"}}, {"id": "b", "function": {"name": "f"}}]
    without = [{"function": {"name": "f"}}] * 2
    for given, results, expected, told in [
        (calls, ["x", "a"], ["a", "b"], 2),  # the first took the call of the second
        (calls, ["a", "a"], ["a", "b"], 1),
        (calls, ["b", "y"], ["b", "a"], 1),
        (calls, ["b", "a"], ["b", "a"], 0),
        (without, ["x", "y"], ["call00000", "call00001"], 0),  # the calls have no ids: their order is meant
        ([calls[0], calls[0]], ["a", "a"], ["a", "a"], 0),
    ]:
        asked = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": given}]
        messages = parse_messages([*asked, *({"role": "tool", "content": "r", "tool_call_id": id} for id in results)])
        assert [message.tool_call_id for message in messages[2:]] == expected
        assert sum(message.events.count(RESULT_OF_NO_CALL) for message in messages) == told


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


@pytest.mark.parametrize(
    "schema, kept",
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, True),  # as pydantic writes Optional
        ({"type": ["integer", "null"], "default": None}, True),
        ({"oneOf": [{"type": "null"}], "default": None}, True),
        ({"const": None}, True),
        ({"type": "null", "const": None}, True),
        ({"type": "string", "const": None}, False),
        ({"type": "string", "default": None}, False),  # as Arrow fills it in
        ({"anyOf": None, "type": "string", "default": None, "enum": None}, False),
    ],
)
def test_a_null_that_a_schema_means_stays(schema, kept):
    (tool,), events = parse_tools([{"name": "f", "parameters": {"properties": {"x": schema}}}])
    found = tool["function"]["parameters"]["properties"]["x"]
    assert found == (schema if kept else {"type": "string"})
    assert (events == ()) is kept


def test_a_parameter_may_have_the_name_of_a_word_of_a_schema():
    filled = {"default": {"type": "string", "enum": None}, "const": None, "enum": {"type": "string", "items": None}}
    meant = {"default": {"type": "string"}, "enum": {"type": "string"}}
    for where in ("properties", "$defs"):
        (tool,), _ = parse_tools([{"name": "f", "parameters": {where: filled}}])
        assert tool["function"]["parameters"] == {where: meant}


PLACE = {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": ["string", "null"]}}}


@pytest.mark.parametrize(
    "given, kept",
    [
        ({"n": None, "word": "kelp"}, {"word": "kelp"}),  # optional, and no null: left out by its writer
        ({"word": None}, {"word": None}),  # required: it was written
        ({"word": "a", "any": None, "other": None}, {"word": "a", "any": None}),
        ({"word": "a", "place": {"city": None, "zip": None, "x": None}}, {"word": "a", "place": {"zip": None}}),
        ({"word": "a", "places": [{"city": "b", "x": None}, None]}, {"word": "a", "places": [{"city": "b"}, None]}),
        ({"word": "a", "free": {"x": None}}, {"word": "a", "free": {"x": None}}),
    ],
)
def test_nulls_in_arguments_are_what_the_schema_makes_of_them(given, kept):
    word, free = {"type": "string"}, {"type": "object"}
    properties = {"word": word, "n": {"type": "integer"}, "any": {}, "place": PLACE, "free": free}
    properties["places"] = {"type": "array", "items": PLACE}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties, "required": ["word"]}}
    for arguments in (given, json.dumps(given)):
        for tools, expected in (((tool,), kept), ((), given)):
            turns = [{"role": "user", "content": "q"}]
            turns += [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
            message = parse_messages(turns, parse_tools(list(tools))[0])[1]
            assert message.tool_calls[0]["function"]["arguments"] == expected
            assert (FILLED_NULLS in message.events) == (expected != given)


def test_tools():
    function = {"name": "add", "parameters": {}}
    wrapped = {"type": "function", "function": function}
    as_text = json.dumps(function)
    for given in (
        [function],
        [wrapped],
        function,
        as_text,
        f"[{as_text}]",
        [as_text],
        [{"type": "function", "function": as_text}],
        [{"name": "add", "parameters": "{}"}],
        [{**wrapped, "strict": None}],
        {"name": ["add"], "parameters": [{}]},
    ):
        assert parse_tools(given)[0] == (wrapped,)
    assert all(parse_tools(nothing) == ((), ()) for nothing in (None, "[]", "", "null"))
    for bad, reason in [
        ("{", "not JSON"),
        (7, "must be a list"),
        ([{"x": 1}], "without a name"),
        (["f"], "schema, not text"),
    ]:
        with pytest.raises(ValueError, match=reason):
            parse_tools(bad)
