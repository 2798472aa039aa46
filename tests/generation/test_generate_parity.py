"""Greedy texts beside transformers, which has a cache and left padding of its own."""

import json

import numpy as np
import pytest

import jaxft
from jaxft.generation.generate import generate
from jaxft.hub.load import eos_token_ids

NEW, VOCAB = 32, 131
SMALL = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
    "rope_theta": 100.0,
}
CONFIGS = {
    "llama": {},
    "mistral-window": {"model_type": "mistral", "sliding_window": 9},
    "qwen3-alternating": {
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
    },
    # The texts cross the length at which frequencies begin to change; earlier keys keep those of their time.
    "rope-dynamic": {
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    },
    "rope-longrope": {"rope_parameters": LONGROPE},
}

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def one_torch_thread():
    """For models as small as these, threads that wait for each other cost far more than they bring."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def transformers_texts(directory, prompts: list[list[int]], eos_ids: list[int]) -> list[list[int]]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=eos_ids, pad_token_id=0
    )
    texts = model.generate(tokens, attention_mask=mask)[:, longest:].tolist()
    ends = [[index for index, token in enumerate(text) if token in eos_ids] for text in texts]
    return [text[: found[0] if found else None] for text, found in zip(texts, ends, strict=True)]


def test_real_texts_agree(material):
    directory = material / "models/stories260K"
    story = json.loads((directory / "reference.json").read_text())["story_ids"]
    prompts = [[1], story[:9], story[:23], story]
    eos_ids = eos_token_ids(directory, None)
    ours = generate(jaxft.load_model(directory), prompts, max_new_tokens=NEW, eos_ids=eos_ids)
    assert ours == transformers_texts(directory, prompts, eos_ids)
    assert [1, *ours[0]] == story[: NEW + 1], "the beginning of this story is the model's likeliest"


@pytest.mark.parametrize("kind", CONFIGS)
def test_texts_of_random_models_agree(random_checkpoint, kind):
    directory = random_checkpoint(SMALL | CONFIGS[kind])
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, VOCAB, length).tolist() for length in (21, 3, 14)]
    ours = generate(jaxft.load_model(directory), prompts, max_new_tokens=NEW, eos_ids=[5, 77])
    assert ours == transformers_texts(directory, prompts, [5, 77])
    assert len({token for text in ours for token in text}) > 10
