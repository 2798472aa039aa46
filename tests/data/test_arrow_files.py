import datetime
import json
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from jaxft.data.records import BadRecord
from jaxft.data.sources import read

TOOLS = [
    {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}, "required": ["city"]}},
    {"name": "convert", "parameters": {"properties": {"amount": {"type": "number", "enum": [1, None]}}}},
    {"name": "ping", "parameters": {"properties": {}}},
]
CALLS = [
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
    {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "convert", "arguments": {"amount": 5}}}],
        "content": "x",
    },
    {"role": "tool", "content": "rain"},
]


def parquet(path: Path, table: pyarrow.Table, **options) -> str:
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


def arrow_file(path: Path, table: pyarrow.Table) -> str:
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return str(path)


def arrow_stream(path: Path, table: pyarrow.Table) -> str:
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return str(path)


def saved(path: Path, table: pyarrow.Table) -> str:
    datasets.Dataset(table).save_to_disk(path)
    return str(path)


STORES = [
    (parquet, "a.parquet"),
    (parquet, "A.PARQUET"),
    (arrow_file, "a.arrow"),
    (arrow_file, "a.feather"),
    (arrow_stream, "a.arrow"),
    (saved, "saved"),
]
stores = pytest.mark.parametrize("store, name", STORES)


@stores
def test_nulls_that_were_filled_in_are_left_out_and_counted(tmp_path, store, name):
    rows = [
        {"tools": TOOLS, "messages": CALLS, "note": None},
        {"tools": TOOLS[2:], "messages": [None, CALLS[2]], "note": "n"},
        {"tools": None, "messages": [], "note": None},
    ]
    path = store(tmp_path / name, pyarrow.Table.from_pylist(rows))
    first, second, third = read(path)
    assert first.values == rows[0]
    assert second.values == rows[1]
    assert third.values == rows[2]
    assert [record.origin for record in (first, second, third)] == [f"{path}:{row}" for row in (1, 2, 3)]
    # tools: amount and city of three property objects (4), and `required` of two; messages: content of one, the
    # calls of one, city or amount of each call
    assert [first.filled, second.filled, third.filled] == [4 + 2 + 1 + 1 + 2, 2 + 1 + 1, 0]


def test_objects_of_nulls_and_null_objects_are_told_apart(tmp_path):
    inner = pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.struct({"c": pyarrow.string()})})
    values = [{"a": None, "b": {"c": None}}, {"a": None, "b": None}, None, {"a": 0, "b": {"c": ""}}]
    table = pyarrow.table(
        {"top": pyarrow.array(values, inner), "in": pyarrow.array([values] * 4, pyarrow.list_(inner))}
    )
    found = read(parquet(tmp_path / "a.parquet", table))
    meant = [{"b": {}}, {}, None, {"a": 0, "b": {"c": ""}}]
    assert [record.values["top"] for record in found] == meant
    assert [record.values["in"] for record in found] == [meant] * 4
    assert [record.filled for record in found] == [2 + 4, 2 + 4, 4, 4]


@pytest.mark.parametrize(
    "of", [pyarrow.list_, pyarrow.large_list, lambda type: pyarrow.list_(type, 3), pyarrow.list_view]
)
def test_null_elements_of_lists_are_values(tmp_path, of):
    inner = pyarrow.struct({"a": of(pyarrow.int64()), "b": pyarrow.int64()})
    table = pyarrow.table({"x": pyarrow.array([[{"a": [1, None, 2]}, None, {"a": None, "b": 1}]], of(inner))})
    (found,) = read(arrow_file(tmp_path / "a.arrow", table))
    assert found.values == {"x": [{"a": [1, None, 2]}, None, {"b": 1}]}
    assert found.filled == 2


def test_maps_are_objects(tmp_path):
    of = pyarrow.struct({"a": pyarrow.int64(), "b": pyarrow.int64()})
    pairs = [[("k", {"a": 1}), ("l", None)], [], None, [("k", {"b": 1}), ("k", {"b": 2})]]
    path = parquet(
        tmp_path / "a.parquet", pyarrow.table({"m": pyarrow.array(pairs, pyarrow.map_(pyarrow.string(), of))})
    )
    *found, bad = read(path)
    assert [record.values["m"] for record in found] == [{"k": {"a": 1}, "l": None}, {}, None]
    assert [record.filled for record in found] == [1, 0, 0]
    assert bad == BadRecord(f"{path}:4", "`m`: key 'k' is there twice")


