"""Adapters on experts to and from real PEFT, in both of its layouts; and those that it would drop or scale wrongly."""

import copy
import json

import jax
import numpy as np
import pytest

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.hub.checkpoint import Checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 19), dtype=np.int32)
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2, pad_token_id=0,
)  # fmt: skip
BASES = {
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, num_local_experts=5, rope_parameters=dict(rope_type="default", rope_theta=100.0)
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=24, decoder_sparse_step=1),
    "qwen3_moe_mixed": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **{k: v for k, v in SIZES.items() if k != "head_dim"},
        num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=20,
    ),
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """model type -> (transformers model, directory)."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(3)
            config = copy.deepcopy(BASES[name])
            config._attn_implementation = "eager"
            model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name] = model, path
        return made[name]

    return make


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def randomised(model, config):
    rng = np.random.default_rng(1)
    factors = {
        module: Factors(*(rng.normal(0, 0.2, part.shape).astype(np.float32) for part in (f.A, f.B)))
        for module, f in factors_of(attach(model, config, jax.random.key(0))).items()
    }
    return attach_factors(model, config, factors)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OURS = {
    "both": ("gpt_oss", dict(target_parameters=EXPERTS)),
    "rslora-patterns": (
        "gpt_oss",
        dict(target_parameters=EXPERTS[::-1], use_rslora=True, rank_pattern={"q_proj": 5}, alpha_pattern={"v_proj": 2}),
    ),
    "gate-and-up-alone": ("gpt_oss", dict(target_parameters=EXPERTS[:1], target_modules=["q_proj"])),
    "down-alone": ("gpt_oss", dict(target_parameters=["experts.down_proj"], target_modules=[])),
    "by-expert": ("qwen3_moe", dict(target_modules="all-linear")),
    "only-experts": ("qwen3_moe", dict(target_modules=["gate_proj", "up_proj", "down_proj"])),
    "patterns": ("mixtral", dict(target_modules="all-linear", rank_pattern={"q_proj": 5}, alpha_pattern={"o_proj": 1})),
    "some-layers-dense": ("qwen3_moe_mixed", dict(target_modules="all-linear")),
    "shared-expert": ("qwen2_moe", dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
}


@pytest.mark.parametrize("case", OURS)
def test_jaxft_to_peft_and_back(bases, case, tmp_path):
    name, settings = OURS[case]
    reference, path = bases(name)
    base = jaxft.load_model(path)
    model = randomised(base, LoraConfig(r=3, lora_alpha=7, **settings))
    jaxft.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    np.testing.assert_allclose(model(TOKENS), logits(theirs), atol=1e-4, rtol=0)
    assert np.abs(logits(theirs) - logits(reference)).max() > 0.05
    again = factors_of(jaxft.load_adapter(base, tmp_path))
    assert again.keys() == factors_of(model).keys()
    for module, f in factors_of(model).items():
        np.testing.assert_array_equal(again[module].A, f.A)
        np.testing.assert_array_equal(again[module].B, f.B)


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]], ids=["both", "gate-and-up", "down"])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_peft_to_jaxft(bases, name, targets, tmp_path):
    reference, path = bases(name)
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(copy.deepcopy(reference), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    model = jaxft.load_adapter(jaxft.load_model(path), tmp_path)
    assert np.abs(logits(wrapped) - logits(reference)).max() > 0.05
    np.testing.assert_allclose(model(TOKENS), logits(wrapped), atol=1e-4, rtol=0)
    if name == "gpt_oss" or targets == EXPERTS:
        jaxft.save_adapter(model, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "again").eval()
        np.testing.assert_allclose(logits(again), logits(wrapped), atol=1e-4, rtol=0)
    else:
        with pytest.raises(ValueError, match="gate, up and down of all experts"):
            jaxft.save_adapter(model, tmp_path / "again")


def test_dora_on_experts_is_refused_on_the_way_in(bases, tmp_path):
    """Adapters of older versions have it; here it would be ignored."""
    base = jaxft.load_model(bases("qwen3_moe")[1])
    jaxft.save_adapter(randomised(base, LoraConfig(r=3, lora_alpha=7)), tmp_path / "lora")
    with Checkpoint.open(tmp_path / "lora", stem="adapter_model") as files:
        tensors = {name: np.array(files.read(name)) for name in files.names()}
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(tensors[name]), np.float32)
    write_checkpoint(tmp_path, tensors, tensors.__getitem__, stem="adapter_model")
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is True, which adapters on experts"):
        jaxft.load_adapter(base, tmp_path)


@pytest.mark.parametrize("case", ["both", "by-expert"])
def test_merged_experts_in_transformers(bases, case, tmp_path):
    name, settings = OURS[case]
    model = randomised(jaxft.load_model(bases(name)[1]), LoraConfig(r=3, lora_alpha=7, **settings))
    jaxft.save_model(jaxft.merge_adapter(model), tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(model(TOKENS), logits(merged), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("qwen3_moe", dict(use_dora=True), "use_dora is True, which adapters on experts"),
        (
            "gpt_oss",
            dict(lora_dropout=0.1, target_parameters=EXPERTS),
            "lora_dropout is 0.1, which adapters on experts",
        ),
        ("mixtral", dict(use_rslora=True), r"lora_alpha to alpha \* sqrt\(r\)"),
        ("mixtral", dict(target_modules=["w1", "w3"]), r"gate, up and down of all experts.*experts\.0\.w2 has none"),
        (
            "qwen3_moe",
            dict(layers_to_transform=[0], target_modules=["gate_proj", "up_proj", "down_proj"]),
            "all layers",
        ),
        ("mixtral", dict(target_modules=["experts.1.w1"]), "of all experts"),
        ("qwen3_moe", dict(rank_pattern={r"experts\.1\.up_proj": 2}), "different ranks or alphas"),
        ("qwen2_moe", dict(target_modules=["experts.1.up_proj"]), "matches no linear layer"),
        ("qwen3_moe_mixed", dict(target_modules=["layers.1.mlp.up_proj"]), "matches no linear layer"),
        ("gpt_oss", dict(target_modules=["gate_up_proj"]), "matches no linear layer"),
        ("gpt_oss", dict(target_parameters=["gate_proj"]), "target_parameters: 'gate_proj' matches no experts of one"),
        ("qwen3_moe", dict(target_parameters=EXPERTS), "matches no experts of one tensor; there are: none"),
    ],
)
def test_what_peft_would_drop_or_scale_wrongly(bases, name, settings, message):
    with pytest.raises(ValueError, match=message):
        attach(jaxft.load_model(bases(name)[1]), LoraConfig(r=3, lora_alpha=7, **settings), jax.random.key(0))
