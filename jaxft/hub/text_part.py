"""The part for text of a checkpoint that can also see: its tensors alone, under the names that transformers gives them.

In a file they are `language_model.model.*` and `language_model.lm_head.*`, or named as in memory,
`model.language_model.*` and `lm_head.*`. Everything else belongs to the tower for images and what joins the two. It is
out of sight here, and written out again beside a merged text model.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxft.hub.checkpoint import Checkpoint
from jaxft.hub.safetensors import SafetensorsError, TensorInfo

_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.language_model.",
    "lm_head.": "lm_head.",
}
"""How a name begins in a file -> in memory."""


class TextPart:
    """Reads like the `Checkpoint` it is part of.

    Attributes:
        stored: name -> the name in the file.
        others: names in the file of all tensors that are not part of it.
    """

    def __init__(self, files: Checkpoint):
        self.files = files
        self.directory: Path = files.directory
        self.metadata: Mapping[str, str] = files.metadata
        self.stored: dict[str, str] = {}
        for name in files.names():
            prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
            if prefix is not None:
                ours = _PREFIXES[prefix] + name.removeprefix(prefix)
                if ours in self.stored:
                    raise SafetensorsError(f"{self.directory}: holds {ours} twice, as {self.stored[ours]} and {name}")
                self.stored[ours] = name
        self.others = tuple(name for name in files.names() if name not in set(self.stored.values()))

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def names(self) -> tuple[str, ...]:
        return tuple(self.stored)

    def path(self, name: str) -> Path:
        return self.files.path(self.stored[name])

    def info(self, name: str) -> TensorInfo:
        return self.files.info(self.stored[name])

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self.files.read(self.stored[name], index)

    def release(self, name: str) -> None:
        self.files.release(self.stored[name])