JSON = ['{"a": 1, "b": null, "c": [{"d": null}]}', '"text"', None, '[1, "1"]']
VALUES = [{"a": 1, "b": None, "c": [{"d": None}]}, "text", None, [1, "1"]]


@stores
def test_columns_of_json_are_the_values_they_hold(tmp_path, store, name):
    column = pyarrow.array(JSON, pyarrow.json_())
    inside = pyarrow.StructArray.from_arrays([column, pyarrow.array(["x"] * 4)], ["arguments", "name"])
    table = pyarrow.table({"j": column, "s": inside, "plain": pyarrow.array(JSON)})
    found = read(store(tmp_path / name, table))
    assert [record.values["j"] for record in found] == VALUES
    assert [record.values["s"].get("arguments") for record in found] == VALUES
    assert [record.values["plain"] for record in found] == JSON
    assert [record.filled for record in found] == [0, 0, 1, 0]


FEATURES = datasets.Features(
    {
        "tools": datasets.List(datasets.Json()),
        "meta": datasets.Json(),
        "messages": datasets.List({"role": datasets.Value("string"), "arguments": datasets.Json()}),
    }
)
ROWS = [
    {"tools": TOOLS, "meta": {"a": None}, "messages": [{"role": "user", "arguments": {"x": [1, None]}}]},
    {"tools": [], "meta": "[1]", "messages": [{"role": "user", "arguments": None}]},
]


@pytest.mark.parametrize("store", ["parquet", "saved", "split", "hub"])
def test_json_features_of_datasets(tmp_path, store, monkeypatch):
    rows = datasets.Dataset.from_list(ROWS, features=FEATURES)
    path = str(tmp_path / "a.parquet") if store == "parquet" else str(tmp_path / "saved")
    if store == "parquet":
        rows.to_parquet(path)
    elif store == "hub":
        path = "org/name"
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    else:
        (rows if store == "saved" else datasets.DatasetDict({"train": rows})).save_to_disk(path)
    first, second = read(path)
    assert first.values == ROWS[0]
    assert second.values == {"tools": [], "meta": [1], "messages": [{"role": "user"}]}
    assert (first.filled, second.filled) == (0, 1)


@pytest.mark.parametrize("text", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
@pytest.mark.parametrize("lists", ["List", "LargeList", "Sequence", None])
def test_json_features_are_told_by_what_stands_beside_columns_of_text(tmp_path, text, lists):
    feature = {"_type": "Json"}
    many = {"feature": {"x": feature}, "_type": lists} if lists else [{"x": feature}]
    features = {"one": feature, "many": many, "text": {"dtype": "string", "_type": "Value"}}
    beside = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pyarrow.schema(
        {"one": text, "many": pyarrow.list_(pyarrow.struct({"x": text})), "text": text, "new": text}, metadata=beside
    )
    row = {"one": '{"a": null}', "many": [{"x": "[1]"}, {"x": None}], "text": "[1]", "new": "[2]"}
    (found,) = read(arrow_file(tmp_path / "a.arrow", pyarrow.Table.from_pylist([row], schema)))
    assert found.values == {"one": {"a": None}, "many": [{"x": [1]}, {}], "text": "[1]", "new": "[2]"}


def test_bad_json_in_a_column_is_a_fault_of_that_record(tmp_path):
    column = pyarrow.array(['{"a": 1}', '{"a": ', '{"a": NaN}', '{"a": 1, "a": 1}', "2"], pyarrow.json_())
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"n": [1] * 5, "j": column}))
    found = read(path)
    assert [record.origin for record in found if isinstance(record, BadRecord)] == [
        f"{path}:{row}" for row in (2, 3, 4)
    ]
    assert found[1].reason == "`j`: not JSON: Expecting value (column 6)"
    assert found[2].reason == "`j`: NaN is not JSON"
    assert found[3].reason == "`j`: key 'a' is there twice"


