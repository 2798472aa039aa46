"""Paths as people write them: `~` is the home directory; addresses and variables are refused.

Taken as a path, a bucket's address (`gs://`, `s3://`, ...) would name a local directory, whose files are lost with the
machine.
"""

import os
import re

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # one slash, because pathlib makes one of two
_VARIABLE = re.compile(r"(\$(?:\w+|\{\w+\}))(?:/|\Z)")
_ADVICE = {
    "gs": "mount the bucket (`gcsfuse BUCKET DIR`), or copy from or to it (`gcloud storage cp -r`)",
    "s3": "mount the bucket (`mount-s3 BUCKET DIR`), or copy from or to it (`aws s3 cp --recursive`)",
    "hf": "for the hub's models and datasets give ORG/NAME; results are uploaded afterwards (`hf upload`)",
    "http": "download it; for the hub's models and datasets give ORG/NAME",
    "file": "leave `file://` out",
}
_ADVICE |= {"gcs": _ADVICE["gs"], "s3a": _ADVICE["s3"], "s3n": _ADVICE["s3"], "https": _ADVICE["http"]}


def local_path(text: str) -> str:
    """The path with the home directory in place of `~`; everything else, names on the hub too, is unchanged.

    Raises:
        ValueError: an address, a variable, or the home of an unknown user.

    >>> local_path("runs/mine")
    'runs/mine'
    """
    if address := _ADDRESS.match(text):
        scheme = address[1].lower()
        advice = _ADVICE.get(scheme, "mount it, or copy from or to it")
        raise ValueError(f"is an address ({scheme}://), and files are read and written in directories here: {advice}")
    if variable := _VARIABLE.match(text):  # not expanded: a config must mean the same everywhere
        raise ValueError(
            f"{variable[1]} is not replaced here; write it out, or give the key on the command line, where the shell "
            f"replaces it; a directory of that name is ./{variable[1]}"
        )
    path = os.path.expanduser(text)
    if re.match(r"~[^/]*(/|\Z)", path):
        raise ValueError(f"{text.partition('/')[0]} is nobody's home here; put a path that starts with ~ as ./~...")
    return path
