"""Adapters to and from real PEFT: the same logits on both sides, for every variant; and what is refused."""

import errno
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import jaxft
from jaxft.adapters.attach import attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.hub.digests import DIGEST_FILE, write_digests
from jaxft.hub.peft import HEAD_COPY
from jaxft.hub.safetensors import SafetensorsFile
from jaxft.hub.safetensors_writer import write_safetensors

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
"""Of logits, as a part of the largest."""
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19), dtype=np.int32)

VARIANTS = {
    "lora": dict(r=4, lora_alpha=6),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True),
    "dora": dict(r=4, lora_alpha=6, use_dora=True),
    "dora-rslora-patterns": dict(r=4, lora_alpha=3, use_dora=True, use_rslora=True, rank_pattern={"down_proj": 2}),
    "list": dict(r=3, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "regex-some-layers": dict(r=3, lora_alpha=8, target_modules=r".*\.[02]\.(mlp|self_attn)\.(up|o)_proj"),
    "layers-to-transform": dict(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"], layers_to_transform=[1]),
    "excluded": dict(r=2, lora_alpha=4, exclude_modules=["k_proj", "model.layers.1.mlp.up_proj"]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        rank_pattern={r"model\.layers\.1\.self_attn\.q_proj": 7, "up_proj": 2},
        alpha_pattern={"v_proj": 2, r"layers\.0\.mlp\.down_proj": 1.5},
    ),
}  # fmt: skip


HEAD_VARIANT = dict(r=3, lora_alpha=8, target_modules=["k_proj", "lm_head"])
each_variant = pytest.mark.parametrize(
    "base, settings",
    [pytest.param(tied, settings, id=f"{'tied' if tied else 'untied'}-{name}")
     for tied in (False, True) for name, settings in VARIANTS.items()]
    + [pytest.param(False, HEAD_VARIANT, id="untied-head-too")],
    indirect=["base"],
)  # fmt: skip


@pytest.fixture(scope="module", params=[False], ids=["untied"])
def base(request, tmp_path_factory):
    """A small random Llama on disk, with or without tied embeddings."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, attention_bias=True, tie_word_embeddings=request.param,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def torch_base(path):
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def assert_logits_agree(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def lora_config(settings) -> LoraConfig:
    return LoraConfig(**dict(target_modules="all-linear") | settings)


def randomised(model, config, seed=1):
    """The model with an adapter whose every entry matters."""
    rng = np.random.default_rng(seed)
    factors = {
        module: type(f)(*(None if x is None else rng.normal(x, 0.2).astype(np.float32) for x in f))
        for module, f in factors_of(attach(model, config, jax.random.key(0))).items()
    }
    return attach_factors(model, config, factors)


@each_variant
def test_jaxft_to_peft(base, settings, tmp_path):
    model = randomised(jaxft.load_model(base), lora_config(settings))
    jaxft.save_adapter(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(torch_base(base), tmp_path).eval()
    assert_logits_agree(model(TOKENS), torch_logits(reference))
    assert np.abs(torch_logits(reference) - torch_logits(torch_base(base))).max() > 0.05


@each_variant
def test_peft_to_jaxft_and_out_again(base, settings, tmp_path):
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(
        torch_base(base),
        peft.LoraConfig(**dict(target_modules="all-linear", task_type="CAUSAL_LM") | settings),
    ).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "theirs")
    model = jaxft.load_adapter(jaxft.load_model(base), tmp_path / "theirs")
    assert_logits_agree(model(TOKENS), torch_logits(wrapped))

    jaxft.save_adapter(model, tmp_path / "ours")
    theirs, ours = (SafetensorsFile(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert set(ours.tensors) == set(theirs.tensors) - {HEAD_COPY}
    for key in ours.tensors:
        np.testing.assert_array_equal(ours.read(key), theirs.read(key), err_msg=key)
    again = peft.PeftModel.from_pretrained(torch_base(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), torch_logits(wrapped), atol=1e-6, rtol=0)


@each_variant
def test_merged_model_in_transformers(base, settings, tmp_path):
    model = randomised(jaxft.load_model(base), lora_config(settings))
    jaxft.save_model(jaxft.merge_adapter(model), tmp_path)
    assert_logits_agree(torch_logits(torch_base(tmp_path)), np.asarray(model(TOKENS)))


TRANSPOSED = {
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True),
    "patterns": dict(r=4, lora_alpha=8, rank_pattern={"c_attn": 7}, alpha_pattern={r"mlp\.c_proj": 2, "c_fc": 20}),
    "dora": dict(r=4, lora_alpha=6, use_dora=True, use_rslora=True, rank_pattern={r"attn\.c_proj": 2}),
}


@pytest.mark.parametrize("settings", TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_base_that_stores_its_weights_transposed(settings, tmp_path):
    """GPT-2's, in PEFT and merged: the projections are [in, out], the magnitudes of DoRA belong to their columns."""
    torch.manual_seed(4)
    config = transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=2, n_head=3, n_positions=32)
    reference = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    for name in ("base", "adapter", "merged"):
        (tmp_path / name).mkdir()
    reference.save_pretrained(tmp_path / "base")

    def loaded(name):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()

    model = randomised(jaxft.load_model(tmp_path / "base"), lora_config(settings))
    jaxft.save_adapter(model, tmp_path / "adapter")
    ours = np.asarray(model(TOKENS))
    assert np.abs(ours - torch_logits(loaded("base"))).max() > 0.05
    assert_logits_agree(torch_logits(peft.PeftModel.from_pretrained(loaded("base"), tmp_path / "adapter").eval()), ours)
    jaxft.save_model(jaxft.merge_adapter(model), tmp_path / "merged")
    assert_logits_agree(torch_logits(loaded("merged")), ours)


