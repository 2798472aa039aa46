"""What is known before a weight is read: the model on paper, the number of steps, and every reason not to begin."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.adapters.attach import attach
from jaxft.adapters.targets import LoraConfig
from jaxft.config_file import load_config
from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.digests import DIGEST_FILE
from jaxft.hub.peft import HEAD_COPY
from jaxft.models.count import count_parameters
from jaxft.models.linear import Adapter
from jaxft.training.inputs import gather
from jaxft.training.same_run import compare, environment
from jaxft.training.state import Partition

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model(chat_model) -> Path:
    return chat_model()


@pytest.fixture(scope="module")
def data(write_chats, tmp_path_factory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 50)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """An adapter to go on from, unlike the one that the configs below would draw."""
    lora = LoraConfig(r=5, lora_alpha=3, target_modules=["v_proj"], use_dora=True)
    tuned = attach(jaxft.load_model(model), lora, jax.random.key(3))
    return jaxft.save_adapter(tuned, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def gathered(model, data, tmp_path):
    def make(**changes):
        basics = {
            "model_name_or_path": str(model),
            "output_dir": str(tmp_path / "run"),
            "datasets": [str(data)],
            "max_length": 64,
        }
        return gather(load_config(basics | changes))

    return make


@pytest.fixture
def no_weights(monkeypatch):
    """Reading a tensor is an error."""

    def refuse(checkpoint, name, *_):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)


# The model on paper

KINDS = {
    "lora": {},
    "dora on nf4": {"adapter": "dora", "quant_type": "nf4"},
    "int8, uneven ranks": {
        "quant_type": "int8",
        "lora_target_modules": r".*\.0\.self_attn\.[qv]_proj|.*up_proj",
        "rank_pattern": {"up_proj": 3},
    },
    "int4": {"quant_type": "int4", "quant_group_size": 16, "dtype": "float32"},
    "everything": {"adapter": "none"},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_what_is_described_is_what_is_loaded(gathered, changes):
    inputs = gathered(mesh={"data": 2, "fsdp": 2, "tensor": 2}, **changes)
    described, loaded = inputs.describe(), inputs.load()
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), nnx.state(each)) for each in (described, loaded)]
    chex.assert_trees_all_equal(*map(nnx.to_pure_dict, shapes))
    assert count_parameters(described, inputs.recipe.trained_type) == count_parameters(
        loaded, inputs.recipe.trained_type
    )


@pytest.mark.parametrize("kind", ["int8", "nf4", None])
def test_a_base_that_was_quantized_before_is_described_and_loaded(gathered, model, tmp_path, kind):
    base = tmp_path / "int8"
    shutil.copytree(model, base)
    tensors, expected = load_file(model / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scales = np.abs(tensors[name]).max(axis=1)
        tensors[name] = np.round(tensors[name] / scales[:, None] * 127).astype(np.int8)
        expected[name] = tensors[f"{name.removesuffix('.weight')}.SCB"] = scales
    save_file(tensors, base / "model.safetensors")
    raw = json.loads((base / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps(raw))
    inputs = gathered(model_name_or_path=str(base), quant_type=kind)
    described, loaded = inputs.describe(), inputs.load()
    assert count_parameters(described, inputs.recipe.trained_type) == count_parameters(
        loaded, inputs.recipe.trained_type
    )
    assert inputs.base_fingerprint == loaded.source.fingerprint
    if kind == "int8":
        weight = loaded.model.layers[0][0].mlp.up_proj.weight.get_value()
        names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
        np.testing.assert_array_equal(weight.codes, np.stack([tensors[name] for name in names]))
        np.testing.assert_array_equal(weight.scales[..., 0], np.stack([expected[name] for name in names]))


def test_an_adapter_to_go_on_from_is_described_and_loaded(gathered, adapter):
    inputs = gathered(adapter_name_or_path=str(adapter), lora_r=16, mesh={"data": 8})
    described, loaded = (Partition(each, Adapter).split(each)[0] for each in (inputs.describe(), inputs.load()))
    assert {name: a.shape for name, a in described.items()} == {name: a.shape for name, a in loaded.items()}
    assert {name.rsplit(".", 1)[1]: a.shape for name, a in loaded.items()} == {
        "A": (2, 5, 32),
        "B": (2, 16, 5),
        "magnitude": (2, 16),
    }
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    (A,) = (array for name, array in loaded.items() if name.endswith(".A"))
    np.testing.assert_array_equal(A[1], factors[name])


@pytest.mark.core
def test_nothing_is_read_to_describe(gathered, no_weights):
    inputs = gathered(quant_type="nf4", val_set_size=5)
    counts = count_parameters(inputs.describe(), inputs.recipe.trained_type)
    # Per layer: q 32x32, k and v 16x32, o 32x32, three of 48x32; two norms. Embedding, head and last norm.
    linears = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32)
    rest = 2 * 2 * 32 + 2 * 32 * 32 + 32
    adapters = 2 * 16 * (2 * 64 + 2 * 48 + 3 * 80)
    assert {(count.format, count.trained): count.count for count in counts} == {
        ("nf4", False): linears,
        ("bfloat16", False): rest,
        ("float32", True): adapters,
    }


def test_full_training_stores_float32_and_computes_as_told(gathered):
    inputs = gathered(adapter="none", dtype="bfloat16")
    model = inputs.load()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
    assert model.dtype == "bfloat16"
    assert inputs.recipe.trained_type is nnx.Param


def test_the_seed_decides_the_adapter(gathered):
    def first(seed: int) -> np.ndarray:
        model = gathered(seed=seed, lora_target_modules=["q_proj"]).load()
        return np.asarray(model.model.layers[0][0].self_attn.q_proj.adapter.A[...])

    assert np.array_equal(first(1), first(1))
    assert not np.array_equal(first(1), first(2))


# Steps


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({"num_train_epochs": 1.0}, 7),  # 50 examples, 8 devices
        ({"num_train_epochs": 3.0}, 21),
        ({"num_train_epochs": 0.5}, 4),
        ({"num_train_epochs": 0.001}, 1),
        ({"num_train_epochs": 2.0, "micro_batch_size": 2}, 8),
        ({"num_train_epochs": 2.0, "gradient_accumulation_steps": 3}, 6),
        ({"num_train_epochs": 2.0, "mesh": {"data": 2, "tensor": 4}}, 50),
        ({"num_train_epochs": 2.0, "max_steps": 5}, 5),
        ({"val_set_size": 10, "mesh": {"fsdp": 2, "tensor": 4}, "micro_batch_size": 4}, 5),
    ],
)
def test_number_of_updates(gathered, changes, steps):
    assert gathered(**changes).total_steps == steps


def test_batches_are_as_large_as_the_mesh_is_wide(gathered):
    inputs = gathered(mesh={"data": 2, "fsdp": 2, "tensor": 2}, micro_batch_size=3, gradient_accumulation_steps=5)
    assert inputs.rows == 12
    assert inputs.schedule[0].tokens.shape == (5, 12, 64)


# Fingerprints


FINGERPRINTS = (
    "data",
    "held-out data",
    "tokenizer",
    "chat template",
    "base",
    "base config",
    "adapter to go on from",
    "rows of an update",
)


@pytest.mark.parametrize("changed", FINGERPRINTS)
def test_a_fingerprint_changes_with_what_it_stands_for_alone(gathered, model, data, adapter, tmp_path, changed):
    begun = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    mesh = {"data": 8}
    copy, rows = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(model, copy)
    shutil.copyfile(data, rows)
    held_out = tmp_path / "held_out.jsonl"
    turns = [{"role": "user", "content": "the new dog"}, {"role": "assistant", "content": "likes the old cat"}]
    held_out.write_text(json.dumps({"messages": turns}))

    def fingerprints() -> dict[str, str]:
        settings = {"datasets": [str(rows)], "eval_datasets": [str(held_out)]}
        settings |= {"adapter_name_or_path": str(begun), "mesh": mesh}
        return gathered(model_name_or_path=str(copy), **settings).fingerprints

    before = fingerprints()
    edit(copy / "config.json", transformers_version="9.9")
    assert fingerprints() == before
    match changed:
        case "data":
            rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
        case "held-out data":
            held_out.write_text(held_out.read_text().replace("new", "old"))
        case "tokenizer":
            path = copy / "tokenizer.json"
            content = json.loads(path.read_text())
            words = content["model"]["vocab"]
            words["extra"] = max(words.values()) + 1
            path.write_text(json.dumps(content))
        case "chat template":
            path = copy / "chat_template.jinja"
            path.write_text(path.read_text() + "{# a remark #}")
        case "base":
            weights = load_file(copy / "model.safetensors")
            weights["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1
            save_file(weights, copy / "model.safetensors")
        case "base config":
            edit(copy / "config.json", rms_norm_eps=1e-3)
        case "adapter to go on from":
            edit(begun / "adapter_config.json", lora_alpha=300)
        case "rows of an update":
            mesh = {"data": 4, "tensor": 2}
    after = fingerprints()
    assert set(before) == set(FINGERPRINTS)
    assert {name for name in before if after[name] != before[name]} == {changed}


# The base that was looked at is the base that is trained


@pytest.fixture
def on_the_hub(model, chat_model, tmp_path, monkeypatch):
    """`org/model` in a cache of the Hub, with two commits; a function moves its branch to the other one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for commit, directory in {"a" * 40: model, "b" * 40: chat_model(seed=1)}.items():
        shutil.copytree(directory, repository / "snapshots" / commit)
    move = (repository / "refs" / "main").write_text
    move("a" * 40)
    return move


