"""Checkpoints of bitsandbytes: dequantized as it dequantizes, kept bit for bit where the codes are jaxft's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.hub.checkpoint import write_checkpoint
from jaxft.hub.kept import kept
from jaxft.hub.prequantized import open_directory
from jaxft.hub.safetensors import SafetensorsError
from jaxft.hub.stack import Storage
from jaxft.quantization.integer import Int4, Int8
from jaxft.quantization.nf4 import NF4
from jaxft.quantization.qtensor import QTensor, quantize
from jaxft.sharding.mesh import make_mesh

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes.functional")
ops = pytest.importorskip("bitsandbytes.backends.default.ops")

pytestmark = pytest.mark.parity

CONFIG = {"quantization_config": {"quant_method": "bitsandbytes"}}
X = "model.x.weight"


def weight(*shape, seed=0) -> torch.Tensor:
    """Rows of very different sizes, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 1, shape[0])[:, None]


def four_bit(w, kind="nf4", blocksize=64, nested=False) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors that bitsandbytes stores for `w`, and what they stand for by its own reference kernel.

    Its kernel for the CPU is wrong where rows are no whole blocks.
    """
    codes, state = bnb.quantize_4bit(w, blocksize=blocksize, compress_statistics=nested, quant_type=kind)
    tensors = {X: codes} | {f"{X}.{key}": value for key, value in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    dense = ops._dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, blocksize, w.shape, torch.float32)
    return {name: tensor.numpy() for name, tensor in tensors.items()}, dense.numpy()


def int8(w) -> dict[str, np.ndarray]:
    codes, scales, _ = bnb.int8_vectorwise_quant(w.half())
    tensors = {X: codes, "model.x.SCB": scales, "model.x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def stored(directory, tensors):
    plain = {"model.norm.weight": np.arange(5, dtype=np.float32)}
    write_checkpoint(directory, tensors | plain, (tensors | plain).__getitem__)
    return open_directory(directory, CONFIG)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind, blocksize", [("nf4", 64), ("fp4", 64), ("nf4", 128), ("fp4", 256)])
@pytest.mark.parametrize("shape", [(24, 128), (7, 65), (300, 129), (5, 6)])
def test_four_bits(tmp_path, shape, kind, blocksize, nested):
    tensors, expected = four_bit(weight(*shape), kind, blocksize, nested)
    weights = stored(tmp_path, tensors)
    assert set(weights.names()) == {X, "model.norm.weight"}
    assert (weights.info(X).shape, weights.info(X).dtype) == (shape, np.float32)
    np.testing.assert_array_equal(weights.read(X), expected)
    for cut in (np.s_[1:4], np.s_[3:4, 1:], np.s_[:, 2:5], np.s_[-2:, :-1], np.s_[4:1], np.s_[::2, ::-1]):
        cut = cut if isinstance(cut, tuple) else (cut,)
        np.testing.assert_array_equal(weights.read(X, cut), expected[cut])
    np.testing.assert_array_equal(weights.read("model.norm.weight"), np.arange(5))
    weights.release(X)
    np.testing.assert_array_equal(weights.read(X), expected)


def test_packed_bytes_may_be_stored_as_another_dtype(tmp_path):
    tensors, expected = four_bit(weight(6, 64))
    tensors[X] = tensors[X].reshape(-1).view(np.float32)[:, None]
    np.testing.assert_array_equal(stored(tmp_path, tensors).read(X), expected)


def test_eight_bits(tmp_path):
    tensors = int8(weight(9, 31))
    expected = bnb.int8_vectorwise_dequant(*map(torch.tensor, (tensors[X], tensors["model.x.SCB"]))).numpy()
    weights = stored(tmp_path, tensors)
    assert set(weights.names()) == {X, "model.norm.weight"}
    np.testing.assert_array_equal(weights.read(X), expected)
    np.testing.assert_array_equal(weights.read(X, np.s_[2:7, 3:]), expected[2:7, 3:])


# Codes that are kept


def leaves(q) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(q)]


def kept_codes(weights, form) -> QTensor:
    """What `kept` gives, its 4-bit codes as an accelerator gets them out of the bytes."""
    unpacked = Storage((), jnp.dtype("float32"), form, None, P(), packed=None)
    return jax.jit(unpacked.encode)(kept(weights, X, form, None))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_codes_are_kept(tmp_path, nested, double_quant):
    """Whether in a file the scales are in 8 bits or not, the codes stay, and f32 scales decode to the same values."""
    w = weight(300, 128)
    tensors, expected = four_bit(w, nested=nested)
    weights = stored(tmp_path, tensors)
    q = kept_codes(weights, NF4(double_quant))
    both = np.stack([tensors[X] >> 4, tensors[X] & 15], axis=-1).reshape(300, 128)
    np.testing.assert_array_equal(np.asarray(q.codes), both)
    assert (q.codes.dtype, q.format) == (jnp.uint4, NF4(double_quant))
    if nested == double_quant:
        stored_scales = [tensors[f"{X}.absmax"].reshape(300, 2)]
        if nested:
            state = json.loads(bytes(tensors[f"{X}.quant_state.bitsandbytes__nf4"]))
            stored_scales += [tensors[f"{X}.nested_absmax"], np.float32(state["nested_offset"])]
        for leaf, value in zip(leaves(q)[1:], stored_scales, strict=True):
            np.testing.assert_array_equal(leaf, value)
    if nested or not double_quant:
        np.testing.assert_array_equal(np.asarray(q.dequantize(jnp.float32)), expected)
    else:
        for leaf, original in zip(leaves(q), leaves(quantize(jnp.asarray(w.numpy()), NF4(True))), strict=True):
            np.testing.assert_array_equal(leaf, original)


def test_int8_codes_are_kept(tmp_path):
    tensors = int8(weight(9, 31))
    weights = stored(tmp_path, tensors)
    q = kept(weights, X, Int8(), None)
    np.testing.assert_array_equal(np.asarray(q.codes), tensors[X])
    np.testing.assert_array_equal(np.asarray(q.scales)[:, 0], tensors["model.x.SCB"])
    np.testing.assert_allclose(np.asarray(q.dequantize(jnp.float32)), weights.read(X), rtol=2e-7)


@pytest.mark.parametrize("nested", [False, True])
def test_every_device_gets_its_part_of_the_codes(tmp_path, nested):
    weights = stored(tmp_path, four_bit(weight(16, 256), nested=nested)[0])
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    for form in (NF4(), NF4(True)):
        whole = kept(weights, X, form, None)
        for spec in (P("fsdp", "tensor"), P("tensor", "fsdp"), P(None, ("fsdp", "tensor"))):
            parted = kept(weights, X, form, NamedSharding(mesh, spec))
            assert parted.codes.sharding.spec == spec
            for one, other in zip(leaves(whole), leaves(parted), strict=True):
                np.testing.assert_array_equal(one, other)


def test_what_is_not_the_format_asked_for_is_not_kept(tmp_path):
    made = {
        "fp4": four_bit(weight(4, 128), "fp4")[0],
        "other blocks": four_bit(weight(4, 128), blocksize=128)[0],
        "blocks across rows": four_bit(weight(4, 96))[0],
        "int8": int8(weight(4, 128)),
    }
    odd = four_bit(weight(4, 128))[0]
    odd[f"{X}.quant_map"] = odd[f"{X}.quant_map"] * np.float32(1.001)
    made["other values"] = odd
    for case, tensors in made.items():
        (directory := tmp_path / case).mkdir()
        weights = stored(directory, tensors)
        for form in (NF4(), NF4(True), Int4(), None):
            assert kept(weights, X, form, None) is None, (case, form)
    assert kept(weights, "model.norm.weight", NF4(), None) is None


def test_scales_in_eight_bits_of_another_map_are_encoded_anew(tmp_path):
    tensors = four_bit(weight(300, 128), nested=True)[0]
    tensors[f"{X}.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
    weights = stored(tmp_path, tensors)
    q = kept_codes(weights, NF4(True))
    exact = kept_codes(weights, NF4())
    np.testing.assert_array_equal(np.asarray(q.codes), np.asarray(exact.codes))
    assert not np.array_equal(np.asarray(q.scales), tensors[f"{X}.absmax"].reshape(300, 2))
    bound = 0.02 * float(exact.scales.max())
    np.testing.assert_allclose(q.dequantize(jnp.float32), exact.dequantize(jnp.float32), atol=bound, rtol=0)


# Damage

STATE = f"{X}.quant_state.bitsandbytes__nf4"


def state(**changes):
    """An edit of the JSON of a nested NF4 weight; None removes a key."""

    def edit(tensors):
        content = json.loads(bytes(tensors[STATE])) | changes
        text = json.dumps({key: value for key, value in content.items() if value is not None})
        tensors[STATE] = np.frombuffer(text.encode(), np.uint8)

    return edit


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "edit, message",
    [
        (without(STATE), rf"{X}\.quant_state.bitsandbytes__nf4 \(or fp4\) is missing"),
        (without(f"{X}.absmax"), rf"{X}\.absmax is missing; without it {X} cannot be decoded"),
        (without(f"{X}.quant_map"), rf"{X}\.quant_map is missing"),
        (without(f"{X}.nested_absmax"), rf"{X}\.nested_absmax is missing"),
        (without(f"{X}.nested_quant_map"), rf"{X}\.nested_quant_map is missing"),
        (without(X), f"{X} is missing"),
        (replaced(X, lambda x: x[:-1]), rf"safetensors: {X} has 255 bytes, but shape \(4, 128\) takes 256"),
        (replaced(f"{X}.absmax", lambda x: x[:-1]), r"absmax, a part of .* is of shape \(7,\), expected \(8,\)"),
        (replaced(f"{X}.absmax", lambda x: x.astype(np.float32)), "absmax, a part .* is float32, expected uint8"),
        (replaced(STATE, lambda x: x[:-1]), f"safetensors: {STATE}, a part of {X}, is damaged: not valid JSON"),
        (replaced(STATE, lambda x: x[:0]), "is damaged: not valid JSON"),
        (state(blocksize=0), "is damaged: its blocksize is 0"),
        (state(blocksize=None), "is damaged: it has no blocksize"),
        (state(shape=[512]), r"is damaged: its shape is \[512\]"),
        (state(shape=[4, "x"]), r"is damaged: its shape is \[4, 'x'\]"),
        (state(quant_type="nf3"), "is damaged: its quant_type is 'nf3'"),
        (state(nested_offset=None), "is damaged: it has no nested_offset"),
        (state(nested_offset="x"), "is damaged: its nested_offset is 'x'"),
        (lambda tensors: tensors.update({STATE[:-3] + "fp4": tensors[STATE]}), "is there 2 times"),
    ],
)
def test_damage_to_four_bits(tmp_path, edit, message):
    tensors = four_bit(weight(4, 128), nested=True)[0]
    edit(tensors)
    with pytest.raises(SafetensorsError, match=message):
        stored(tmp_path, tensors)


@pytest.mark.parametrize(
    "edit, message",
    [
        (without("model.x.SCB"), f"model.x.SCB is missing; without it {X} cannot"),
        (replaced("model.x.SCB", lambda x: x[1:]), r"SCB, a part of .* is of shape \(8,\), expected \(9,\)"),
        (replaced("model.x.weight_format", lambda x: x + 1), r"weight_format, .* is not 0 \(rows\)"),
        (replaced(X, lambda x: x.reshape(-1)), r"x.weight is of shape \(279,\), expected \[out, in\]"),
        (replaced(X, lambda x: x.view(np.uint8)), "x.weight is uint8, and nothing says how to decode it"),
    ],
)
def test_damage_to_eight_bits(tmp_path, edit, message):
    tensors = int8(weight(9, 31))
    edit(tensors)
    with pytest.raises(SafetensorsError, match=message):
        stored(tmp_path, tensors)