def test_a_struct_of_lists_stays_one(tmp_path):
    """As older versions of `datasets` keep a list of objects."""
    features = datasets.Features(
        {"turns": {"role": datasets.List(datasets.Value("string")), "n": [datasets.Value("int64")]}}
    )
    row = {"turns": {"role": ["user", None], "n": [1, 2]}}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))[0].values == row


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["a", None, "ö"]).dictionary_encode(),
        pyarrow.array(["a", None, "ö"], pyarrow.large_string()),
        pyarrow.array(["a", None, "ö"], pyarrow.string_view()),
        pyarrow.chunked_array([["a"], [None, "ö"]]),
    ],
)
def test_kinds_of_text(tmp_path, column):
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"t": column}))
    assert [record.values["t"] for record in read(path)] == ["a", None, "ö"]


def as_text(values: list[bytes]) -> pyarrow.Array:
    """A column of text that Arrow takes on trust."""
    binary = pyarrow.array(values, pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), len(values), binary.buffers())


@pytest.mark.parametrize("rows", [3, 2500])
@pytest.mark.parametrize("nested", [False, True])
def test_text_that_is_not_utf8_is_a_fault_of_its_record(tmp_path, rows, nested):
    text = [f"ö{row}".encode() for row in range(rows)]
    bad = {1, rows - 1}
    for row in bad:
        text[row] = b"cut \xe4\xb8"
    column = as_text(text)
    if nested:
        column = pyarrow.StructArray.from_arrays([column], ["inside"])
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"n": range(rows), "prompt": column}))
    found = read(path)
    assert len(found) == rows
    for row, record in enumerate(found):
        if row in bad:
            assert record == BadRecord(f"{path}:{row + 1}", "`prompt`: not UTF-8 (byte 0xe4)")
        else:
            value = {"inside": f"ö{row}"} if nested else f"ö{row}"
            assert (record.values, record.origin) == ({"n": row, "prompt": value}, f"{path}:{row + 1}")


def test_a_date_beyond_the_calendar_is_a_fault_of_its_record(tmp_path):
    column = pyarrow.array([0, 10**12], pyarrow.int64()).cast(pyarrow.timestamp("s"))
    first, second = read(arrow_file(tmp_path / "a.arrow", pyarrow.table({"t": column})))
    assert first.values == {"t": datetime.datetime(1970, 1, 1)}
    assert (second.origin[-2:], second.reason[:4]) == (":2", "`t`:")


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pytest.raises(ValueError, match=r"a\.parquet: a column is there twice: text, text"):
        read(parquet(tmp_path / "a.parquet", table))


@pytest.mark.parametrize(
    "name, data, reason",
    [
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b'{"a": 1}', "looks like JSON"),
        ("a.parquet", b"anything", "not a readable Parquet file; it begins otherwise"),
        ("a.arrow", b"ARROW1\0\0cut", "not a readable Arrow file"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0", "not a readable Arrow file"),
        ("a.feather", b"FEA1", "not a readable Arrow file; it begins otherwise"),
    ],
)
def test_damaged_files(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: {reason}"):
        read(str(path))


def test_a_parquet_file_damaged_inside_says_how_far_it_could_be_read(tmp_path):
    texts = [f"{row * 7919 % 10007:x} " * 50 for row in range(4000)]
    path = parquet(tmp_path / "a.parquet", pyarrow.table({"t": texts}), row_group_size=2000, use_dictionary=False)
    data = bytearray(Path(path).read_bytes())
    start = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 20] = bytes(20)
    Path(path).write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable Parquet file, after row 2000: "):
        read(path)
    assert len(read(path, max_examples=2000)) == 2000


def test_no_more_of_a_parquet_file_is_read_than_is_asked_for(tmp_path):
    table = pyarrow.table({"t": [f"{row}" * 1000 for row in range(5000)]})
    path = parquet(tmp_path / "a.parquet", table, row_group_size=500, use_dictionary=False, compression="none")
    read(path, max_examples=1)  # imports
    tracemalloc.start()
    try:
        asked = read(path, max_examples=3)
        assert tracemalloc.get_traced_memory()[1] < 200_000 < Path(path).stat().st_size
    finally:
        tracemalloc.stop()
    assert [record.origin for record in asked] == [f"{path}:{row}" for row in (1, 2, 3)]
