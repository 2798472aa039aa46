"""8-bit weights with scales beside them, in the layouts of four tools."""

import ml_dtypes
import numpy as np
import pytest

from jaxft.hub.checkpoint import write_checkpoint
from jaxft.hub.prequantized import open_directory
from jaxft.hub.safetensors import SafetensorsError

torch = pytest.importorskip("torch")
Fp8Dequantize = pytest.importorskip("transformers.integrations.finegrained_fp8").Fp8Dequantize

X = "model.self_attn.k_proj.weight"
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 8]}
TENSORS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
INTEGERS = {"quant_method": "compressed-tensors", "format": "int-quantized"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}


def codes(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == np.int8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    return (rng.normal(size=shape) * 50).astype(dtype)


def scales(shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).uniform(0.01, 2, shape).astype(dtype)


def stored(directory, settings, tensors):
    write_checkpoint(directory, tensors, tensors.__getitem__)
    return open_directory(directory, {"quantization_config": settings})


def slowly(weight, scale, rows, columns):
    """Element by element: the scale of its block, `rows` x `columns`."""
    return np.array(
        [
            [np.float32(x) * np.float32(scale[i // rows, j // columns]) for j, x in enumerate(row)]
            for i, row in enumerate(weight)
        ]
    )


def check(weights, expected, shown=(X,)):
    assert weights.names() == shown
    assert (weights.info(X).shape, weights.info(X).dtype) == (expected.shape, np.float32)
    np.testing.assert_array_equal(weights.read(X), expected)
    for cut in (np.s_[5:18], np.s_[17:18, 3:], np.s_[:, 7:9]):
        cut = cut if isinstance(cut, tuple) else (cut,)
        np.testing.assert_array_equal(weights.read(X, cut), expected[cut])


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_blocks_as_transformers_dequantizes_them(tmp_path, dtype):
    tensors = {X: codes((48, 24), E4M3), f"{X}_scale_inv": scales((3, 3), dtype)}
    inputs = (
        torch.tensor(tensors[X].view(np.uint8)).view(torch.float8_e4m3fn),
        torch.tensor(tensors[f"{X}_scale_inv"].astype(np.float32)),
    )
    expected = Fp8Dequantize(None)._dequantize_one(*inputs, output_dtype=torch.float32).numpy()
    check(stored(tmp_path, BLOCKS, tensors), expected)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_blocks_may_be_short_at_the_edges(tmp_path, dtype):
    tensors = {X: codes((37, 19), dtype), f"{X}_scale_inv": scales((3, 3))}
    check(stored(tmp_path, BLOCKS, tensors), slowly(tensors[X], tensors[f"{X}_scale_inv"], 16, 8))


def test_blocks_of_compressed_tensors(tmp_path):
    tensors = {X: codes((37, 19), E4M3), f"{X}_scale": scales((3, 3))}
    groups = {"group_0": {"weights": {"block_structure": [16, 8]}}}
    check(
        stored(tmp_path, TENSORS | {"config_groups": groups}, tensors), slowly(tensors[X], tensors[f"{X}_scale"], 16, 8)
    )


def test_blocks_are_128_unless_told(tmp_path):
    tensors = {X: codes((130, 140), E4M3), f"{X}_scale_inv": scales((2, 2))}
    expected = slowly(tensors[X], tensors[f"{X}_scale_inv"], 128, 128)
    check(stored(tmp_path, {"quant_method": "fp8"}, tensors), expected)


@pytest.mark.parametrize("settings", [TENSORS, MODELOPT, INTEGERS, {"quant_method": "fbgemm_fp8"}])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (37,), (37, 1)])
def test_one_scale_or_one_to_a_row(tmp_path, settings, shape):
    tensors = {X: codes((37, 19), np.int8 if settings is INTEGERS else E4M3), f"{X}_scale": scales(shape)}
    rows = 1 if 37 in shape else 37
    check(stored(tmp_path, settings, tensors), slowly(tensors[X], tensors[f"{X}_scale"].reshape(-1, 1), rows, 19))


def test_scales_of_activations_and_cache_are_left_out_and_others_are_not(tmp_path):
    module = X.removesuffix(".weight")
    tensors = {X: codes((37, 19), E4M3), f"{X}_scale": scales(())}
    tensors |= {
        f"{module}.{name}": scales(()) for name in ("input_scale", "k_scale", "output_scale", "activation_scale")
    }
    tensors |= {"model.self_attn.k_scale": scales(()), "model.self_attn.v_scale": scales(())}
    others = {
        f"{module}.weight_zero_point": scales(()),
        "model.norm.input_scale": scales(()),
        "model.k_scale": scales(()),
    }
    weights = stored(tmp_path, MODELOPT, tensors | others)
    assert set(weights.names()) == {X, *others}


def test_the_settings_of_modelopt_may_stand_in_a_file_of_their_own(tmp_path):
    tensors = {X: codes((37, 19), E4M3), f"{X}_scale": scales(())}
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    check(stored(tmp_path, None, tensors), slowly(tensors[X], tensors[f"{X}_scale"].reshape(1, 1), 37, 19))


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"quantization": {"quant_algo": "NVFP4"}}', "ModelOpt's quant_algo 'NVFP4' is not supported; supported: FP8"),
        ('{"quantization": null}', "hf_quant_config.json: the quantization settings are None, not an object"),
        ("[]", "hf_quant_config.json: the quantization settings are None"),
        ("{", "hf_quant_config.json: not valid JSON"),
    ],
)
def test_settings_of_modelopt_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, None, {X: codes((37, 19), E4M3)})


@pytest.mark.parametrize(
    "settings, shapes, message",
    [
        (BLOCKS, {}, rf"{X}_scale is missing; without it {X} cannot be decoded"),
        (BLOCKS, {f"{X}_scale_inv": (3, 2)}, r"safetensors: .*_scale_inv, .* \(3, 2\); .* one to a block of \[16, 8\]"),
        (TENSORS, {f"{X}_scale": (3, 3)}, r"is of shape \(3, 3\); expected one scale, one to a row$"),
        (TENSORS, {f"{X}_scale": (19,)}, r"is of shape \(19,\); expected one scale, one to a row$"),
        (TENSORS | {"format": "pack-quantized"}, {}, "format 'pack-quantized' is not supported; .* float-quantized"),
        (TENSORS | {"format": None}, {}, "format None is not supported"),
        (BLOCKS | {"weight_block_size": [16, 0]}, {}, r"size of weight blocks is \[16, 0\]"),
        (BLOCKS | {"weight_block_size": 128}, {}, "size of weight blocks is 128"),
    ],
)
def test_what_cannot_be_decoded(tmp_path, settings, shapes, message):
    tensors = {X: codes((37, 19), E4M3)} | {name: scales(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        stored(tmp_path, settings, tensors)


def test_scales_are_floats(tmp_path):
    tensors = {X: codes((37, 19), E4M3), f"{X}_scale": np.ones((), np.uint8)}
    with pytest.raises(SafetensorsError, match=r"_scale, a part of .*, is uint8, expected float32 or bfloat16 or"):
        stored(tmp_path, TENSORS, tensors)
