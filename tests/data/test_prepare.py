import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.config import DatasetConfig
from jaxft.data.chat import Renderer
from jaxft.data.prepare import prepare


@pytest.fixture(scope="session")
def renderer(byte_tokenizer):
    return Renderer(byte_tokenizer, "chatml")


OVERHEAD = len("<user\n>\n<assistant\n>\n")  # bytes around question and answer, special tokens as one each


@pytest.fixture
def write(tmp_path):
    def write(name: str, *pairs: tuple[str, str]) -> str:
        lines = [json.dumps({"prompt": question, "completion": answer}) for question, answer in pairs]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    return write


def spec(path: str, **options) -> DatasetConfig:
    return DatasetConfig(path=path, **options)


def answers(examples) -> list[str]:
    return [bytes(tokens[mask][:-1].tolist()).decode() for tokens, mask in examples]


def test_counts_of_every_example(write, renderer):
    path = write("a.jsonl", ("q" * 10, "a" * 5), ("q" * 10, "a" * 30), ("q" * 90, "a"), ("q", "b"))
    limit = OVERHEAD + 20
    dropped = prepare([spec(path)], renderer, max_length=limit)
    source = dropped.report.sources[0]
    assert (source.read, source.kept, source.too_long, source.truncated, source.nothing_to_learn) == (
        4,
        2,
        2,
        0,
        0,
    )
    assert (source.tokens, source.supervised) == (2 * OVERHEAD + 10 + 5 + 1 + 1, 5 + 1 + 1 + 1)
    assert source.longest == OVERHEAD + 91
    assert answers(dropped.train[0]) == ["aaaaa", "b"]

    cut = prepare([spec(path)], renderer, max_length=limit, excess_length_strategy="truncate")
    source = cut.report.sources[0]
    assert (source.read, source.kept, source.too_long, source.truncated, source.nothing_to_learn) == (
        4,
        3,
        0,
        1,
        1,
    )
    assert cut.train[0].lengths.tolist() == [OVERHEAD + 15, limit, OVERHEAD + 2]
    assert cut.train[0][1].loss_mask.sum() == limit - (OVERHEAD + 10 - 2)

    with pytest.raises(ValueError, match=rf"{path}:2: {OVERHEAD + 40} tokens, but `max_length` is {limit}"):
        prepare([spec(path)], renderer, max_length=limit, excess_length_strategy="raise")
    with pytest.raises(ValueError, match=rf"{path}: none of 4 examples is left: 4 are longer than `max_length` 5"):
        prepare([spec(path)], renderer, max_length=5)


def test_report_reads_as_text(write, renderer):
    path = write("a.jsonl", *[(f"q{i}", "a") for i in range(10)], ("q0", "a"))
    text = str(prepare([spec(path)], renderer, max_length=40, val_set_size=3, seed=5).report)
    assert f"{path}: completion (detected by prompt, completion) -> chat template" in text
    assert "11 examples read, 11 kept; dropped: 0 too long, 0 with nothing to learn; cut: 0" in text
    assert "held out 3 examples" in text


def test_held_out_examples_come_with_their_prompts(write, renderer):
    first = write("a.jsonl", *[(f"q{i}", f"a{i}") for i in range(20)])
    second = write("b.jsonl", *[(f"r{i}", f"b{i}") for i in range(20)], ("q3", "a3"), ("q4", "a4"))
    prepared = prepare([spec(first), spec(second)], renderer, max_length=64, val_set_size=0.25, seed=3)
    assert prepared.report.held_out == len(prepared.eval) == len(prepared.eval_examples)
    assert prepared.report.train == sum(map(len, prepared.train)) == 42 - len(prepared.eval)
    assert len(prepared.eval) in (10, 11)
    assert not set(answers(prepared.eval)) & {text for source in prepared.train for text in answers(source)}
    for example, (tokens, mask) in zip(prepared.eval_examples, prepared.eval, strict=True):
        prompt, reference = renderer.prompt(example)
        np.testing.assert_array_equal(prompt, tokens[: np.flatnonzero(mask)[0]])
        assert reference == bytes(tokens[mask][:-1].tolist()).decode()


