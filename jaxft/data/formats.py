"""From records as people have them to a conversation, a prompt with its completion, or plain text.

Five formats, told by their columns:

    messages    {"messages": [{"role": ..., "content": ...}, ...]}
    sharegpt    {"conversations": [{"from": ..., "value": ...}, ...]}
    alpaca      {"instruction": ..., "input": ..., "output": ...}
    completion  {"prompt": ..., "completion": ...}
    text        {"text": ...}

`columns` maps a column named here to the one in the data, as in `{prompt: question, completion: answer}`;
with it, only the columns that it names are read. A record that matches no format, or several, is an error.

Where there is a chat template, alpaca and completion records become a user turn and an assistant turn. Where
there is none, a prompt and its completion are joined as they stand, and alpaca's parts come under the
headings `### Instruction:`, `### Input:` and `### Response:`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from jaxft.data.conversations import Conversation, Message, parse_messages, parse_text, parse_tools
from jaxft.data.sources import Record


@dataclass(frozen=True)
class Completion:
    """Text and its continuation, which alone is learned; no template, nothing between the two."""

    prompt: str
    completion: str
    origin: str = field(default="", compare=False)


@dataclass(frozen=True)
class Text:
    """Plain text, learned from end to end."""

    text: str
    origin: str = field(default="", compare=False)


Example = Conversation | Completion | Text


class Columns(NamedTuple):
    """What a format needs and what it also reads."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "messages": Columns(("messages",), ("tools", "system")),
    "sharegpt": Columns(("conversations",), ("tools", "system")),
    "alpaca": Columns(("instruction", "output"), ("input", "system", "history")),
    "completion": Columns(("prompt", "completion")),
    "text": Columns(("text",)),
}
#: Columns that say that a record holds more than one answer, or a verdict on one.
_PREFERENCES = ("chosen", "rejected", "chosen_messages", "rejected_messages")
_MEDIA = ("images", "image", "videos", "audios", "audio")


