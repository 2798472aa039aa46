import json

import pytest

from jaxft.data.conversations import Conversation, Message, parse_messages, with_last_answer


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
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": " b"}, " c"]
    answer = {"role": "assistant", "content": "c", "tool_calls": None, "weight": None, "from": None}
    assert [m.content for m in parse_messages([*turns(("user", parts)), answer])] == ["a b c", "c"]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weights_choose_what_is_learned(key):
    question = {"role": "user", "content": "q", key: 0}
    given = [question, {"role": "assistant", "content": "a", key: 0.0}, question]
    messages = parse_messages([*given, {"role": "assistant", "content": "b", key: 1.0}])
    assert [message.supervised for message in messages] == [False, False, False, True]
    for weight, reason in [(0.5, "learned .1 or true. or not"), (-1, "learned .1 or true. or not")]:
        with pytest.raises(ValueError, match=rf"message 2: `{key}` is {weight}; .*{reason}"):
            parse_messages([question, {"role": "assistant", "content": "a", key: weight}])
    with pytest.raises(ValueError, match=r"message 1: .*only assistant messages can be learned"):
        parse_messages([{**question, key: 1}, *turns(("assistant", "a"))])


@pytest.mark.parametrize(
    "no, yes",
    [
        ({"loss": False}, {"loss": True}),
        ({"train": 0}, {"train": 1}),
        ({"trainable": False}, {}),
        ({"training": "false"}, {"training": "true"}),
        ({"loss_mask": 0.0}, {"loss_mask": 1.0}),
        ({"mask": True}, {"mask": False}),
        ({"train_on_turn": False, "weight": 0}, {"train_on_turn": True, "weight": 1}),
        ({"learn": False}, {"learn": None}),
        ({"supervised": False}, {"supervised": True}),
        ({"masked": 1}, {"masked": 0}),
        ({"is_masked": True}, {"is_masked": ""}),
        ({"loss_scale": 0.0}, {"loss_scale": 1.0}),
        ({"Train": False}, {"LOSS": True}),
        ({"no-loss": True}, {"ignore": False}),
    ],
)
def test_marks_of_other_trainers_choose_what_is_learned(no, yes):
    given = [*turns(("user", "q")), {"role": "assistant", "content": "wrong", **no}]
    given += [*turns(("user", "r")), {"role": "assistant", "content": "right", **yes}]
    messages = parse_messages(given)
    assert [message.supervised for message in messages] == [False, False, False, True]
    assert all(message.extra == {} for message in messages)
    for key, value in yes.items():
        if value and key not in ("mask", "ignore"):
            with pytest.raises(ValueError, match=f"message 1: `{key}` is .* only assistant messages can be learned"):
                parse_messages([{**given[0], key: value}, *given[1:]])


@pytest.mark.parametrize(
    "marks, reason",
    [
        ({"loss": 0.37}, "`loss` is 0.37; a turn is learned"),
        ({"loss_mask": [0, 1]}, "`loss_mask` is .0, 1."),
        ({"train": "maybe"}, "`train` is 'maybe'"),
        ({"weight": 1, "train": False}, "`weight` and `train` contradict each other"),
        ({"mask": True, "trainable": True}, "`mask` and `trainable` contradict each other"),
    ],
)
def test_marks_that_say_nothing_clear(marks, reason):
    with pytest.raises(ValueError, match=f"message 2: {reason}"):
        parse_messages([*turns(("user", "q")), {"role": "assistant", "content": "a", **marks}])


@pytest.mark.parametrize(
    "key",
    [
        *("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "think", "reasoning_details"),
        *("chain_of_thought", "thinking_blocks", "Reasoning", "reasoning-content"),
    ],
)
def test_reasoning_in_a_key_is_refused_unless_it_is_empty(key):
    answer = {"role": "assistant", "content": "a"}
    with pytest.raises(ValueError, match=f"message 2: reasoning in `{key}` cannot be learned yet"):
        parse_messages([*turns(("user", "q")), {**answer, key: "because"}])
    for nothing in (None, "", []):
        assert parse_messages([*turns(("user", "q")), {**answer, key: nothing}])[1].content == "a"


def test_lists_as_files_store_them():
    """JSON text, the object of lists of older `datasets`, and fields that Arrow filled in."""
    pairs = [("user", "q"), ("assistant", "a")]
    expected = parse_messages(turns(*pairs))
    columns = {"role": ["user", "assistant"], "content": ["q", "a"], "tool_calls": [None, None]}
    for given in (
        json.dumps(turns(*pairs)),
        columns,
        json.dumps(columns),
        [json.dumps(turn) for turn in turns(*pairs)],
        tuple(turns(*pairs)),
        [{**turn, "name": None, "weight": None, "tool_calls": None} for turn in turns(*pairs)],
        [{"from": role.upper(), "value": text, "content": None} for role, text in pairs],
    ):
        assert parse_messages(given) == expected
    for bad, reason in [
        ("[{]", "is text, but not JSON"),
        ({"role": ["user"], "content": []}, "must be a list, not an object"),
    ]:
        with pytest.raises(ValueError, match=f"the messages {reason}"):
            parse_messages(bad)


def test_only_the_last_answer_is_learned():
    pairs = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s")]
    kept = with_last_answer(Conversation(parse_messages(turns(*pairs))))
    assert [message.supervised for message in kept.messages] == [False, False, False, True, False]


@pytest.mark.parametrize(
    "given, reason",
    [
        ([], "the list of messages is empty"),
        ("text", "must be a list, not text"),
        (None, "must be a list, not null"),
        (["hi"], "message 1: must be an object, not text"),
        ([{"content": "q"}], "message 1: no `role` .nor `from`.; there are: content"),
        (turns(("moderator", "q")), "message 1: unknown role 'moderator'; known roles: system"),
        (turns((7, "q")), "message 1: unknown role 7"),
        (turns(("user", None), ("assistant", "a")), "message 1: `content` of the user message is missing"),
        ([{"role": "user"}], "message 1: `content` of the user message is missing"),
        (
            turns(("user", "q"), ("assistant", " \n")),
            "message 2: `content` of the assistant message is empty",
        ),
        (turns(("user", 5)), "message 1: .* must be text, not a number"),
        (turns(("user", "\ud800")), "message 1: .* half of a surrogate pair"),
        (turns(("user", [{"type": "image_url"}])), "content of type 'image_url' is not supported"),
        (turns(("user", [{"type": "text"}])), "the text of a content part is missing"),
        (
            [*turns(("user", "q")), {"role": "assistant", "content": "a", "reasoning_content": "r"}],
            "message 2: reasoning in `reasoning_content` cannot be learned yet",
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