def test_separate_eval_sets(write, renderer):
    train = write("a.jsonl", *[(f"q{i}", "a") for i in range(5)])
    test = write("b.jsonl", ("r", "a"), ("s", "a"))
    prepared = prepare([spec(train)], renderer, max_length=64, eval_datasets=[spec(test)])
    assert (prepared.report.train, prepared.report.held_out) == (5, 2)
    assert prepared.report.eval_sources[0].read == 2
    leaking = write("c.jsonl", ("r", "a"), ("q3 ", "a"))
    with pytest.raises(ValueError, match=rf"1 held-out examples are also trained on \({train}:4 = {leaking}:2\)"):
        prepare([spec(train)], renderer, max_length=64, eval_datasets=[spec(leaking)])
    with pytest.raises(ValueError, match=r"`eval_datasets` and `val_set_size` are both given"):
        prepare([spec(train)], renderer, max_length=64, eval_datasets=[spec(test)], val_set_size=1)


def test_settings_of_a_source(write, renderer, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": "r", "answer": "b"}')
    columns = {"prompt": "question", "completion": "answer"}
    prepared = prepare([spec(str(path), columns=columns, max_examples=1)], renderer, max_length=64)
    assert answers(prepared.train[0]) == ["a"]
    whole = prepare([spec(str(path), columns=columns)], renderer, max_length=64, assistant_only_loss=False)
    assert whole.report.train_supervised == whole.report.train_tokens - 2


def test_weights_are_for_all_sources_or_none(write, renderer):
    paths = [write(name, ("q" + name, "a")) for name in ("a.jsonl", "b.jsonl")]
    with_weights = [spec(paths[0], weight=2.0), spec(paths[1], weight=1.0)]
    assert prepare(with_weights, renderer, max_length=64).weights == (2.0, 1.0)
    assert prepare([spec(path) for path in paths], renderer, max_length=64).weights is None
    with pytest.raises(ValueError, match=r"b\.jsonl: no `weight`, but other datasets have one"):
        prepare([with_weights[0], spec(paths[1])], renderer, max_length=64)


def test_nothing_to_learn_anywhere(renderer, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=r"none of 1 examples is left: .* 1 have no token to learn"):
        prepare([spec(str(path))], renderer, max_length=64)


def test_a_template_that_marks_nothing_as_generated(byte_tokenizer, write):
    block = "{% if m.role == 'model' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    source = "{% for m in messages %}<|im_start|>" + block + "{% endif %}<|im_end|>{% endfor %}"
    path = write("a.jsonl", ("q", "a"), ("r", "b"))
    with pytest.raises(ValueError, match=r"none of 2 examples is left: .* 2 have no token to learn"):
        prepare([spec(path)], Renderer(byte_tokenizer, source), max_length=64)


def test_a_source_that_is_held_out_entirely(write, renderer):
    paths = [write("a.jsonl", *[(f"q{i}", "a") for i in range(30)]), write("b.jsonl", ("r", "a"))]
    outcomes = set()
    for seed in range(12):
        try:
            prepare([spec(path) for path in paths], renderer, max_length=64, val_set_size=10, seed=seed)
            outcomes.add("kept")
        except ValueError as error:
            outcomes.add(str(error))
    assert outcomes == {"kept", f"{paths[1]}: `val_set_size` 10 holds out all of its examples"}


def test_real_data(material: Path, real_tokenizer):
    """SmolLM2 on GSM8K: counts against a plain count with transformers."""
    tokenizer = real_tokenizer("SmolLM2-135M-Instruct")
    columns = {"prompt": "question", "completion": "answer"}
    path = material / "data/gsm8k/test.jsonl"
    few = spec(str(path), columns=columns, max_examples=300)
    prepared = prepare([few], Renderer(tokenizer), max_length=256, val_set_size=100)
    records = [json.loads(line) for line in path.read_text().splitlines()[:300]]
    turns = [
        [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in records
    ]
    lengths = [len(tokenizer.apply_chat_template(turn, return_dict=False)) for turn in turns]
    report = prepared.report.sources[0]
    assert report.read == len(records)
    assert report.too_long == sum(length > 256 for length in lengths)
    assert report.tokens == sum(length for length in lengths if length <= 256)
    assert report.longest == max(lengths)
    answered = [len(tokenizer(r["answer"]).input_ids) + 1 for r in records]
    assert report.supervised == sum(a for a, length in zip(answered, lengths, strict=True) if length <= 256)


# --- bad records, and what is not learned -------------------------------------------------------------------


def write_lines(path: Path, records: list) -> str:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return str(path)


@pytest.fixture
def many_bad(tmp_path):
    """300 records, every 25th bad, each in one of four ways."""
    faults = [
        {"prompt": "q", "completion": ""},
        {"prompt": "q", "completion": None},
        {"prompt": ["q"], "completion": "a"},
        {"question": "q"},
    ]
    records: list = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(300)]
    for k, i in enumerate(range(7, 300, 25)):
        records[i] = faults[k % 4]
    return write_lines(tmp_path / "a.jsonl", records)


def test_all_bad_records_are_named_at_once(many_bad, write, renderer):
    good = write("b.jsonl", ("r", "b"))
    with pytest.raises(ValueError) as raised:
        prepare([spec(good), spec(many_bad)], renderer, max_length=64)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{many_bad}:{i + 1}" for i in range(7, 250, 25)]
    assert lines[0].endswith("`completion` is empty")
    assert lines[2].endswith("must both be text or both be lists of messages")
    assert lines[10:] == ["... and 2 more", "12 of 301 records are bad; mend them, or set `on_bad_record: drop`"]


def test_bad_records_are_dropped_and_counted_where_that_is_asked_for(many_bad, renderer):
    prepared = prepare([spec(many_bad)], renderer, max_length=64, on_bad_record="drop")
    source = prepared.report.sources[0]
    assert (source.read, source.bad, source.kept) == (300, 12, 288)
    assert answers(prepared.train[0])[:8] == [*(f"a{i}" for i in range(7)), "a8"]
    text = str(prepared.report)
    assert "dropped: 0 too long, 0 with nothing to learn, 12 bad; cut: 0" in text
    assert "WARNING: 12 of 300 records are bad and were dropped:" in text
    assert text.count(f"{many_bad}:") == 11  # the source and ten of its records


def test_a_source_of_bad_records_alone(renderer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}] * 40)
    with pytest.raises(ValueError, match=rf"^{path}:1: no known format") as raised:
        prepare([spec(path)], renderer, max_length=64)
    assert str(raised.value).splitlines()[1:] == [
        "... the others alike",
        "40 of 40 records are bad; mend them, or set `on_bad_record: drop`",
    ]
    with pytest.raises(ValueError, match=rf"{path}: none of 40 examples is left: .* 40 are bad\n  {path}:1: no known"):
        prepare([spec(path)], renderer, max_length=64, on_bad_record="drop")


