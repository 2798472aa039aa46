"""AWQ and GPTQ: packed here one code at a time, as their tools do it, and unpacked to the values that went in."""

import numpy as np
import pytest

from jaxft.hub.checkpoint import write_checkpoint
from jaxft.hub.prequantized import open_directory

MODULE = "model.x"
X = f"{MODULE}.weight"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}


def stored(directory, settings, tensors):
    tensors = {f"{MODULE}.{name}": value for name, value in tensors.items()}
    write_checkpoint(directory, tensors, tensors.__getitem__)
    return open_directory(directory, {"quantization_config": settings})


def grid(width, out, groups, bits, seed=0):
    """Codes [in, out], zeros and scales [groups, out]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (width, out))
    zeros = rng.integers(0, 2**bits, (groups, out))
    return codes, zeros, rng.uniform(0.01, 1, (groups, out)).astype(np.float16)


def dense(codes, zeros, scales, group_of):
    """[out, in], from the formula, element by element."""
    width, out = codes.shape
    values = np.empty((out, width), np.float32)
    for i in range(width):
        for o in range(out):
            g = group_of[i]
            values[o, i] = np.float32(int(codes[i, o]) - int(zeros[g, o])) * np.float32(scales[g, o])
    return values


def pack_columns(codes, bits, order=None):
    """[n, m] to int32 [n, m * bits / 32]; slot k of a word takes column order[k], else k."""
    per_word = 32 // bits
    order = order or range(per_word)
    words = [[0] * (-(-codes.shape[1] // per_word)) for _ in codes]
    for row, line in zip(words, codes.tolist(), strict=True):
        for w in range(len(row)):
            for slot, column in enumerate(order):
                if w * per_word + column < len(line):
                    row[w] |= line[w * per_word + column] << (bits * slot)
    return np.array(words, np.uint32).view(np.int32)


def check(weights, expected):
    assert weights.names() == (X,)
    assert (weights.info(X).shape, weights.info(X).dtype) == (expected.shape, np.float32)
    np.testing.assert_array_equal(weights.read(X), expected)
    for cut in (np.s_[3:14], np.s_[5:6, 7:], np.s_[8:16, :3], np.s_[-3:]):
        cut = cut if isinstance(cut, tuple) else (cut,)
        np.testing.assert_array_equal(weights.read(X, cut), expected[cut])


def awq(width=48, out=24, group_size=16):
    codes, zeros, scales = grid(width, out, -(-width // group_size), 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors = {"qweight": pack_columns(codes, 4, order), "qzeros": pack_columns(zeros, 4, order), "scales": scales}
    return tensors, dense(codes, zeros, scales, np.arange(width) // group_size)


@pytest.mark.parametrize("group_size, declared", [(16, 16), (20, 20), (48, -1)])
def test_awq(tmp_path, group_size, declared):
    tensors, expected = awq(group_size=group_size)
    check(stored(tmp_path, AWQ | {"group_size": declared}, tensors), expected)


def less_one(words, bits):
    """Every field of a word less one, which borrows from the next where a zero is 0."""
    return (words.view(np.uint32) - np.uint32(sum(1 << shift for shift in range(0, 32, bits)))).view(np.int32)


def gptq(bits, less, width=64, out=32, group_size=16, order=None):
    groups = -(-width // group_size)
    codes, zeros, scales = grid(width, out, groups, bits)
    tensors = {
        "qweight": pack_columns(codes.T, bits).T,
        "qzeros": less_one(pack_columns(zeros, bits), bits) if less else pack_columns(zeros, bits),
        "scales": scales,
    }
    group_of = np.arange(width) // group_size
    if order is not None:
        group_of = tensors["g_idx"] = order(group_of).astype(np.int32)
    return tensors, dense(codes, zeros, scales, group_of)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "less, version",
    [(1, {}), (1, {"checkpoint_format": "gptq"}), (0, {"checkpoint_format": "gptq_v2"}), (0, {"format": "gptq_v2"})],
)
def test_gptq_with_both_ways_to_store_zeros(tmp_path, bits, less, version):
    tensors, expected = gptq(bits, less)
    check(stored(tmp_path, GPTQ | {"bits": bits} | version, tensors), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", [lambda groups: groups, np.random.default_rng(3).permutation])
def test_gptq_with_inputs_in_any_order(tmp_path, bits, order):
    tensors, expected = gptq(bits, 1, order=order)
    check(stored(tmp_path, GPTQ | {"bits": bits, "desc_act": True}, tensors), expected)


@pytest.mark.parametrize("group_size, declared", [(24, 24), (64, -1)])
def test_gptq_with_other_groups(tmp_path, group_size, declared):
    tensors, expected = gptq(4, 1, group_size=group_size)
    check(stored(tmp_path, GPTQ | {"group_size": declared}, tensors), expected)


@pytest.mark.parametrize(
    "settings, make, message",
    [
        (AWQ | {"version": "gemv"}, awq, "AWQ version 'gemv' with 4 bits is not supported; supported: gemm with 4"),
        (AWQ | {"bits": 8}, awq, "AWQ version 'gemm' with 8 bits is not supported"),
        (AWQ | {"group_size": 0}, awq, "group_size of the quantization_config is 0"),
        (AWQ | {"group_size": 8}, awq, r"qzeros, a part of model.x.weight, is of shape \(3, 3\), expected \(6, 3\)"),
        (GPTQ | {"bits": 3}, awq, "GPTQ checkpoint_format 'gptq' with 3 bits is not supported; .* with 2, 4, 8 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, awq, "GPTQ checkpoint_format 'marlin' with 4 bits"),
        (GPTQ, awq, r"qzeros, .* is of shape \(3, 3\), expected \(24, 1\)"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, settings, make, message):
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, settings, make()[0])


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("qzeros"), f"{MODULE}.qzeros is missing; without it {X} cannot be decoded"),
        (lambda t: t.pop("scales"), f"{MODULE}.scales is missing"),
        (lambda t: t.update(scales=t["scales"][:, 1:]), r"scales, .* is of shape \(4, 31\), expected \(4, 32\)"),
        (lambda t: t.update(qweight=t["qweight"].astype(np.float32)), "qweight, .*, is float32, expected int32"),
        (lambda t: t.update(qweight=t["qweight"][0]), r"qweight, .* is of shape \(32,\), expected a matrix"),
        (lambda t: t.update(g_idx=t["g_idx"][1:]), r"g_idx, .* is of shape \(63,\), expected \(64,\)"),
        (lambda t: t.update(g_idx=t["g_idx"] + 1), "safetensors: model.x.g_idx, .* names groups 1 to 4 of 4"),
        (lambda t: t.update(weight=np.ones((32, 64), np.float32)), f"holds {X} itself besides {MODULE}.qweight"),
    ],
)
def test_damage(tmp_path, edit, message):
    tensors, _ = gptq(4, 1, order=lambda groups: groups)
    edit(tensors)
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, GPTQ, tensors)
