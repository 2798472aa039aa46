import pytest

from jaxft.data.conversations import Conversation, Message
from jaxft.data.formats import Completion, FormatError, Text, convert
from jaxft.data.records import BadRecord, Record
from jaxft.data.sources import read


def records(*values: dict) -> list[Record]:
    return [Record(value, f"data.jsonl:{line}") for line, value in enumerate(values, 1)]


def one(value: dict, chat: bool = True, **options):
    found = convert(records(value), chat=chat, **options)
    if found.bad:
        raise ValueError(found.bad[0].reason)
    return found.examples[0]


QUESTION = Message("user", "q")
ANSWER = Message("assistant", "a", supervised=True)
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "value, name",
    [
        ({"messages": TURNS}, "messages"),
        ({"conversations": SHARED, "id": 5}, "sharegpt"),
        ({"conversations": TURNS}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"instruction": "", "input": "q", "output": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "completion"),
    ],
)
def test_all_formats_say_the_same(value, name):
    found, examples, bad = convert(records(value), chat=True)
    assert bad == []
    assert examples == [Conversation((QUESTION, ANSWER))]
    assert examples[0].origin == "data.jsonl:1"
    assert found.startswith(f"{name} (detected by ")


def test_without_a_chat_template():
    assert one({"prompt": "q", "completion": " a"}, chat=False) == Completion("q", " a")
    alpaca = {"instruction": "q", "input": "i", "output": "a"}
    prompt = "### Instruction:\nq\n\n### Input:\ni\n\n### Response:\n"
    assert one(alpaca, chat=False) == Completion(prompt, "a")
    prompt = "s\n\n### Instruction:\nq\n\n### Response:\n"
    assert one({**alpaca, "input": "", "system": "s"}, chat=False) == Completion(prompt, "a")
    for chat in (False, True):
        assert one({"text": "t"}, chat=chat) == Text("t")
    with pytest.raises(ValueError, match=r"`history` needs a chat template"):
        one({**alpaca, "history": [["x", "y"]]}, chat=False)


def test_system_history_and_tools():
    history = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["x", "y"]]}
    earlier = (Message("system", "s"), Message("user", "x"), Message("assistant", "y", supervised=True))
    assert one(history) == Conversation((*earlier, Message("user", "q\n\ni"), ANSWER))
    tool = {"type": "function", "function": {"name": "f"}}
    with_tools = {"messages": TURNS, "tools": '[{"name": "f"}]', "system": "s"}
    assert one(with_tools) == Conversation((Message("system", "s"), QUESTION, ANSWER), (tool,))


def test_only_the_completion_of_message_lists_is_learned():
    more = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    messages = one({"prompt": [*TURNS, more[0]], "completion": [more[1]]}).messages
    assert [message.supervised for message in messages] == [False, False, False, True]
    with pytest.raises(ValueError, match="both be text or both be lists"):
        one({"prompt": "q", "completion": TURNS[1:]})


def test_columns():
    value = {"question": "q", "answer": "a", "text": "unrelated"}
    columns = {"prompt": "question", "completion": "answer"}
    found, examples, _ = convert(records(value), chat=True, columns=columns)
    assert examples == [Conversation((QUESTION, ANSWER))]
    assert found == ("completion (detected by prompt = question, completion = answer) -> chat template; not read: text")
    assert one(value, type="text") == Text("unrelated")
    assert one({"messages": TURNS, "text": "t"}, type="messages") == Conversation((QUESTION, ANSWER))


@pytest.mark.parametrize(
    "value, options, reason",
    [
        (
            {"question": "q", "answer": "a"},
            {},
            "no known format. The record has: question, answer. The formats: messages needs messages; .*"
            "completion needs prompt, completion; .*`columns: {prompt: question, completion: answer}`",
        ),
        ({}, {}, "The record has: no columns"),
        ({"messages": TURNS, "text": "t"}, {}, "several formats .messages, text.; set `type` to one of them"),
        (
            {"q": "q"},
            {"columns": {"prompt": "question", "completion": "q"}},
            "no column `question`; there are: q",
        ),
        ({"q": "q"}, {"columns": {"promt": "q"}}, "`columns` names `promt`; .*did you mean `prompt`"),
        ({"q": "q"}, {"columns": {"prompt": "q"}}, "no known format"),
        (
            {"q": "q"},
            {"columns": {"input": "q"}, "type": "completion"},
            "`columns` names `input`; known: completion",
        ),
        (
            {"q": "q"},
            {"columns": {"prompt": "q"}, "type": "completion"},
            "needs `completion`, which `columns` does",
        ),
        ({"text": "t"}, {"type": "messages"}, "no column `messages`; there are: text"),
        ({"text": "t"}, {"type": "chat"}, "unknown `type` 'chat'"),
        (
            {"chosen": "c", "rejected": "r"},
            {},
            "preference data .by chosen, rejected.*There are: chosen, rejected",
        ),
        ({"messages": TURNS, "label": False}, {}, "preference data .by label."),
        ({"messages": TURNS, "images": ["x.png"]}, {}, "`images` is not supported"),
        ({"prompt": "q", "completion": None}, {}, "`completion` is missing"),
        ({"prompt": "q", "completion": 3}, {}, "`completion` must be text, not a number"),
        ({"prompt": "", "completion": "a"}, {}, "`prompt` is empty"),
        ({"instruction": "", "input": None, "output": "a"}, {}, "`instruction` is empty"),
        ({"instruction": "q", "output": ""}, {}, "`output` is empty"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, {}, "list of .question, answer."),
        ({"text": " "}, {}, "`text` is empty"),
        ({"messages": TURNS[1:]}, {}, "message 1: role assistant comes first"),
    ],
)
def test_records_that_cannot_be_used(value, options, reason):
    with pytest.raises(ValueError, match=reason):
        one(value, **options)


