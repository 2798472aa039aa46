"""Exports, read back by PEFT and transformers; and every reason not to export."""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

import jaxft
from jaxft.adapters.attach import Factors, attach, attach_factors, factors_of
from jaxft.adapters.targets import LoraConfig
from jaxft.cli import export
from jaxft.config_file import load_config
from jaxft.data.templates import CHATML
from jaxft.hub.digests import check_digests, digests, write_digests
from jaxft.hub.load import config_fingerprint
from jaxft.hub.save import copy_companions
from jaxft.models.decoder import Decoder
from jaxft.training.companions import carry_template, dress, stop_tokens
from jaxft.training.manifest import sealed

LORA = LoraConfig(r=3, lora_alpha=12)
TOKENS = np.random.default_rng(0).integers(0, 49152, (2, 9), dtype=np.int32)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def base(material, random_checkpoint) -> Path:
    """A random model whose tokenizer has a template of its own, and whose settings ignore its end of turn."""
    directory = random_checkpoint(LLAMA)
    source = material / "models" / "SmolLM2-135M-Instruct"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(source / name, directory / name)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    (directory / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.6}')
    return directory


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    """A finished run: QLoRA, in bfloat16, with another chat template than the model's own."""
    model = jaxft.load_model(base, "bfloat16", "nf4")
    random = np.random.default_rng(1)
    factors = {
        module: Factors(*(random.normal(0, 0.1, part.shape).astype(np.float32) for part in (one.A, one.B)))
        for module, one in factors_of(attach(model, LORA, jax.random.key(0))).items()
    }
    tuned = attach_factors(model, LORA, factors)
    directory = tmp_path_factory.mktemp("run")
    jaxft.save_adapter(tuned, directory / "adapter")
    copy_companions(base, directory / "adapter")
    settings = {
        "chat_template": "chatml",
        "quant_type": "nf4",
        "lora_r": LORA.r,
        "lora_alpha": LORA.lora_alpha,
    }
    finish(directory, model, settings, CHATML)
    return directory


@pytest.fixture(scope="module")
def dora_run(base, tmp_path_factory) -> Path:
    """A finished run of DoRA on some modules, with ranks of their own."""
    model = jaxft.load_model(base)
    lora = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], use_dora=True, rank_pattern={"down_proj": 2}
    )
    random = np.random.default_rng(2)
    factors = {
        module: Factors(*(part + random.normal(0, 0.1, part.shape).astype(np.float32) for part in parts))
        for module, parts in factors_of(attach(model, lora, jax.random.key(0))).items()
    }
    directory = tmp_path_factory.mktemp("dora")
    jaxft.save_adapter(attach_factors(model, lora, factors), directory / "adapter")
    copy_companions(base, directory / "adapter")
    finish(directory, model, {"adapter": "dora", "lora_r": 4, "lora_alpha": 8}, CHATML)
    return directory


@pytest.fixture(scope="module")
def full_run(base, tmp_path_factory) -> Path:
    """A finished run that trained every weight."""
    directory = tmp_path_factory.mktemp("run")
    model = jaxft.load_model(base)
    jaxft.save_model(model, directory / "model", "bfloat16")
    finish(directory, model, {"adapter": "none"}, (base / "chat_template.jinja").read_text())
    return directory


def finish(run: Path, model: Decoder, settings: dict, template: str) -> None:
    """Write what a run leaves beside its result."""
    settings = {"model_name_or_path": model.source.name, "output_dir": str(run), "datasets": ["x"]} | settings
    (run / "config.yaml").write_text(load_config(settings).to_yaml())
    result = run / ("model" if settings.get("adapter") == "none" else "adapter")
    tokenizer = AutoTokenizer.from_pretrained(result)
    stops = stop_tokens(Path(model.source.path), tokenizer, [2], learned=True, rows=LLAMA["vocab_size"])
    dress(result, template, stops, LLAMA["vocab_size"])
    record = {
        "finished": "2025-01-01T00:00:00+00:00",
        "config_sha256": hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest(),
        "fingerprints": {
            "data": "0" * 64,
            "base": model.source.fingerprint,
            "base config": config_fingerprint(Path(model.source.path)),
            "chat template": hashlib.sha256(template.encode()).hexdigest(),
        },
        "versions": {"jaxft": "0"},
        "data": {"held_out": 0},
        "chat_template": template,
        "stop_tokens": stops,
        "base": {"name": model.source.name, "path": model.source.path, "revision": None},
        "result_sha256": digests(result),
    }
    (run / "run.json").write_text(json.dumps(sealed(record)))