def test_a_branch_that_moves_after_the_data_was_read_moves_nothing(gathered, on_the_hub, model):
    inputs = gathered(model_name_or_path="org/model")
    described = inputs.fingerprints["base"]
    on_the_hub("b" * 40)
    source = inputs.load().source
    assert source.fingerprint == described == jaxft.load_model(model).source.fingerprint
    assert (source.name, source.revision) == ("org/model", "a" * 40)
    assert source.path.endswith("a" * 40)
    other = gathered(model_name_or_path="org/model")
    assert other.fingerprints["base"] != described
    assert other.load().source.revision == "b" * 40


def test_weights_that_change_in_their_directory_are_noticed(gathered, model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    inputs = gathered(model_name_or_path=str(tmp_path / "base"))
    inputs.describe()
    assert inputs.base_fingerprint
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="base: the weights were changed since the run looked at them"):
        inputs.load()


# What is refused before a weight is read


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FAULTS = {
    "no model": (lambda d: shutil.rmtree(d / "model"), "no such directory"),
    "no config": (lambda d: (d / "model/config.json").unlink(), "config.json: no such file"),
    "no weights": (lambda d: (d / "model/model.safetensors").unlink(), "safetensors"),
    "cut weights": (
        lambda d: (d / "model/model.safetensors").write_bytes((d / "model/model.safetensors").read_bytes()[:-400]),
        "model.safetensors",
    ),
    "other sizes": (
        lambda d: edit(d / "model/config.json", intermediate_size=50),
        "tensors do not fit config.json; 6 of another shape: model.layers.0.mlp.down_proj.weight is (32, 48)",
    ),
    "more layers": (
        lambda d: edit(d / "model/config.json", num_hidden_layers=3),
        "9 missing from the files: model.layers.2.input_layernorm.weight",
    ),
    "code of its own": (
        lambda d: edit(d / "model/config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}),
        "model_type 'own' is not supported; supported: cohere2, gemma, ",
    ),
    "no tokenizer": (
        lambda d: [(d / "model" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "model: no tokenizer can be loaded from it",
    ),
    "cut tokenizer": (
        lambda d: (d / "model/tokenizer.json").write_text('{"version": "1.0", "tru'),
        "model: no tokenizer can be loaded from it",
    ),
    "bad template": (
        lambda d: (d / "model/chat_template.jinja").write_text("{% for message in %}"),
        "TemplateSyntaxError",
    ),
    "no data": (lambda d: (d / "chats.jsonl").unlink(), "chats.jsonl"),
    "bad line": (
        lambda d: (d / "chats.jsonl").write_text((d / "chats.jsonl").read_text() + '{"messages": [{]}\n'),
        "chats.jsonl:51: ",
    ),
}


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_faults_are_found_before_a_weight_is_read(gathered, model, data, tmp_path, no_weights, fault, message):
    shutil.copytree(model, tmp_path / "model")
    shutil.copyfile(data, tmp_path / "chats.jsonl")
    fault(tmp_path)
    with pytest.raises(ValueError) as error:
        gathered(model_name_or_path=str(tmp_path / "model"), datasets=[str(tmp_path / "chats.jsonl")])
    assert message in str(error.value)


def test_a_vocabulary_larger_than_the_embedding_is_refused(gathered, chat_model, no_weights):
    small = chat_model(vocab_size=20)
    with pytest.raises(ValueError, match="20"):
        gathered(model_name_or_path=str(small))


def chats(path: Path, *lengths: int) -> str:
    """Conversations of so many words; the chat template and its markers make 8 tokens more of each."""
    turns = [[("user", "the"), ("assistant", " ".join(["dog"] * (length - 1)))] for length in lengths]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("long", ["datasets", "eval_datasets"])
def test_examples_longer_than_the_model_has_positions(gathered, chat_model, no_weights, tmp_path, packing, long):
    model = chat_model(max_position_embeddings=30)
    files = {key: [chats(tmp_path / f"{key}.jsonl", 4, 22)] for key in ("datasets", "eval_datasets")}
    chats(tmp_path / "eval_datasets.jsonl", 5, 21)
    options = {"model_name_or_path": str(model), "packing": packing, "max_length": 64}
    assert gathered(**options, **files).data.report.sources[0].longest == 30
    chats(tmp_path / f"{long}.jsonl", 6, 23)
    with pytest.raises(ValueError, match=r"longest example has 31 tokens.*30 positions.*set `max_length` to 30"):
        gathered(**options, **files)
    gathered(**options | {"max_length": 30}, **files)


def test_dynamic_positions_have_no_end(gathered, chat_model, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = chat_model(max_position_embeddings=30, rope_parameters=rope)
    inputs = gathered(model_name_or_path=str(model), datasets=[chats(tmp_path / "chats.jsonl", 40)])
    assert inputs.data.report.sources[0].longest > inputs.decoder.rope.max_positions == 30
    assert inputs.data.report.sources[0].kept == 1


@pytest.mark.parametrize("warmup_steps, warns", [(6, False), (7, True), (100, True)])
def test_a_peak_that_is_never_reached(gathered, caplog, warmup_steps, warns):
    assert gathered(warmup_steps=warmup_steps, num_train_epochs=1.0).total_steps == 7
    told = f"the peak learning rate is never reached: warmup_steps is {warmup_steps}, and the run has 7 steps"
    assert (told in caplog.text) == warns


def test_plain_text_that_is_to_be_answered_is_told(gathered, write_chats, tmp_path, caplog):
    text, chat = tmp_path / "text.jsonl", write_chats(tmp_path / "held_out.jsonl", 3, seed=9)
    text.write_text('{"text": "the old dog"}\n')
    told = "exact_match_samples has no effect: held-out plain text asks nothing"
    for held_out, asked, expected in (([text], 0, False), ([text], 2, True), ([text, chat], 2, False)):
        caplog.clear()
        gathered(eval_datasets=[str(path) for path in held_out], exact_match_samples=asked)
        assert (told in caplog.text) == expected


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"save_steps": 8}, ["save_steps is 8, and the run has 7 steps: it is saved after the last only"]),
        ({"save_steps": 7, "eval_steps": 7}, []),
        ({"eval_steps": 9}, ["eval_steps is 9, and the run has 7 steps: it is evaluated after the last only"]),
        ({"eval_steps": 3, "early_stopping_patience": 2}, []),  # evaluated after 3, 6 and 7
        (
            {"eval_steps": 3, "early_stopping_patience": 3},
            ["early_stopping_patience is 3, and the run has 3 evaluations: it never stops early"],
        ),
    ],
)
def test_updates_that_are_never_reached_are_told(gathered, write_chats, tmp_path, caplog, changes, told):
    held_out = write_chats(tmp_path / "held_out.jsonl", 3, seed=9)
    assert gathered(max_steps=7, eval_datasets=[str(held_out)], **changes).total_steps == 7
    assert [record.getMessage() for record in caplog.records if "and the run has" in record.getMessage()] == told


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mesh": {"data": 3}},
            "mesh: data=3 x fsdp=1 x expert=1 x context=1 x tensor=1 is 3 devices, but there are 8",
        ),
        (
            {"max_length": 61, "mesh": {"context": 4}},
            "`max_length` is 61, which mesh.context=4 does not divide; set it to 60 or 64",
        ),
        (
            {"mesh": {"context": 8}},
            "mesh: context=8 x tensor=1 shares out the heads .* this model has 4; .* may be 1 or 2 or 4",
        ),
        (
            {"attn_implementation": "splash"},
            "attn_implementation is splash: it is for TPUs, and this is a cpu; or choose",
        ),
        ({"max_length": 4}, "none of 50 examples is left: 50 are longer than `max_length` 4"),
        ({"chat_template": "chatmul"}, "chat template 'chatmul': no such file"),
        ({"model_revision": "main"}, r"a revision \(main\) applies to the Hub only"),
    ],
)
def test_configs_that_do_not_fit_are_refused(gathered, no_weights, changes, message):
    with pytest.raises(ValueError, match=message):
        gathered(**changes)


