"""The result of a run, written when training ends: an adapter or a model, with all that others need to use it."""

import os
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.config import Config
from jaxft.hub.card import Card, write_card
from jaxft.hub.consumers import adapter_of, consumers
from jaxft.hub.digests import write_digests
from jaxft.hub.peft import base_of, save_adapter
from jaxft.hub.save import copy_companions, require_tokenizer, save_model
from jaxft.hub.stage import staged
from jaxft.hub.tokenizer_files import forget_text_eos
from jaxft.models.decoder import Decoder
from jaxft.sharding import hosts
from jaxft.training.companions import dress, stop_tokens
from jaxft.training.inputs import Inputs
from jaxft.training.run_directory import RunDirectory


def learned_stops(inputs: Inputs, end_of_turn: Collection[int]) -> dict[str, int]:
    """The tokens that end what was trained: token -> id, first the one that the exported tokenizer calls its EOS.

    Args:
        end_of_turn: the token that ends an answer in the chat template, if it is one.
    """
    ends = list(end_of_turn)
    learned = any(bool((np.isin(one.tokens, ends) & one.loss_mask).any()) for one in inputs.data.train)
    rows = inputs.decoder.vocab_size
    return stop_tokens(inputs.resolved.path, inputs.renderer.tokenizer, ends, learned, rows)


def describe_stops(stops: Mapping[str, int]) -> str:
    """The line that names the stop tokens."""
    if not stops:
        return "no token is known to end a text: who generates must say where to stop"
    first, *others = (f"{token} ({index})" for token, index in stops.items())
    also = f"; generation stops at {', '.join(others)}, too" if others else ""
    return f"answers end with {first}, which is the exported tokenizer's eos_token{also}"


def refusals(model: Decoder, inputs: Inputs) -> list[str]:
    """A line for each program that will not load this run's result unchanged. The model may be abstract."""
    return [] if inputs.config.adapter == "none" else consumers(adapter_of(model, inputs.resolved.path))


def template_name(config: Config, template: str | None) -> str | None:
    """What the chat template is called where others read it, without the directories that it lies in."""
    if template is None or config.chat_template is None:
        return None if template is None else "the base's own"
    return "the run's own" if "{" in config.chat_template else Path(config.chat_template).name


def data_digests(fingerprints: Mapping[str, str], held_out: int) -> dict[str, str]:
    """SHA-256 of what was trained on, and of the examples held out, if there are any."""
    return {name: fingerprints[name] for name in ("data", *["held-out data"] * bool(held_out))}


def base_record(inputs: Inputs) -> dict[str, Any]:
    """Where the base is: what the config calls it, its absolute path, and the commit if it came from the Hub."""
    resolved = inputs.resolved
    return {
        "name": inputs.config.model_name_or_path,
        "path": os.path.abspath(resolved.path),
        "revision": resolved.revision,
    }


def export(model: Decoder, inputs: Inputs, directory: RunDirectory, stops: Mapping[str, int]) -> Path:
    """Write the result, with the tokenizer and the chat template that it was trained with. Returns its directory."""
    full = inputs.config.adapter == "none"
    target = directory.path / "model" if full else directory.adapter
    save = partial(save_model, dtype=inputs.recipe.storage) if full else save_adapter
    if not hosts.is_writer():
        save(model, target)  # takes part in the save
        hosts.barrier()
        return target
    with staged(target, replace=True) as stage:  # what is there is of a run that was killed after training
        save(model, stage)
        if not full:
            copy_companions(inputs.resolved.path, stage)
        require_tokenizer(stage, inputs.resolved.path)
        forget_text_eos(stage)  # the base may be an export itself, whose EOS ended texts in this run
        dress(stage, inputs.chat_template, stops, inputs.decoder.vocab_size)
        write_card(stage, _card(model, inputs, directory, stops))
        if not full:
            write_digests(stage)
    hosts.barrier()
    return target


def _card(model: Decoder, inputs: Inputs, directory: RunDirectory, stops: Mapping[str, int]) -> Card:
    config, record = inputs.config, directory.record
    base, revision = base_of(model.source)
    return Card(
        title=directory.path.absolute().name,
        base=base,
        revision=revision,
        adapter=None if config.adapter == "none" else adapter_of(model, inputs.resolved.path),
        stops=stops,
        template=template_name(config, inputs.chat_template),
        data=data_digests(record["fingerprints"], inputs.data.report.held_out),
        versions=record["versions"],
    )