@pytest.fixture(scope="module")
def peft_export(run, tmp_path_factory) -> Path:
    return exported(run, "peft", tmp_path_factory.mktemp("peft") / "out")


@pytest.fixture(scope="module")
def merged_export(run, tmp_path_factory) -> Path:
    return exported(run, "merged", tmp_path_factory.mktemp("merged") / "out", "--dtype", "float32")


def exported(run: Path, form: str, output: Path, *more: str) -> Path:
    assert main(run, form, output, *more) == 0
    assert {path.name for path in output.parent.iterdir()} == {output.name}
    return output


def main(run: Path, form: str, output: Path, *more: str) -> int:
    return export.main(["--run", str(run), "--format", form, "--output", str(output), *more])


def merged_weights(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    """W + alpha / r B A, from the files of the base and the adapter."""
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in factors:
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = factors[key.replace("lora_A", "lora_B")].astype(np.float64) @ factors[key]
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + LORA.lora_alpha / LORA.r * product
    return weights


def tuned_logits(base: Path, run: Path) -> np.ndarray:
    return np.asarray(jaxft.load_adapter(jaxft.load_model(base), run / "adapter")(TOKENS))


def torch_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.float().numpy()


def torch_model(directory: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# What is exported


@pytest.mark.parity
def test_peft_export_in_peft(base, run, peft_export):
    peft = pytest.importorskip("peft")
    plain = torch_model(base)
    before = torch_logits(plain)
    after = torch_logits(peft.PeftModel.from_pretrained(plain, peft_export))
    np.testing.assert_allclose(after, tuned_logits(base, run), atol=1e-4, rtol=0)
    assert np.abs(after - before).max() > 0.05


@pytest.mark.parity
def test_a_dora_run_leaves_as_it_was_trained(base, dora_run, tmp_path, capsys):
    output = exported(dora_run, "peft", tmp_path / "out")
    assert "do not take DoRA" in capsys.readouterr().out
    peft = pytest.importorskip("peft")
    after = torch_logits(peft.PeftModel.from_pretrained(torch_model(base), output))
    np.testing.assert_allclose(after, tuned_logits(base, dora_run), atol=1e-4, rtol=0)
    capsys.readouterr()
    assert main(dora_run, "peft", tmp_path / "portable", "--portable") == 2
    assert "DoRA" in capsys.readouterr().err


@pytest.mark.parity
def test_merged_export_in_transformers(base, run, merged_export):
    pytest.importorskip("torch")
    np.testing.assert_allclose(torch_logits(torch_model(merged_export)), tuned_logits(base, run), atol=1e-4, rtol=0)


def test_merges_into_the_original_weights(base, run, merged_export):
    expected, found = merged_weights(base, run / "adapter"), load_file(merged_export / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == np.float32
        np.testing.assert_allclose(weight, expected[name], atol=1e-6, rtol=0, err_msg=name)
    quantized = jaxft.load_model(base, quantization="nf4").model.layers[0][0].self_attn.q_proj.weight
    rounding = (
        np.asarray(quantized.get_value().dequantize("float32")[1])
        - load_file(base / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    )
    assert np.abs(rounding).max() > 1e-3  # what merging into the quantized base would have kept
    assert json.loads((merged_export / "config.json").read_text()) == LLAMA | {"torch_dtype": "float32"}


def test_writes_the_dtype_of_the_checkpoint_by_default(base, run, tmp_path):
    output = exported(run, "merged", tmp_path / "new" / "out")
    found = load_file(output / "model.safetensors")
    for name, expected in merged_weights(base, run / "adapter").items():
        assert found[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(found[name].astype(np.float32), expected, rtol=2**-8, atol=1e-6, err_msg=name)
    assert json.loads((output / "config.json").read_text()) == LLAMA
    logits, expected = np.asarray(jaxft.load_model(output)(TOKENS)), tuned_logits(base, run)
    assert 0 < np.linalg.norm(logits - expected) < 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "stored, declared, expected, told",
    [
        ({"bfloat16"}, {}, "bfloat16", None),
        ({"float16"}, {}, "float16", None),
        ({"float32"}, {}, "float32", None),
        ({"bfloat16"}, {"torch_dtype": "bfloat16"}, "bfloat16", None),
        ({"bfloat16"}, {"text_config": {"dtype": "bfloat16"}}, "bfloat16", None),
        (
            {"bfloat16", "float32"},
            {},
            "bfloat16",
            "320 values in float32; all is written as bfloat16",
        ),
        ({"bfloat16"}, {"dtype": "float32"}, "float32", "74,560 values in bfloat16; all is written as float32"),
    ],
)
def test_the_dtype_is_that_of_the_config_or_else_of_the_tensors(
    random_checkpoint, caplog, stored, declared, expected, told
):
    """Norms stay in float32 where both are stored."""
    small = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | {"vocab_size": 8}
    directory = random_checkpoint(small)
    (directory / "config.json").write_text(json.dumps(small | declared))
    wide, narrow = "float32" if "float32" in stored else min(stored), min(stored)
    weights = load_file(directory / "model.safetensors")
    weights = {name: value.astype(wide if value.ndim == 1 else narrow) for name, value in weights.items()}
    save_file(weights, directory / "model.safetensors")
    assert export.checkpoint_dtype(directory) == expected
    assert (told is None) == (caplog.text == "")
    assert told is None or told in caplog.text


def test_template_of_the_run_goes_along(base, peft_export, merged_export):
    assert AutoTokenizer.from_pretrained(base).chat_template != CHATML
    for output in (peft_export, merged_export):
        assert AutoTokenizer.from_pretrained(output).chat_template == CHATML


def test_generation_stops_where_answers_were_trained_to_end(peft_export, merged_export):
    for output in (peft_export, merged_export):
        settings = json.loads((output / "generation_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(output)
        ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert settings == {"eos_token_id": sorted(ends), "temperature": 0.6}
        assert tokenizer.eos_token == "<|im_end|>"


def test_template_replaces_all_others(base, tmp_path):
    directory = Path(shutil.copytree(base, tmp_path / "tokenizer"))
    extra = directory / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("{{ messages[0].content }}")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    assert "chat_template" in settings
    own = AutoTokenizer.from_pretrained(directory).chat_template
    assert own.keys() == {"default", "tool_use"}

    for unchanged in (None, own["default"]):
        carry_template(directory, unchanged)
        assert AutoTokenizer.from_pretrained(directory).chat_template == own
    carry_template(directory, own["tool_use"])
    assert AutoTokenizer.from_pretrained(directory).chat_template == own["tool_use"]
    del settings["chat_template"]
    assert json.loads((directory / "tokenizer_config.json").read_text()) == settings


def test_full_run(full_run, tmp_path, capsys):
    output = exported(full_run, "merged", tmp_path / "out")
    written = load_file(full_run / "model" / "model.safetensors")
    for name, weight in load_file(output / "model.safetensors").items():
        np.testing.assert_array_equal(weight, written[name], err_msg=name)
        assert weight.dtype == ml_dtypes.bfloat16  # the run's dtype
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (full_run / "model" / name).read_bytes()
    assert main(full_run, "peft", tmp_path / "other") == 2
    assert "trained every weight" in capsys.readouterr().err
    refused(full_run, "merged", tmp_path / "based", "--base is where the base of an adapter is", capsys, "--base", "x")


# What is refused


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_record(run: Path, **changes) -> None:
    """As if the run had written it so."""
    record = json.loads((run / "run.json").read_text()) | changes
    record["config_sha256"] = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    record.pop("sha256", None)
    (run / "run.json").write_text(json.dumps(sealed(record)))


def edit_config(run: Path, **changes) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def edit_base(run: Path, **changes) -> None:
    record = json.loads((run / "run.json").read_text())
    edit_record(run, base=record["base"] | changes)


def interrupt(run: Path) -> None:
    edit_json(run / "run.json", finished=None)
    shutil.rmtree(run / "adapter")


NOT_AS_WRITTEN = "run.json is not as the run wrote it (its SHA-256 differs)"
FAULTS = {
    "no-run": (lambda run: (run / "run.json").unlink(), "not the output_dir of a run: it has no run.json"),
    "no-config": (lambda run: (run / "config.yaml").unlink(), "it has no config.yaml"),
    "damaged-record": (lambda run: (run / "run.json").write_text('{"finished'), "run.json: not valid JSON"),
    "damaged-config": (lambda run: edit_config(run, lora_rr=3), "config.yaml: lora_rr: unknown key"),
    "unfinished": (interrupt, "has not finished, and there is no adapter/; go on with it (resume_from"),
    "being-resumed": (lambda run: edit_json(run / "run.json", finished=None), "has not finished; go on with"),
    "bit-rot": (
        lambda run: flip_bit(run / "adapter" / "adapter_model.safetensors"),
        "adapter_model.safetensors does not match the SHA-256 in run.json",
    ),
    "lost": (
        lambda run: (run / "adapter" / "adapter_config.json").unlink(),
        "adapter_config.json is missing",
    ),
    "no-base": (
        lambda run: edit_base(run, path="/gone/model"),
        "/gone/model: no such directory or file; ",
    ),
    "another-template": (lambda run: edit_json(run / "run.json", chat_template="{{ messages }}"), NOT_AS_WRITTEN),
    "no-fingerprints": (lambda run: edit_json(run / "run.json", fingerprints=None), NOT_AS_WRITTEN),
    "another-version": (lambda run: edit_json(run / "run.json", versions={"jaxft": "9"}), NOT_AS_WRITTEN),
    "another-stop": (lambda run: edit_json(run / "run.json", stop_tokens={"<|im_end|>": 3}), NOT_AS_WRITTEN),
    "digests-of-others": (lambda run: edit_json(run / "run.json", result_sha256={"x": "y"}), NOT_AS_WRITTEN),
    "no-seal": (lambda run: edit_json(run / "run.json", sha256=None), NOT_AS_WRITTEN),
    "another-config": (
        lambda run: edit_config(run, chat_template="chatml"),
        NOT_AS_WRITTEN.replace("run.json", "config.yaml"),
    ),
    "a-list": (lambda run: (run / "run.json").write_text("[]"), "run.json: holds a list, not an object"),
}


def refused(run: Path, form: str, directory: Path, message: str, capsys, *more: str) -> None:
    capsys.readouterr()
    directory.mkdir()
    assert main(run, form, directory / "out", *more) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("fault, message", FAULTS.values(), ids=FAULTS)
def test_refuses(run, fault, message, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    fault(copy)
    for form in ("peft", "merged"):
        refused(copy, form, tmp_path / form, message, capsys)


def test_refuses_a_record_without_digests(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    record = json.loads((copy / "run.json").read_text())
    del record["result_sha256"]
    (copy / "run.json").write_text(json.dumps(record))
    refused(copy, "peft", tmp_path / "out", "run.json lacks result_sha256", capsys)


def test_refuses_an_adapter_that_does_not_fit(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    factors = load_file(copy / "adapter" / "adapter_model.safetensors")
    lost = factors.popitem()[0].removesuffix(".weight").rpartition(".")[0].removeprefix("base_model.model.")
    save_file(factors, copy / "adapter" / "adapter_model.safetensors")
    write_digests(copy / "adapter")
    edit_record(copy, result_sha256=digests(copy / "adapter"))
    for form in ("peft", "merged"):
        refused(copy, form, tmp_path / form, f"{lost} has ", capsys)


def test_refuses_another_base(run, random_checkpoint, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    edit_base(copy, path=str(random_checkpoint(LLAMA, seed=1)))
    for form in ("peft", "merged"):
        refused(copy, form, tmp_path / form, f"not the weights that {copy} was trained on", capsys)


def test_refuses_a_base_whose_config_changed(run, base, tmp_path, capsys):
    copy, other = Path(shutil.copytree(run, tmp_path / "run")), Path(shutil.copytree(base, tmp_path / "base"))
    edit_base(copy, path=str(other))
    edit_json(other / "config.json", transformers_version="9.9")
    assert main(copy, "peft", tmp_path / "the same") == 0
    edit_json(other / "config.json", rms_norm_eps=1e-3)
    refused(copy, "peft", tmp_path / "out", f"not the config.json that {copy} was trained on", capsys)


# The base


def test_the_base_is_found_where_it_was_and_where_it_is_now(run, base, tmp_path, monkeypatch, capsys):
    """Whatever directory the command is called from, and whatever the config calls the base."""
    copy, moved = Path(shutil.copytree(run, tmp_path / "run")), Path(shutil.copytree(base, tmp_path / "moved"))
    edit_config(copy, model_name_or_path="base")
    edit_record(copy)
    monkeypatch.chdir(tmp_path)
    exported(Path("run"), "peft", tmp_path / "a" / "out")
    assert base_named(tmp_path / "a" / "out") == (str(base), None)
    edit_base(copy, path="/gone/model", name="base")
    refused(copy, "peft", tmp_path / "b", "(model_name_or_path: base). If it was moved, say with --base", capsys)
    capsys.readouterr()
    exported(Path("run"), "peft", tmp_path / "c" / "out", "--base", "moved")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'c' / 'out'}: PEFT adapter for {moved}\n"
    assert base_named(tmp_path / "c" / "out") == (str(moved), None)
    exported(Path("run"), "peft", tmp_path / "d" / "out", "--base", "moved", "--base-name", "org/model")
    assert "PEFT adapter for org/model\n" in capsys.readouterr().out
    assert base_named(tmp_path / "d" / "out") == ("org/model", None)
    assert '--base "$(hf download org/model)"' in (tmp_path / "d" / "out" / "README.md").read_text()
    for folded in ((), ("--portable",)):  # a GGUF file is not the repository that it was made from
        name = f"f{len(folded)}"
        with monkeypatch.context() as patched:
            patched.setattr("jaxft.cli.export.is_gguf", lambda path: True)
            exported(run, "peft", tmp_path / name / "named" / "out", "--base-name", "org/model", *folded)
            exported(run, "peft", tmp_path / name / "alone" / "out", *folded)
        found = [fingerprint_in(tmp_path / name / place / "out") for place in ("named", "alone")]
        assert found == [None, json.loads((run / "run.json").read_text())["fingerprints"]["base"]]
    exported(Path("run"), "merged", tmp_path / "e" / "out", "--base", "moved")
    assert f"Base: `{moved}`" in (tmp_path / "e" / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["", " ", "./model", "~/model", "../model", "a/b/c", "https://huggingface.co/a/b"])
def test_refuses_a_name_that_means_something_else_elsewhere(run, tmp_path, capsys, name):
    refused(run, "peft", tmp_path / "out", f"--base-name {name!r} is no repository", capsys, "--base-name", name)


def test_a_name_is_a_repository_or_an_absolute_path(run, tmp_path):
    for i, name in enumerate(("gpt2", "org/model-1.5_x", "/models/base")):
        assert base_named(exported(run, "peft", tmp_path / str(i) / "out", "--base-name", name)) == (name, None)


def test_a_base_of_the_hub_is_named_by_repository_and_commit(run, base, tmp_path, monkeypatch, capsys):
    """Wherever a copy of it is."""
    copy, commit = Path(shutil.copytree(run, tmp_path / "run")), "0123456789abcdef" * 2 + "01234567"
    edit_base(copy, name="org/model", path="/cache/snapshots/x", revision=commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(copy, "peft", tmp_path / "none") == 2
    assert "Or say with --base where a copy is" in capsys.readouterr().err
    exported(copy, "peft", tmp_path / "a" / "out", "--base", str(base))
    snapshots = tmp_path / "cache/models--org--model/snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / commit).symlink_to(base)
    exported(copy, "peft", tmp_path / "b" / "out")
    for out in ("a", "b"):
        assert base_named(tmp_path / out / "out") == ("org/model", commit)
        card = (tmp_path / out / "out" / "README.md").read_text()
        assert f'--base "$(hf download org/model --revision {commit})"' in card
        assert f"vllm serve org/model --revision {commit} --tokenizer DIR" in card


def fingerprint_in(adapter: Path) -> str | None:
    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        return (file.metadata() or {}).get("jaxft_base_fingerprint")


def base_named(adapter: Path) -> tuple[str, str | None]:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    check_digests(adapter)
    name, card = settings["base_model_name_or_path"], (adapter / "README.md").read_text()
    assert f"Base: `{name}`" in card
    assert (f"base_model: {json.dumps(name)}\n" in card) is not name.startswith(
        "/"
    )  # registries take repositories only
    return name, settings["revision"]


def test_refuses_to_write_over_anything(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("y")
    for name, message in (("full", "is not empty"), ("file", "is a file")):
        assert main(run, "peft", tmp_path / name) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "precious").read_text() == "x"
    assert (tmp_path / "file").read_text() == "y"
    (tmp_path / "empty").mkdir()
    assert main(run, "peft", tmp_path / "empty") == 0


def test_refuses_a_dtype_for_an_adapter(run, tmp_path, capsys):
    refused(run, "peft", tmp_path / "out", "--dtype is for --format merged", capsys, "--dtype", "bfloat16")


def test_refuses_a_dtype_that_cannot_hold_the_weights(full_run, tmp_path, capsys):
    copy = Path(shutil.copytree(full_run, tmp_path / "run"))
    weights = load_file(copy / "model" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * ml_dtypes.bfloat16(1e5)
    save_file(weights, copy / "model" / "model.safetensors")
    edit_record(copy, result_sha256=digests(copy / "model"))
    refused(copy, "merged", tmp_path / "out", "not finite in float16", capsys, "--dtype", "float16")


def test_reads_back_what_it_wrote(run, base, tmp_path, capsys, monkeypatch):
    save = export.save_model
    monkeypatch.setattr(export, "save_model", lambda model, *args: save(jaxft.load_model(base), *args))
    refused(run, "merged", tmp_path / "out", "differs from the merged model", capsys)


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_leaves_nothing_half_written(run, tmp_path, capsys, monkeypatch, error):
    def fail(model, directory, dtype):
        (directory / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(export, "save_model", fail)
    if isinstance(error, OSError):
        refused(run, "merged", tmp_path / "out", "No space left", capsys)
    else:
        with pytest.raises(KeyboardInterrupt):
            main(run, "merged", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
