"""Turns records in common formats into a conversation, a prompt with its completion, or plain text.

Five formats, told by their columns:

    messages    {"messages": [{"role": ..., "content": ...}, ...]}
    sharegpt    {"conversations": [{"from": ..., "value": ...}, ...]}
    alpaca      {"instruction": ..., "input": ..., "output": ...}
    completion  {"prompt": ..., "completion": ...}
    text        {"text": ...}

`columns` maps a column named here to the one in the data, as in `{prompt: question, completion: answer}`;
with it, only the columns that it names are read. A record that matches no format, or several, is a bad record. So is
one whose `text` stands beside columns that may be the answer: nobody is taught the questions of labelled data.

Text, or a prompt with its completion, that went through the chat template already is not rendered again.

Where there is a chat template, alpaca and completion records become a user turn and an assistant turn. Where
there is none, a prompt and its completion are joined as they stand, and alpaca's parts come under the
headings `### Instruction:`, `### Input:` and `### Response:`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from jaxft.data.conversations import Conversation, Message, parse_messages, parse_text
from jaxft.data.events import FILLED_NULLS, Event
from jaxft.data.records import BadRecord, Record
from jaxft.data.tool_calls import parse_tools


@dataclass(frozen=True)
class Completion:
    """Text and its continuation, which alone is learned; no template, nothing between the two.

    `rendered`: it went through the chat template before it came here, so its special tokens are read as such.
    """

    prompt: str
    completion: str
    rendered: bool = False
    origin: str = field(default="", compare=False)
    events: tuple[Event, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Text:
    """Plain text, learned from end to end. `rendered` as in `Completion`."""

    text: str
    rendered: bool = False
    origin: str = field(default="", compare=False)
    events: tuple[Event, ...] = field(default=(), compare=False)


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
_VERDICTS = ("label", "kto_tag")
_MEDIA = ("images", "image", "videos", "audios", "audio")
#: Columns beside `text` that say where it is from. Any other may be what is to be learned.
_ABOUT = frozenset(
    """
    id _id idx index row uuid hash md5 sha1 sha256 url uri link source src origin dataset subset split domain site meta
    metadata title author date time timestamp created created_at updated_at added dump warc file filename file_name
    file_path path repo repo_name lang language language_score languages license licenses length len n_tokens num_tokens
    token_count tokens_count word_count char_count size quality quality_score perplexity
    """.split()  # noqa: SIM905
)


#: How pandas names the column of its row numbers, in CSV and in Parquet.
_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")


class FormatError(ValueError):
    """What a source is, or which part of it is to be learned, has to be said by its owner."""


class Converted(NamedTuple):
    """What was found, in words; the examples; and the records that cannot be one."""

    format: str
    examples: list[Example]
    bad: list[BadRecord]


def convert(
    records: Sequence[Record | BadRecord],
    *,
    chat: bool,
    type: str | None = None,
    columns: Mapping[str, str] | None = None,
    is_rendered: Callable[[str], bool] = lambda text: False,
) -> Converted:
    """One example per record.

    Args:
        records: of one source, all of one format.
        chat: whether there is a chat template.
        type: a key of `FORMATS`; None = tell by the columns.
        columns: column named here -> column of the data.
        is_rendered: whether a text went through the chat template already.

    Raises:
        ValueError: `type` or `columns` name what is not known.
        FormatError: a record's columns leave open what it is or what of it is to be learned.
    """
    columns = dict(columns or {})
    _check_columns(columns, type)
    first: tuple[str, str] | None = None
    examples: list[Example] = []
    bad: list[BadRecord] = []
    ignored: set[str] = set()
    for record in records:
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        try:
            found = type or detect(record.values, columns)
            values = _pick(record.values, found, columns)
            if first is not None and found != first[0]:
                raise ValueError(f"this record is of format {found}, but {first[1]} is of format {first[0]}")
            example = _CONVERTERS[found](values, chat, is_rendered)
        except FormatError as error:
            raise FormatError(f"{record.origin}: {error}") from None
        except ValueError as error:
            bad.append(BadRecord(record.origin, str(error)))
            continue
        first = first or (found, record.origin)
        events = (*example.events, *((FILLED_NULLS,) if record.filled else ()))
        examples.append(replace(example, origin=record.origin, events=events))
        ignored |= {key for key, value in record.values.items() if value is not None}
    if first is None:
        return Converted("no format", [], bad)
    ignored -= set(_read_columns(first[0], columns).values())
    return Converted(_describe(first[0], examples, type, columns, ignored), examples, bad)


def detect(values: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The one format whose required columns are there and hold something."""
    held = {key for key, value in values.items() if value is not None}
    keys = ", ".join(values) or "no columns"
    if not columns:
        _refuse_preferences(values, keys)
    # An answer that is null is a fault of the record, not of its format.
    for present in [set(columns)] if columns else [held, set(values)]:
        found = [name for name, needs in FORMATS.items() if present.issuperset(needs.required)]
        if len(found) > 1:
            raise FormatError(
                f"matches several formats ({', '.join(found)}); set `type` to one of them. It has: {keys}"
            )
        others = sorted(name for name in held - {"text"} - _ABOUT if not _INDEX.fullmatch(name))
        if found == ["text"] and not columns and others:
            raise FormatError(
                f"`text` stands beside {', '.join(f'`{name}`' for name in others)}: what is to be learned? "
                f"To learn `{others[0]}` as the answer, set `columns: {{prompt: text, completion: {others[0]}}}`; "
                "to learn the text alone, from end to end, set `type: text`"
            )
        if found:
            return found[0]
    known = "; ".join(f"{name} needs {', '.join(needs.required)}" for name, needs in FORMATS.items())
    raise ValueError(
        f"no known format. The record has: {keys}. The formats: {known}. "
        "Name the columns, as in `columns: {prompt: question, completion: answer}`"
    )


