"""Names, paths and the ways the Hub fails, with the Hub's own client and exceptions but no network."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects

from jaxft.hub.resolve import HubError, ResolvedModel, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CANARY = "hf_" + "CANARYcanary0123456789"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and a Hub that is switched off, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cached(tmp_path) -> Path:
    """`org/model` in the cache as the Hub's client lays it out: blobs, links to them, refs to the commit."""
    repository = tmp_path / "cache" / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    for directory in ("blobs", f"snapshots/{COMMIT}", "refs"):
        (repository / directory).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs" / "aa").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    return snapshot


@pytest.fixture
def failing(monkeypatch):
    """Makes the download raise."""

    def install(error: Exception) -> None:
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return install


def http_error(kind: type[errors.HfHubHTTPError], message: str) -> errors.HfHubHTTPError:
    return kind(message, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize("name", ["models/tiny", "./models/tiny", "models/tiny/", "../work/models/tiny"])
def test_an_existing_directory_is_taken_as_it_is(workplace, name):
    (workplace / "models" / "tiny").mkdir(parents=True)
    assert resolve_model(name) == ResolvedModel(Path(name), revision=None)
    assert resolve_model(str(workplace / "models" / "tiny")).path == workplace / "models" / "tiny"


def test_home_is_expanded(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(workplace))
    (workplace / "m").mkdir()
    assert resolve_model("~/m").path == workplace / "m"


def test_a_directory_goes_before_the_hub(workplace, cached):
    assert resolve_model("org/model").path == cached
    (workplace / "org" / "model").mkdir(parents=True)
    assert resolve_model("org/model") == ResolvedModel(Path("org/model"), revision=None)
    with pytest.raises(HubError, match=r"org/model is a local directory: a revision \(main\)"):
        resolve_model("org/model", "main")


@pytest.mark.parametrize(
    "name",
    ["./modls/x", "/nowhere/x", "~/nowhere", "~nobody/x", "a/b/c", "models/", "gpt2", "a\\b", "../x", ""],
)
def test_a_missing_path_is_reported_and_not_sent_to_the_hub(failing, name):
    failing(AssertionError("asked the Hub"))
    with pytest.raises(HubError, match=f"no such directory: {re.escape(repr(name))}"):
        resolve_model(name)


@pytest.mark.parametrize("name, told", [
    ("org/na me", "neither an existing directory nor a Hub repository"),
    ("org/a..b", "neither an existing directory nor a Hub repository"),
    ("org/model.git", "neither an existing directory nor a Hub repository"),
    ("https://huggingface.co/org/model", "is a URL; give ORG/NAME"),
    ("hf://org/model", "is a URL; give ORG/NAME"),
])  # fmt: skip
def test_what_cannot_be_a_repository(failing, name, told):
    failing(AssertionError("asked the Hub"))
    with pytest.raises(HubError, match=told):
        resolve_model(name)


def test_a_file_is_not_a_model(workplace):
    (workplace / "model.safetensors").touch()
    with pytest.raises(HubError, match="is a file; give the directory"):
        resolve_model("./model.safetensors")


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_the_cache_serves_while_offline_and_names_the_commit(cached, revision):
    resolved = resolve_model("org/model", revision)
    assert resolved == ResolvedModel(cached, COMMIT)
    assert (resolved.path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("revision", ["../../../x", "/etc/hostname", "", "a b", "--force", "x;y"])
def test_a_revision_is_a_name(cached, revision):
    with pytest.raises(HubError, match="is not a branch, tag or commit"):
        resolve_model("org/model", revision)


def test_offline_and_not_cached(workplace):
    with pytest.raises(HubError) as caught:
        resolve_model("org/other", "v1.0")
    told = str(caught.value)
    assert told.startswith("org/other: is not in the cache in full, and the Hub cannot be reached")
    assert "    hf download org/other --revision v1.0 --local-dir DIR\n" in told
    assert "    model_name_or_path: DIR\n" in told
    assert str(workplace / "org" / "other") in told
    with pytest.raises(HubError, match="hf download org/other --local-dir DIR"):
        resolve_model("org/other")


def test_a_revision_that_is_not_cached(cached):
    with pytest.raises(HubError, match="--revision other --local-dir DIR"):
        resolve_model("org/model", "other")


def test_unreachable_host(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the Hub cannot be reached(.|\n)*LocalEntryNotFoundError: .*Connect"):
        resolve_model("org/other")


FAULTS = [
    (
        http_error(errors.GatedRepoError, "403"),
        r"is gated: accept its terms at https://huggingface.co/org/m,",
    ),
    (http_error(errors.RepositoryNotFoundError, "401"), "does not exist on the Hub, or is private"),
    (http_error(errors.RevisionNotFoundError, "404"), "has no revision v2"),
    (http_error(errors.DisabledRepoError, "403 disabled"), "could not be downloaded(.|\n)*403 disabled"),
    (http_error(errors.HfHubHTTPError, "503 busy"), "could not be downloaded(.|\n)*HfHubHTTPError: 503 busy"),
    (errors.HTTPError("407 proxy"), "could not be downloaded(.|\n)*HTTPError: 407 proxy"),
    (errors.OfflineModeIsEnabled("off"), "is switched off"),
    (
        errors.IncompleteSnapshotError("2 files miss", snapshot_path="/x"),
        "not in the cache in full(.|\n)*2 files",
    ),
]


@pytest.mark.parametrize("error, told", FAULTS, ids=[type(error).__name__ for error, _ in FAULTS])
def test_every_fault_is_explained_with_the_offline_recipe(failing, error, told):
    failing(error)
    with pytest.raises(HubError, match=rf"org/m: .*{told}") as caught:
        resolve_model("org/m", "v2")
    assert "hf download org/m --revision v2 --local-dir DIR" in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


def test_errors_of_the_machine_are_not_blamed_on_the_hub(failing):
    failing(OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        resolve_model("org/m")


def test_no_secret_is_printed(failing, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "unusual-token-canary")
    message = (
        f"401 for https://user:passcanary@mirror/api/x?sig=querycanary with Bearer jwtcanary.abc, {CANARY} "
        "and unusual-token-canary"
    )
    failing(http_error(errors.HfHubHTTPError, message))
    with pytest.raises(HubError, match="401 for https://\\*\\*\\*@mirror/api/x") as caught:
        resolve_model("org/m")
    assert "canary" not in str(caught.value).lower()
    with pytest.raises(HubError) as caught:
        resolve_model(f"https://user:{CANARY}@huggingface.co/org/m")
    assert "canary" not in str(caught.value).lower()


REPOSITORY = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
]  # fmt: skip
UNWANTED = [
    "pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "state.pkl", "old.ckpt",
    "modeling_evil.py", "sub/configuration_evil.py", "original/consolidated.00.pth", "original/params.json",
    "consolidated.safetensors", "onnx/model.onnx", "onnx/config.json", "model.gguf", "README.md",
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"files": ["*"]}])
def test_pickles_and_code_are_never_downloaded(tmp_path, monkeypatch, options):
    calls = []

    def download(repo_id: str, **kwargs) -> str:
        calls.append((repo_id, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve_model("org/model", "v1", **options)
    [(repo_id, kwargs)] = calls
    assert (repo_id, kwargs.pop("revision")) == ("org/model", "v1")
    chosen = set(filter_repo_objects(REPOSITORY + UNWANTED, **kwargs))
    assert chosen == set(REPOSITORY) | ({"model.gguf", "README.md"} if options else set())


def test_a_repository_with_nothing_of_use(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / COMMIT))
    with pytest.raises(HubError, match=r"org/model on the Hub has none of the files \*\.safetensors, "):
        resolve_model("org/model")