@pytest.mark.core
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_target_modules": ["q_porj"]}, r"matches no linear layer; there are: .*layers\.\*\.mlp\.up_proj"),
        ({"rank_pattern": {"q_porj": 4}}, "rank_pattern: 'q_porj' matches none of the targets"),
        ({"rank_pattern": {"*q_proj": 4}}, "rank_pattern: '\\*q_proj' is not a regular expression"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_on_paper(gathered, no_weights, changes, message):
    inputs = gathered(**changes)
    with pytest.raises(ValueError, match=message):
        inputs.describe()


def test_an_adapter_that_is_not_there_is_refused_on_paper(gathered):
    with pytest.raises(ValueError, match=r"gone/adapter_config\.json: no such file"):
        gathered(adapter_name_or_path="./gone").describe()


def test_an_adapter_on_the_output_head_may_be_gone_on_from(gathered, model, tmp_path):
    """PEFT adds a copy of the head to such an adapter; it is compared when there are weights to compare it with."""
    base = jaxft.load_model(model)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"])
    jaxft.save_adapter(attach(base, config, jax.random.key(0)), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    head = np.array(base.lm_head.weight.get_value())
    for copy, same in ((head, True), (head + 1, False)):
        (tmp_path / "adapter" / DIGEST_FILE).unlink(missing_ok=True)  # PEFT writes no such file
        save_file({**load_file(path), HEAD_COPY: copy}, path)
        inputs = gathered(adapter_name_or_path=str(tmp_path / "adapter"), dtype="float32", mesh={"data": 8})
        assert inputs.describe().lm_head.adapter is not None
        if same:
            assert inputs.load().lm_head.adapter is not None
        else:
            with pytest.raises(ValueError, match="is not the base's output head"):
                inputs.load()


def test_an_adapter_of_another_base_is_refused_on_paper(gathered, adapter, chat_model):
    other = chat_model(seed=1)
    with pytest.raises(ValueError, match="the adapter was trained on other weights than"):
        gathered(model_name_or_path=str(other), adapter_name_or_path=str(adapter)).describe()


def test_inputs_cannot_be_changed(gathered):
    with pytest.raises(dataclasses.FrozenInstanceError):
        gathered().total_steps = 3


# What must not change between a run and its resumption


@pytest.mark.parametrize("coefficient", [0.01, 0.0])
def test_rows_of_a_micro_batch_count_where_the_load_of_experts_is_balanced(gathered, chat_model, coefficient):
    mixture = chat_model(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_attention_heads=8)

    def configured(rows, accumulated, **mesh):
        changes = {"router_aux_loss_coef": coefficient} if coefficient else {}
        changes |= {"micro_batch_size": rows, "gradient_accumulation_steps": accumulated, "mesh": mesh}
        inputs = gathered(model_name_or_path=str(mixture), adapter="none", **changes)
        return inputs.config.to_yaml(), inputs.fingerprints

    before, recorded = configured(1, 4, data=2, fsdp=1, tensor=4)
    others = {
        "4": configured(2, 2, data=2, fsdp=1, tensor=4),  # other rows on as many devices
        "8": configured(1, 1, data=8, fsdp=1),  # the same rows on more devices
        "1": configured(1, 8, data=1, fsdp=1, tensor=4, context=2),
    }
    for rows, (after, found) in others.items():
        refused, _ = compare({"fingerprints": recorded, **environment()}, before, after, found)
        assert refused == ([f"the rows of a micro-batch changed: 2 -> {rows}"] if coefficient else [])
    same = configured(2, 4, data=1, fsdp=1, tensor=4, context=2)
    assert compare({"fingerprints": recorded, **environment()}, before, *same)[0] == []
