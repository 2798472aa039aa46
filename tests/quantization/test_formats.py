import pytest

from jaxft.quantization.formats import parse_format
from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.nf4 import NF4


def test_names_give_formats():
    assert parse_format("int8") == Int8()
    assert parse_format("int4") == Int4(64)
    assert parse_format("int4", group_size=128) == Int4(128)
    assert parse_format("nf4") == NF4()
    assert parse_format("nf4", double_quant=True) == NF4(double_quant=True)


def test_formats_are_values():
    assert len({NF4(), NF4(), NF4(True), Int4(), Int4(64), Int4(32), Int8()}) == 5


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fp4", {}, "unknown quantization format 'fp4'; choose int8, int4 or nf4"),
        ("int4", {"double_quant": True}, "double_quant compresses the scales of nf4; int4"),
        ("nf4", {"group_size": 32}, "group_size is an option of int4; the blocks of nf4 are fixed"),
        ("int8", {"group_size": 64}, "group_size is an option of int4; the blocks of int8 are fixed"),
        ("int4", {"group_size": -1}, "group_size must be a positive number of columns, got -1"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        parse_format(name, **options)