def test_records_that_the_template_refuses_are_bad(byte_tokenizer, write):
    source = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    picky = Renderer(byte_tokenizer, "{{ raise_exception('too short') if messages[0].content == 'q' }}" + source)
    path = write("a.jsonl", ("q", "a"), ("question 2", "a"), ("q", "b"))
    with pytest.raises(
        ValueError, match=rf"{path}:1: the chat template refuses this: too short\n{path}:3: .*\n2 of 3 records are bad"
    ):
        prepare([spec(path)], picky, max_length=64)
    assert prepare([spec(path)], picky, max_length=64, on_bad_record="drop").report.sources[0].bad == 2


def test_strict_data(renderer, tmp_path):
    turns = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a<|im_end|>"}]
    path = write_lines(
        tmp_path / "a.jsonl", [{"messages": turns}, {"messages": [{**turns[0], "name": None}, turns[1]]}]
    )
    report = prepare([spec(path)], renderer, max_length=64).report
    key, markup = "the chat template does not read the key `name` of a message", "a content spells special tokens"
    assert f"WARNING: 1 example: {key} (first: {path}:1)" in str(report)
    assert f"WARNING: 2 examples: {markup}" in str(report)
    with pytest.raises(ValueError, match=rf"`strict_data` is true[^\n]*\n{path}: 2 examples: {markup}.*\n{path}: 1 ex"):
        prepare([spec(path)], renderer, max_length=64, strict_data=True)
    plain = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a"}])
    assert prepare([spec(plain)], renderer, max_length=64, strict_data=True).report.train == 1