@pytest.mark.parametrize("label", ["category", "label", "intent", "sentiment", "target", "answer", "class"])
def test_labelled_text_is_not_learned_without_its_labels(label):
    value = {"text": "Where is my card?", label: "card_arrival", "id": 7}
    with pytest.raises(FormatError, match=f"^data.jsonl:1: `text` stands beside `{label}`: .*completion: {label}"):
        convert(records(value), chat=True)
    found = convert(records(value), chat=True, columns={"prompt": "text", "completion": label})
    assert found.examples[0].messages[1].content == "card_arrival"
    found = convert(records(value), chat=True, type="text")
    assert found.examples == [Text("Where is my card?")]
    assert found.format.endswith(f"not read: {', '.join(sorted([label, 'id']))}")


@pytest.mark.parametrize(
    "about",
    [
        *({"url": "x", "timestamp": "y"}, {"meta": {"set": "pile"}}, {"id": 1, "title": "t", "label": None}),
        *({"": "0"}, {"Unnamed: 0": "0"}, {"__index_level_0__": 0}),  # pandas' numbers of rows
    ],
)
def test_text_with_columns_that_say_where_it_is_from_is_text(about):
    assert convert(records({"text": "t", **about}), chat=True).examples == [Text("t")]


@pytest.mark.parametrize("verdict", [True, False, "true", "False"])
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_verdicts_on_answers_are_preference_data(verdict, key):
    with pytest.raises(FormatError, match=f"preference data .by {key}"):
        convert(records({"prompt": "q", "completion": "a", key: verdict}), chat=True)


def test_columns_that_are_null_throughout_decide_nothing():
    value = {"messages": TURNS, "text": None, "prompt": None, "completion": None}
    assert convert(records(value), chat=True).examples == [Conversation((QUESTION, ANSWER))]


def test_errors_name_the_record_and_shapes_do_not_mix():
    good = {"prompt": "q", "completion": "a"}
    values = [{"prompt": "q", "completion": None}, good, {"text": "t"}, {"prompt": "q"}, good]
    unread = BadRecord("data.jsonl:9", "not JSON")
    found = convert([*records(*values), unread], chat=True)
    assert len(found.examples) == 2
    assert found.examples[0].origin == "data.jsonl:2"
    reasons = [
        ("data.jsonl:1", "`completion` is missing"),
        ("data.jsonl:3", "this record is of format text, but data.jsonl:2 is of format completion"),
        ("data.jsonl:4", "no known format. The record has: prompt"),
    ]
    assert found.bad[-1] == unread
    for bad, (origin, reason) in zip(found.bad, reasons, strict=False):
        assert bad.origin == origin
        assert bad.reason.startswith(reason)


@pytest.mark.parametrize(
    "file, columns, name, count, first",
    [
        ("gsm8k/test.jsonl", {"prompt": "question", "completion": "answer"}, "completion", 1319, "Janet"),
        ("llamafactory-demo/alpaca_en_demo.json", {}, "alpaca", 999, "Describe a process"),
        ("llamafactory-demo/identity.json", {}, "alpaca", 91, "hi"),
        ("llamafactory-demo/v1_sft_demo.jsonl", {}, "messages", 500, "hi"),
        (
            "llamafactory-demo/glaive_toolcall_en_demo.json",
            {},
            "sharegpt",
            300,
            "Hi, I have some ingredients",
        ),
        (
            "banking77/test.csv",
            {"prompt": "text", "completion": "category"},
            "completion",
            3080,
            "How do I locate",
        ),
    ],
)
def test_real_files(material, file, columns, name, count, first):
    found, examples, bad = convert(read(str(material / "data" / file)), chat=True, columns=columns)
    assert bad == []
    assert found.startswith(name)
    assert len(examples) == count
    assert examples[0].messages[0].content.startswith(first)


@pytest.mark.parametrize(
    "file, line, reason",
    [
        ("hh-rlhf/harmless-base_test.jsonl.gz", 1, "preference data .by chosen, rejected"),
        ("llamafactory-demo/dpo_en_demo.json", 2, "preference data"),
        ("llamafactory-demo/kto_en_demo.json", 2, "preference data .by label"),
        ("llamafactory-demo/v1_dpo_demo.jsonl", 1, "preference data .by chosen_messages, rejected_messages"),
    ],
)
def test_real_files_that_are_for_something_else(material, file, line, reason):
    path = str(material / "data" / file)
    with pytest.raises(ValueError, match=f"{path}:{line}: .*{reason}"):
        convert(read(path), chat=True)


def test_real_thinking_data_is_refused_record_by_record(material):
    records = read(str(material / "data/llamafactory-demo/reason_tool_use_demo_50.jsonl"))
    found = convert(records, chat=True)
    assert len(found.bad) == len(records) == 50
    assert all("content of type 'reasoning' cannot be learned yet" in bad.reason for bad in found.bad)