def _refuse_preferences(values: Mapping[str, Any], keys: str) -> None:
    preference = [key for key in _PREFERENCES if values.get(key) is not None]
    preference += [key for key in _VERDICTS if str(values.get(key)).lower() in ("true", "false")]
    if preference:
        raise FormatError(
            f"preference data (by {', '.join(preference)}): it compares answers, but training here imitates "
            f"one answer per record. Keep the good answers in one of the formats ({', '.join(FORMATS)}), or "
            f"name the columns, as in `columns: {{prompt: question, completion: chosen}}`. There are: {keys}"
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
    how = " and ".join(sorted({_kind(example) for example in examples}))
    unread = f"; not read: {', '.join(sorted(ignored))}" if ignored else ""
    return f"{format} ({'as configured, from' if type else 'detected by'} {read}) -> {how}{unread}"


def _kind(example: Example) -> str:
    if isinstance(example, Conversation):
        return "chat template"
    if isinstance(example, Completion):
        return f"prompt + completion, {'rendered already' if example.rendered else 'no template'}"
    return "text rendered already, learned from end to end" if example.rendered else "plain text"


def _from_messages(values: dict[str, Any], chat: bool, is_rendered: Callable[[str], bool]) -> Conversation:
    turns = values["messages"] if "messages" in values else values["conversations"]
    tools, events = parse_tools(values.get("tools"))
    messages = parse_messages(turns, tools)
    if values.get("system"):
        system = parse_text(values["system"], "`system`")
        if messages[0].role == "system":
            raise ValueError("`system` is given, and the messages begin with a system message; keep one")
        messages = (Message("system", system), *messages)
    return _conversation(messages, tools, events)


def _conversation(
    messages: Iterable[Message], tools: tuple[dict, ...] = (), events: tuple[Event, ...] = ()
) -> Conversation:
    messages = tuple(messages)
    return Conversation(messages, tools, events=(*events, *(e for message in messages for e in message.events)))


def _from_alpaca(values: dict[str, Any], chat: bool, is_rendered: Callable[[str], bool]) -> Conversation | Completion:
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
        return _conversation((*system, *turns, *_pair("\n\n".join(asked), answer)))
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


def _from_completion(
    values: dict[str, Any], chat: bool, is_rendered: Callable[[str], bool]
) -> Conversation | Completion:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = parse_messages([*prompt, *completion])
        context = [replace(message, supervised=False) for message in messages[: len(prompt)]]
        return _conversation((*context, *messages[len(prompt) :]))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("`prompt` and `completion` must both be text or both be lists of messages")
    prompt, completion = parse_text(prompt, "`prompt`"), parse_text(completion, "`completion`")
    if is_rendered(prompt + completion):
        return Completion(prompt, completion, rendered=True)
    return _conversation(_pair(prompt, completion)) if chat else Completion(prompt, completion)


def _from_text(values: dict[str, Any], chat: bool, is_rendered: Callable[[str], bool]) -> Text:
    text = parse_text(values["text"], "`text`")
    return Text(text, rendered=is_rendered(text))


_CONVERTERS = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_alpaca,
    "completion": _from_completion,
    "text": _from_text,
}
