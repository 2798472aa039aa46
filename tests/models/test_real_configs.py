"""Configs of published models: they map to decoders as large as those of transformers, without memory for either."""

import json
import math

import pytest

from jaxft.models.decoder import describe, parameters
from jaxft.models.hf_config import decoder_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def test_parameter_counts_are_those_of_transformers(material, subtests):
    files = sorted((material / "configs").glob("*.json"))
    assert len(files) >= 20
    for path in files:
        with subtests.test(path.name):
            raw = json.loads(path.read_text())
            ours = sum(math.prod(p.stacked_shape) for p, _ in parameters(describe(decoder_config(raw))))
            raw.pop("quantization_config", None)
            config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
            with torch.device("meta"):
                theirs = transformers.AutoModelForCausalLM.from_config(config)
            text = getattr(theirs.model, "language_model", theirs)
            assert ours == sum(p.numel() for p in text.parameters())
