"""What the commands share: how they begin and fail, on which devices and with which weights they load a model, whose
tokenizer they use, and which tokens end an answer."""

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jaxft.data import chat
from jaxft.data.chat import Renderer
from jaxft.hub.digests import check_digests
from jaxft.hub.load import eos_token_ids, load_model
from jaxft.hub.model_files import companions_of
from jaxft.hub.peft_config import read_adapter_config
from jaxft.hub.resolve import ResolvedModel
from jaxft.hub.tokenizer_files import SETTINGS, TEXT_EOS
from jaxft.limits import NoMemoryError, is_without_memory, without_memory
from jaxft.models.decoder import Decoder
from jaxft.paths import local_path
from jaxft.platform import devices_needed, prepared
from jaxft.quantization.formats import parse_format
from jaxft.sharding import hosts
from jaxft.sharding.mesh import make_mesh
from jaxft.training.stopping import Left, leaving

_NO_DEVICE_MEMORY = "RESOURCE_EXHAUSTED: "  # how XLA begins to say it


def exit_code(action: Callable[[], int | None]) -> int:
    """Do it, as one of several processes where this is one: its code or 0; 2 for what the user can put right.

    An error is one line on stderr. It ends all processes, and the line says which of them it befell. So does a signal.
    """
    try:
        with leaving(), prepared():
            with devices_needed():
                hosts.join()
                jax.devices()
            if not hosts.is_writer():
                logging.getLogger().setLevel(logging.ERROR)
                warnings.simplefilter("ignore")
            code = action() or 0
            hosts.part()
            return code
    except Left as left:
        return _failed(left.word, left.code)
    except Exception as error:
        if gone := hosts.gone(error):
            said = str(error).splitlines()[0]
            return _failed(f"error: {gone} is gone: it was killed, or its host or the network is down ({said})", 1)
        if isinstance(error, ValueError | OSError) or is_without_memory(error):
            return _failed(f"error: {_told(error)}", 2)
        if str(error).startswith(_NO_DEVICE_MEMORY):
            reason = str(error).splitlines()[0].removeprefix(_NO_DEVICE_MEMORY).rstrip(".")
            advice = "scripts/plan.py finds settings with which a run fits"
            return _failed(f"error: no memory left on a device: {reason}; {advice}", 1)
        if hosts.count() == 1:
            raise
        return _failed(traceback.format_exc(), 1)


def _told(error: Exception) -> str:
    """An error in words: those of the system come with a number, or, where memory is short, with nothing."""
    if is_without_memory(error) and not isinstance(error, NoMemoryError):
        return without_memory(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def local(text: str) -> str:
    """An argument that is a path or a name on the hub, as `local_path` has it."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _failed(message: str, code: int) -> int:
    """The exit code. Of several processes one that failed ends here: a regular exit would wait for the others."""
    if hosts.count() == 1:
        print(message, file=sys.stderr)
        return code
    print(f"{hosts.name()}: {message}", file=sys.stderr)
    hosts.fail(message, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how to load a model."""
    add = parser.add_argument
    add("--model", required=True, type=local, metavar="DIR", help="model directory, GGUF file or hub id")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--adapter", type=local, metavar="DIR", help="PEFT adapter directory; its tokenizer is used if it holds one")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    add("--quantization", choices=("int8", "int4", "nf4"), help="quantize the base while loading")
    add("--double-quant", action="store_true", help="with nf4: quantize its scales, too")
    add(
        "--mesh",
        default="fsdp=-1",
        metavar="AXIS=N,...",
        help="devices along data, fsdp, expert, context and tensor, as in tensor=2 (default: all of them, by fsdp)",
    )


def mesh_of(options: argparse.Namespace) -> Mesh:
    """The mesh of `--mesh`; as in a config, `data` takes the remaining devices. Raises ValueError if it cannot."""
    parts = [part.partition("=") for part in options.mesh.split(",")]
    try:
        sizes = {axis.strip(): int(size) for axis, _, size in parts}
    except ValueError:
        sizes = {}
    if len(sizes) < len(parts):
        raise ValueError(f"--mesh must look like fsdp=-1 or tensor=2,data=4, not {options.mesh!r}")
    return make_mesh(sizes if -1 in sizes.values() else {"data": -1} | sizes)


def base_of(options: argparse.Namespace, mesh: Mesh, resolved: ResolvedModel) -> Decoder:
    """The model of the options, without the adapter, from where it was found when its tokenizer was loaded."""
    if options.double_quant and options.quantization is None:
        raise ValueError("--double-quant is for the scales of nf4; add --quantization nf4")
    form = options.quantization and parse_format(options.quantization, double_quant=options.double_quant)
    return load_model(options.model, options.dtype, form, mesh, resolved=resolved)


def check_adapter(directory: str | None) -> None:
    """Refuse a faulty adapter before the slow reading of its base's weights.

    Raises:
        ValueError: it is not there, its files are not as jaxft wrote them, or its settings cannot be honoured.
    """
    if directory is not None:
        check_digests(Path(directory))
        read_adapter_config(Path(directory))


def load_tokenizer(model: Path, adapter: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The adapter's tokenizer, which may have another chat template, or else the model's.

    Texts end with the EOS that they ended with in training, where an export calls the end of answers EOS.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    own = adapter is not None and (Path(adapter) / SETTINGS).exists()
    tokenizer = chat.load_tokenizer(adapter if own else companions_of(model))
    if (trained := tokenizer.init_kwargs.get(TEXT_EOS)) is not None:
        tokenizer.eos_token = trained
    return tokenizer


def stop_ids(model: Path, adapter: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the model's own, and those that the files of the tokenizer and the adapter name."""
    found = set(eos_token_ids(model, tokenizer.eos_token_id))
    if (named := tokenizer.init_kwargs.get("eos_token")) is not None:
        found.add(tokenizer.convert_tokens_to_ids(str(named)))
    if adapter is not None:
        found |= set(eos_token_ids(Path(adapter), None))
    return found


def end_of_turn(renderer: Renderer) -> list[int]:
    """The tokens that end a turn in the chat template, that of answers first; a base's own files do not name them."""
    stops = renderer.template.stops if renderer.template else ()
    return renderer.tokenizer.convert_tokens_to_ids(list(stops))