def convert(
    records: Sequence[Record],
    *,
    chat: bool,
    type: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[str, list[Example]]:
    """What was found, in words, and one example per record.

    Args:
        records: of one source, all of one format.
        chat: whether there is a chat template.
        type: a key of `FORMATS`; None = tell by the columns.
        columns: column named here -> column of the data.

    Raises:
        ValueError: with the record's origin.
    """
    columns = dict(columns or {})
    _check_columns(columns, type)
    first, examples, ignored = None, [], set()
    for record in records:
        try:
            found = type or detect(record.values, columns)
            values = _pick(record.values, found, columns)
            first = first or (found, record.origin)
            if found != first[0]:
                raise ValueError(f"this record is of format {found}, but {first[1]} is of format {first[0]}")
            example = _CONVERTERS[found](values, chat)
        except ValueError as error:
            raise ValueError(f"{record.origin}: {error}") from None
        examples.append(replace(example, origin=record.origin))
        ignored |= record.values.keys() - _read_columns(found, columns).values()
    return _describe(first[0], examples, type, columns, ignored), examples


def detect(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The one format whose required columns are there."""
    present = set(columns) if columns else set(values)
    found = [name for name, needs in FORMATS.items() if present.issuperset(needs.required)]
    keys = ", ".join(values) or "no columns"
    preference = [key for key in _PREFERENCES if key in values]
    if isinstance(values.get("label"), bool):
        preference.append("label")
    if preference and not columns:
        raise ValueError(
            f"preference data (by {', '.join(preference)}): it compares answers, but training here imitates "
            f"one answer per record. Keep the good answers in one of the formats ({', '.join(FORMATS)}), or "
            f"name the columns, as in `columns: {{prompt: question, completion: chosen}}`. There are: {keys}"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"matches several formats ({', '.join(found)}); set `type` to one of them. It has: {keys}")
    known = "; ".join(f"{name} needs {', '.join(needs.required)}" for name, needs in FORMATS.items())
    raise ValueError(
        f"no known format. The record has: {keys}. The formats: {known}. "
        "Name the columns, as in `columns: {prompt: question, completion: answer}`"
    )


def _check_columns(columns: Mapping[str, str], type: str | None) -> None:
    if type is not None and type not in FORMATS:
        raise ValueError(f"unknown `type` {type!r}; known: {', '.join(FORMATS)}")
    chosen = [FORMATS[type]] if type else FORMATS.values()
    known = sorted({column for needs in chosen for column in needs.required + needs.optional})
    for column in columns:
        if column not in known:
            close = get_close_matches(column, known, 1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`columns` names `{column}`; known: {', '.join(known)}{hint}")


def _pick(values: Mapping[str, Any], format: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """The format's columns, under the format's names."""
    actual = _read_columns(format, columns)
    keys = ", ".join(values) or "no columns"
    if missing := [f"`{name}`" for name in FORMATS[format].required if name not in actual]:
        raise ValueError(f"format {format} needs {', '.join(missing)}, which `columns` does not name")
    needed = columns or FORMATS[format].required
    if missing := [f"`{actual[name]}`" for name in needed if actual[name] not in values]:
        raise ValueError(f"no column {', '.join(missing)}; there are: {keys}")
    if not columns and (found := [name for name in _MEDIA if values.get(name)]):
        raise ValueError(f"`{found[0]}` is not supported; examples are text")
    return {name: values[column] for name, column in actual.items() if column in values}


def _read_columns(format: str, columns: Mapping[str, str]) -> Mapping[str, str]:
    """Column of the format -> column of the data."""
    return columns or {name: name for name in FORMATS[format].required + FORMATS[format].optional}


def _describe(
    format: str,
    examples: Iterable[Example],
    type: str | None,
    columns: Mapping[str, str],
    ignored: Iterable[str],
) -> str:
    read = ", ".join(f"{name} = {column}" for name, column in columns.items()) or ", ".join(FORMATS[format].required)
    kinds = {
        Conversation: "chat template",
        Completion: "prompt + completion, no template",
        Text: "plain text",
    }
    how = " and ".join(sorted({kinds[example.__class__] for example in examples}))
    unread = f"; not read: {', '.join(sorted(ignored))}" if ignored else ""
    return f"{format} ({'as configured, from' if type else 'detected by'} {read}) -> {how}{unread}"


def _from_messages(values: dict[str, Any], chat: bool) -> Conversation:
    turns = values["messages"] if "messages" in values else values["conversations"]
    if values.get("system") and isinstance(turns, list):
        turns = [{"role": "system", "content": values["system"]}, *turns]
    return Conversation(parse_messages(turns), parse_tools(values.get("tools")))


def _from_alpaca(values: dict[str, Any], chat: bool) -> Conversation | Completion:
    parts = {name: values.get(name) for name in ("system", "instruction", "input")}
    parts = {name: parse_text(part, f"`{name}`") for name, part in parts.items() if part not in (None, "")}
    asked = [part for name, part in parts.items() if name != "system"]
    if not asked:
        raise ValueError("`instruction` is empty")
    answer = parse_text(values["output"], "`output`")
    history = values.get("history") or []
    if chat:
        turns = [turn for pair in history for turn in _pair(*_two(pair))]
        system = [Message("system", parts["system"])] if "system" in parts else []
        return Conversation((*system, *turns, *_pair("\n\n".join(asked), answer)))
    if history:
        raise ValueError("`history` needs a chat template; set `chat_template`")
    headings = {"system": "", "instruction": "### Instruction:\n", "input": "### Input:\n"}
    prompt = "".join(f"{headings[name]}{part}\n\n" for name, part in parts.items())
    return Completion(prompt + "### Response:\n", answer)


def _two(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError("`history` must be a list of [question, answer]")
    return parse_text(pair[0], "a question in `history`"), parse_text(pair[1], "an answer in `history`")


def _pair(question: str, answer: str) -> tuple[Message, Message]:
    return Message("user", question), Message("assistant", answer, supervised=True)


def _from_completion(values: dict[str, Any], chat: bool) -> Conversation | Completion:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = parse_messages([*prompt, *completion])
        context = [replace(message, supervised=False) for message in messages[: len(prompt)]]
        return Conversation((*context, *messages[len(prompt) :]))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("`prompt` and `completion` must both be text or both be lists of messages")
    prompt, completion = parse_text(prompt, "`prompt`"), parse_text(completion, "`completion`")
    return Conversation(_pair(prompt, completion)) if chat else Completion(prompt, completion)


def _from_text(values: dict[str, Any], chat: bool) -> Text:
    return Text(parse_text(values["text"], "`text`"))


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_alpaca,
    "completion": _from_completion,
    "text": _from_text,
}