def test_saved_config_is_what_consumers_expect(base, tmp_path):
    model = randomised(jaxft.load_model(base), lora_config(VARIANTS["patterns"]))
    jaxft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert set(config["target_modules"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert config["rank_pattern"][r"model\.layers\.1\.self_attn\.q_proj"] == 7
    assert config["base_model_name_or_path"] == str(base)
    tensors = SafetensorsFile(tmp_path / "adapter_model.safetensors")
    assert tensors.metadata["format"] == "pt"
    assert all(info.dtype == np.float32 for info in tensors.tensors.values())
    assert tensors.tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (7, 32)


def test_the_commit_of_a_hub_model_is_recorded(base, tmp_path, monkeypatch):
    """So that the base is found again when the branch has moved on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, repository = "0123456789abcdef" * 2 + "01234567", tmp_path / "models--org--model"
    for name in ("refs", "snapshots"):
        (repository / name).mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(base)
    model = randomised(jaxft.load_model("org/model"), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    jaxft.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/model", commit)


@pytest.fixture
def adapter(base, tmp_path):
    """A valid adapter directory to spoil."""
    model = randomised(jaxft.load_model(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    return jaxft.save_adapter(model, tmp_path / "adapter")


def edit_config(adapter, **changes):
    (adapter / DIGEST_FILE).unlink(missing_ok=True)  # as a user is told who edits on purpose
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(adapter, change):
    (adapter / DIGEST_FILE).unlink(missing_ok=True)
    path = adapter / "adapter_model.safetensors"
    with SafetensorsFile(path) as file:
        tensors = {name: np.array(file.read(name)) for name in file.tensors}
        metadata = dict(file.metadata)
    change(tensors, metadata)
    write_safetensors(path, tensors, tensors.__getitem__, metadata)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(bias="all"), "bias='all'"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(init_lora_weights="pissa"), "changes the base's weights"),
        (dict(target_modules=["query"]), "matches no linear layer; there are: "),
        (dict(target_modules=["q_proj", "up_proj", "down_proj"]), "selects modules that have no tensors"),
        (dict(target_modules=["q_proj"]), "does not select"),
        (dict(r=8), "gives another rank"),
        (dict(use_dora=True), "expected A, B, magnitude"),
        (dict(target_modules=None), "target_modules is missing"),
        (dict(lora_alpha=None), "lora_alpha is None; it must be a number"),
        (dict(lora_alpha="8"), "lora_alpha is '8'; it must be a number"),
        (dict(lora_alpha=float("inf")), "lora_alpha is inf; it must be a number"),
        (dict(lora_alpha=True), "lora_alpha is True; it must be a number"),
        (dict(r=0), "r is 0; it must be a whole number, 1 or more"),
        (dict(r=4.0), "r is 4.0; it must be a whole number, 1 or more"),
        (dict(use_rslora="false"), "use_rslora is 'false'; it must be true or false"),
        (dict(use_dora=1), "use_dora is 1; it must be true or false"),
        (dict(fan_in_fan_out="no"), "fan_in_fan_out is 'no'; it must be true or false"),
        (dict(lora_dropout=1), "lora_dropout is 1; it must be a number from 0 to below 1"),
        (dict(lora_dropout=[]), "lora_dropout is []; it must be"),
        (dict(target_modules=5), "target_modules is 5; it must be a list of names, or one regular expression"),
        (dict(target_modules=["q_proj", 3]), "it must be a list of names"),
        (dict(exclude_modules={"k_proj": 1}), "exclude_modules is {'k_proj': 1}; it must be"),
        (dict(target_parameters="experts"), "target_parameters is 'experts'; it must be a list of names"),
        (dict(layers_to_transform=["1"]), "layers_to_transform is ['1']; it must be"),
        (dict(layers_pattern=0), "layers_pattern is 0; it must be"),
        (dict(rank_pattern=[]), "rank_pattern is []; it must be an object of patterns"),
        (dict(rank_pattern={"q_proj": 2.5}), "rank_pattern is {'q_proj': 2.5}; it must be"),
        (dict(alpha_pattern={"q_proj": "4"}), "alpha_pattern is {'q_proj': '4'}; it must be"),
        (dict(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern is {'q_proj': nan}; it must be"),
    ],
)
def test_refuses_config(base, adapter, change, message):
    edit_config(adapter, **change)
    with pytest.raises(ValueError, match="adapter") as error:
        jaxft.load_adapter(jaxft.load_model(base), adapter)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, m: t.pop(KEY), "expected A, B"),
        (lambda t, m: t.update({KEY.replace("q_proj", "qq_proj"): t[KEY]}), "expected A, B"),
        (lambda t, m: t.update({"stray.weight": t[KEY]}), "no part of a LoRA"),
        (lambda t, m: t.update({KEY: t[KEY][:, :-1]}), "made for another base"),
        (lambda t, m: m.update(jaxft_base_fingerprint="0" * 64), "trained on other weights"),
    ],
)
def test_refuses_tensors(base, adapter, change, message):
    edit_tensors(adapter, change)
    with pytest.raises(ValueError) as error:
        jaxft.load_adapter(jaxft.load_model(base), adapter)
    assert message in str(error.value)


def test_refuses_missing_files(base, adapter):
    (adapter / DIGEST_FILE).unlink()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        jaxft.load_adapter(jaxft.load_model(base), adapter)
    shutil.rmtree(adapter)
    with pytest.raises(ValueError, match=r"adapter_config\.json: no such file"):
        jaxft.load_adapter(jaxft.load_model(base), adapter)


def test_refuses_a_pickle(base, adapter):
    (adapter / DIGEST_FILE).unlink()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter: holds its weights only as pickles") as error:
        jaxft.load_adapter(jaxft.load_model(base), adapter)
    assert "for name in ['adapter_model.bin']:" in str(error.value)
    assert "save_file(state, 'adapter_model.safetensors', " in str(error.value)


def change_alpha(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))


def flip_bit(adapter):
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 64  # an exponent
    path.write_bytes(content)


CHANGES = {
    "alpha": (change_alpha, "adapter_config.json is not as it was written"),
    "a bit of a tensor": (flip_bit, "adapter_model.safetensors is not as it was written"),
    "the template": (lambda d: (d / "chat_template.jinja").write_text("{{ x }}"), "chat_template.jinja is not as it"),
    "lost": (lambda d: (d / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "the record": (lambda d: (d / DIGEST_FILE).write_text('{"sha256": null}'), f"{DIGEST_FILE} is damaged"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_files_that_changed_are_not_used(base, adapter, change, message):
    """Unless the user who changed them says so, and in an adapter that has no record of its files."""
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    write_digests(adapter)
    (adapter / "README.md").write_text("my notes")
    model = jaxft.load_model(base)
    jaxft.load_adapter(model, adapter)
    change(adapter)
    with pytest.raises(ValueError) as error:
        jaxft.load_adapter(model, adapter)
    assert message in str(error.value)
    assert f"if it was changed on purpose, delete {DIGEST_FILE}" in str(error.value)
    (adapter / DIGEST_FILE).unlink()
    jaxft.load_adapter(model, adapter)


def test_keys_that_have_no_effect_are_told(base, adapter, caplog):
    """Those that say where an adapter comes from are no such keys, nor are those at a value that means nothing."""
    model = jaxft.load_model(base)
    quiet = dict(kasa_config=None, peft_version="9", megatron_core="megatron.core", eva_config={"rho": 2}, novel=[])
    edit_config(adapter, **quiet)
    jaxft.load_adapter(model, adapter)
    assert caplog.messages == []
    edit_config(adapter, lora_beta=3, gates={"q_proj": 1})
    jaxft.load_adapter(model, adapter)
    assert caplog.messages == [
        f"{adapter / 'adapter_config.json'}: keys unknown to jaxft have no effect: gates, lora_beta"
    ]


@pytest.mark.parametrize("given", ["base", "./base", "../here/base/", "~/base"])
def test_a_base_in_a_directory_is_named_by_its_absolute_path(base, tmp_path, monkeypatch, given):
    """So that it is found from another directory, and that no hub is asked for a repository of that name."""
    home = tmp_path / "here"
    shutil.copytree(base, home / "base")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    model = randomised(jaxft.load_model(given), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    monkeypatch.chdir(tmp_path)
    jaxft.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(home / "base"), None)


@pytest.mark.parametrize("write", ["adapter", "model"])
def test_a_write_that_fails_leaves_nothing_and_may_be_tried_again(base, adapter, tmp_path, monkeypatch, write):
    """The disk is full when the config, written after the tensors, is due; what stood there before stays."""
    target = tmp_path / "out"
    tuned = jaxft.load_adapter(jaxft.load_model(base), adapter)
    save = {
        "adapter": lambda: jaxft.save_adapter(tuned, target),
        "model": lambda: jaxft.save_model(jaxft.merge_adapter(tuned), target),
    }[write]
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match="No space"):
            save()
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    save()
    assert (target / "notes.txt").read_text() == "mine"
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


def test_the_same_weights_in_a_wider_dtype_are_the_same_base(base, adapter, tmp_path):
    """Those rounded to a narrower one are not."""
    for dtype in ("bfloat16", "float32"):
        jaxft.save_model(jaxft.load_model(base, "bfloat16"), tmp_path / dtype, dtype)
    narrow, wide = (jaxft.load_model(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    assert narrow.source.fingerprint == wide.source.fingerprint != jaxft.load_model(base).source.fingerprint


def test_second_adapter_and_nothing_to_save(base, adapter):
    model = jaxft.load_model(base)
    with pytest.raises(ValueError, match="no adapter to save"):
        jaxft.save_adapter(model, adapter)
    with pytest.raises(ValueError, match="carries an adapter already"):
        jaxft.load_adapter(jaxft.load_adapter(model, adapter), adapter)
    with pytest.raises(ValueError, match="no adapter to merge"):
        jaxft.merge_adapter(model)
    with pytest.raises(ValueError, match="merge it first"):
        jaxft.save_model(jaxft.load_adapter(model, adapter), adapter.parent / "out")


def test_merging_into_a_quantized_base_is_refused(base, adapter):
    model = jaxft.load_adapter(jaxft.load_model(base, quantization="int8"), adapter)
    with pytest.raises(ValueError, match="without quantization"):
        jaxft.merge_adapter(model)


def test_home_is_where_an_adapter_is_saved_and_loaded(chat_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    base = chat_model()
    tuned = attach(jaxft.load_model(base), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), jax.random.key(0))
    assert jaxft.save_adapter(tuned, "~/lora") == tmp_path / "home" / "lora"
    again = jaxft.load_adapter(jaxft.load_model(base), "~/lora")
    assert factors_of(again).keys() == factors_of(tuned).keys()
    assert jaxft.save_model(jaxft.merge_adapter(again), "~/merged") == tmp_path / "home" / "merged"
    assert jaxft.load_model("~/merged").source.path == str(tmp_path / "home" / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["home"], "nothing in a directory called ~"
