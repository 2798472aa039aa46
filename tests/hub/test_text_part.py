"""The part for text of models that can see: loaded, adapted, merged, and put back beside the rest."""

import copy
import json
import logging
import shutil

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.hub.checkpoint import Checkpoint, write_checkpoint
from jaxft.models.hf_config import decoder_config

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TEXT = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=64,
    num_attention_heads=4, num_key_value_heads=2, head_dim=12,
)  # fmt: skip
EYES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28)
CONFIGS = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=TEXT | dict(sliding_window=7, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
        vision_config=EYES | dict(patch_size=14),
        mm_tokens_per_image=1,
    ),
    "mistral3": lambda: transformers.Mistral3Config(
        text_config=TEXT | dict(model_type="mistral"),
        vision_config=EYES | dict(model_type="pixtral", patch_size=14),
        tie_word_embeddings=False,
    ),
    "llava": lambda: transformers.LlavaConfig(
        text_config=TEXT | dict(model_type="llama"), vision_config=EYES | dict(model_type="clip_vision_model")
    ),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={key: value for key, value in TEXT.items() if key != "head_dim"} | dict(model_type="qwen2"),
        vision_config=EYES | dict(model_type="internvl_vision", image_size=[28, 28], patch_size=[14, 14]),
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19), dtype=np.int32)


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request, tmp_path_factory):
    torch.manual_seed(1)
    config = CONFIGS[request.param]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()


def adapted(base):
    rng = np.random.default_rng(0)
    config = LoraConfig(r=3, lora_alpha=6)
    factors = {
        module: Factors(*(rng.normal(0, 0.1, part.shape).astype(np.float32) for part in (one.A, one.B)))
        for module, one in factors_of(attach(base, config, jax.random.key(0))).items()
    }
    return attach_factors(base, config, factors)


def test_logits_of_text_agree(whole, caplog):
    reference, path = whole
    with caplog.at_level(logging.WARNING):
        model = jaxft.load_model(path)
    assert "only the part for text is loaded" in caplog.text
    np.testing.assert_allclose(model(TOKENS), logits(reference), atol=1e-4, rtol=0)


def test_names_in_memory_are_read_as_well(whole, tmp_path):
    reference, path = whole
    with Checkpoint.open(path) as files:
        renamed = {
            name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"):
            files.read(name) for name in files.names()
        }  # fmt: skip
        write_checkpoint(tmp_path, renamed, renamed.__getitem__)
    shutil.copyfile(path / "config.json", tmp_path / "config.json")
    np.testing.assert_allclose(jaxft.load_model(tmp_path)(TOKENS), logits(reference), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mistral3", "internvl"])
def test_a_head_in_the_files_is_used_whatever_the_config_leaves_out(name, tmp_path):
    """Configs of older versions do not say that the two are untied, and today's default is that they are tied."""
    torch.manual_seed(2)
    config = CONFIGS[name]()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = jaxft.load_model(tmp_path)
    np.testing.assert_allclose(model(TOKENS), logits(reference), atol=1e-4, rtol=0)
    jaxft.save_model(model, tmp_path / "again")
    np.testing.assert_array_equal(jaxft.load_model(tmp_path / "again")(TOKENS), model(TOKENS))
    assert json.loads((tmp_path / "again/config.json").read_text())["tie_word_embeddings"] is False


def test_a_tensor_under_both_names(whole, tmp_path):
    with Checkpoint.open(whole[1]) as files:
        name = "language_model.model.embed_tokens.weight"
        tensors = {each: files.read(each) for each in files.names()}
        tensors["model.language_model.embed_tokens.weight"] = tensors[name]
        write_checkpoint(tmp_path, tensors, tensors.__getitem__)
    shutil.copyfile(whole[1] / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"holds model\.language_model\.embed_tokens\.weight twice, as"):
        jaxft.load_model(tmp_path)


def test_adapters_leave_the_eyes_alone(whole, tmp_path):
    reference, path = whole
    base = jaxft.load_model(path)
    model = adapted(base)
    jaxft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    assert not [name for name in theirs.targeted_module_names if "vision" in name]
    assert np.abs(logits(theirs) - logits(reference)).max() > 0.05
    np.testing.assert_allclose(model(TOKENS), logits(theirs), atol=1e-4, rtol=0)
    np.testing.assert_array_equal(jaxft.load_adapter(base, tmp_path)(TOKENS), model(TOKENS))


def test_a_merged_model_still_sees(whole, tmp_path):
    reference, path = whole
    model = adapted(jaxft.load_model(path))
    jaxft.save_model(jaxft.merge_adapter(model), tmp_path)
    merged = type(reference).from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(model(TOKENS), logits(merged), atol=1e-4, rtol=0)
    eyes = {name: value for name, value in reference.state_dict().items() if "language_model" not in name}
    for name, value in merged.state_dict().items():
        if name in eyes and "lm_head" not in name:
            assert torch.equal(value, eyes[name]), name


def test_text_models_that_are_not_supported():
    raw = dict(
        model_type="llava", text_config=dict(model_type="phi"), vision_config=dict(model_type="clip_vision_model")
    )
    with pytest.raises(ValueError, match="'llava with the text model phi' is not supported; supported: cohere2"):
        decoder_config(raw)