def test_many_examples_that_are_too_long_are_a_warning(write, renderer):
    path = write("a.jsonl", *[(f"q{i}", "a" * (1 if i < 8 else 90)) for i in range(20)])
    text = str(prepare([spec(path)], renderer, max_length=64).report)
    assert "WARNING: 12 of 20 examples are longer than `max_length` and were dropped" in text
    few = write("b.jsonl", *[(f"q{i}", "a" * (1 if i < 19 else 90)) for i in range(20)])
    assert "WARNING" not in str(prepare([spec(few)], renderer, max_length=64).report)


@pytest.mark.parametrize("kind", ["conversation", "completion", "text"])
def test_an_example_of_millions_of_characters_is_one_that_is_too_long(byte_tokenizer, tmp_path, kind, monkeypatch):
    for module in ("continuations", "chat", "turns"):
        monkeypatch.setattr(f"jaxft.data.{module}.OUTPUT_LIMIT", 2000)
    long = {"prompt": "q", "completion": "a" * 3000} if kind != "text" else {"text": "a" * 3000}
    short = {"prompt": "q", "completion": "a"} if kind != "text" else {"text": "a"}
    renderer = Renderer(byte_tokenizer, "chatml" if kind == "conversation" else None)
    path = write_lines(tmp_path / "a.jsonl", [short, long])
    for strategy in ("drop", "truncate"):
        source = prepare([spec(path)], renderer, max_length=64, excess_length_strategy=strategy).report.sources[0]
        assert (source.kept, source.too_long, source.truncated) == (1, 1, 0)
    with pytest.raises(ValueError, match=rf"{path}:2: more than 2000 characters, but `max_length` is 64"):
        prepare([spec(path)], renderer, max_length=64, excess_length_strategy="raise")


def test_the_last_answer_alone(renderer, tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a")) * 2]
    turns[3]["content"] = "b"
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    assert prepare([spec(path)], renderer, max_length=64).report.train_supervised == 4  # each answer with its end
    assert answers(prepare([spec(path)], renderer, max_length=64, mask_history=True).train[0]) == ["b"]


def test_the_last_answer_of_no_conversation_is_told(renderer, tmp_path, caplog):
    told = "mask_history has no effect: there are no conversations to train on"
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "q"}])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": turns}])
    for paths, settings, expected in (
        ([texts], {}, False),
        ([texts], {"mask_history": True}, True),
        ([texts, chats], {"mask_history": True}, False),
        ([texts], {"mask_history": True, "eval_datasets": [spec(chats)]}, True),
    ):
        caplog.clear()
        prepare([spec(path) for path in paths], renderer, max_length=64, **settings)
        assert (told in caplog.text) == expected


def test_a_record_that_cannot_be_read_ends_the_run_and_what_a_reader_decided_is_told(tmp_path, renderer):
    rows = [{"prompt": "q", "completion": "a"}] * 2
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n{oops\n" + json.dumps(rows[1]))
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON: "):
        prepare([spec(str(tmp_path / "a.jsonl"))], renderer, max_length=100)
    (tmp_path / "b.json").write_text(json.dumps({"rows": rows, "licence": "none"}))
    report = prepare([spec(str(tmp_path / "b.json"))], renderer, max_length=100).report
    assert "b.json: read the list under `rows`; not read: licence\n" in str(report)
