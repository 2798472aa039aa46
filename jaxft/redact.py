"""Remove secrets from text that others wrote, before it is shown."""

import os
import re


def redact(text: str) -> str:
    """One line of `text` without tokens, passwords in URLs, or queries of URLs (they sign download links)."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(variable):
            text = text.replace(token, "***")
    text = re.sub(r"\b(hf|api_org)_[\w.-]{8,}|(?<=Bearer )\S+", "***", text)
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    text = re.sub(r"\?[^\s'\"]+", "?***", text)
    return " ".join(text.split())[:500]
