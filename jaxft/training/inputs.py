"""Gathers what a run needs before it reads the first weight: mesh, tokenizer, data, order, number of steps."""

import hashlib
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxft.adapters.attach import attach
from jaxft.config import Config
from jaxft.data.chat import Renderer, load_tokenizer
from jaxft.data.formats import Text
from jaxft.data.loader import Schedule
from jaxft.data.prepare import Prepared, prepare
from jaxft.data.tokenized import check_vocabulary
from jaxft.hub.load import announce, config_fingerprint, fingerprint, load_model, open_model
from jaxft.hub.model_files import companions_of, open_files
from jaxft.hub.peft import load_adapter
from jaxft.hub.resolve import ResolvedModel, resolve_model
from jaxft.models.config import DecoderConfig, Rope, Source
from jaxft.models.decoder import Decoder
from jaxft.sharding.arrays import rows_here
from jaxft.sharding.mesh import batch_ways, make_mesh
from jaxft.training.recipe import Recipe
from jaxft.training.same_run import ROWS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The result of `gather`."""

    config: Config
    mesh: Mesh
    resolved: ResolvedModel
    decoder: DecoderConfig
    renderer: Renderer
    data: Prepared
    schedule: Schedule
    total_steps: int

    @property
    def rows(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.config.micro_batch_size * batch_ways(self.mesh)

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.config, self.decoder)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that conversations are rendered with."""
        return self.renderer.template and self.renderer.template.source

    @cached_property
    def base_fingerprint(self) -> str:
        return fingerprint(open_files(self.resolved.path))

    @property
    def fingerprints(self) -> dict[str, str]:
        """What must not change between a run and its resumption."""
        tokenizer = self.renderer.tokenizer
        specials = sorted(tokenizer.special_tokens_map.items())
        # the load of experts is balanced within a micro-batch, so its number of rows matters too
        balanced = {"rows of a micro-batch": str(self.rows)} if self.config.router_aux_loss_coef else {}
        return {
            "data": self.schedule.fingerprint(),
            "held-out data": self.data.eval.fingerprint(),
            "tokenizer": _sha256(f"{tokenizer.backend_tokenizer.to_str()} {specials}"),
            "chat template": _sha256(self.chat_template or ""),
            "base": self.base_fingerprint,
            "base config": config_fingerprint(self.resolved.path),
            "adapter to go on from": _digest_of_adapter(self.config.adapter_name_or_path),
            ROWS: str(self.rows * self.config.gradient_accumulation_steps),
            **balanced,
        }

    def load(self) -> Decoder:
        """The base model on the mesh, with the adapter to train."""
        c = self.config
        model = load_model(
            c.model_name_or_path,
            self.recipe.storage,
            self.recipe.quantization,
            self.mesh,
            resolved=self.resolved,
        )
        if model.source.fingerprint != self.base_fingerprint:
            raise ValueError(
                f"{self.resolved.path}: the weights were changed since the run looked at them; nothing was trained"
            )
        self.recipe.configure(model)
        if c.adapter == "none":
            return model
        if c.adapter_name_or_path is not None:
            return load_adapter(model, c.adapter_name_or_path)
        return attach(model, self.recipe.lora, jax.random.key(c.seed))

    def describe(self) -> Decoder:
        """The model that `load` gives, without memory for arrays. Reads only what identifies the base model.

        Raises:
            ValueError: the adapter's targets match nothing, or the adapter to go on from does not fit.
        """
        source = None
        if self.config.adapter_name_or_path is not None:
            name, revision = self.config.model_name_or_path, self.resolved.revision
            source = Source(name, str(self.resolved.path), revision, self.base_fingerprint)
        return self.recipe.describe(source)


def gather(config: Config) -> Inputs:
    """Find the model, read and tokenize the data, and fix the order of the batches.

    Raises:
        ValueError: the model's directory, the data or the mesh has a fault.
    """
    mesh = make_mesh(config.mesh.model_dump())
    resolved = resolve_model(config.model_name_or_path, config.model_revision)
    decoder, weights = open_model(resolved.path)
    Recipe(config, decoder).check(mesh)
    Recipe(config, decoder).attention(mesh)  # raises if the kernel is not available
    renderer = Renderer(load_tokenizer(companions_of(resolved.path)), config.chat_template)
    data = prepare(
        config.datasets,
        renderer,
        max_length=config.max_length,
        eval_datasets=config.eval_datasets,
        val_set_size=config.val_set_size,
        excess_length_strategy=config.excess_length_strategy,
        assistant_only_loss=config.assistant_only_loss,
        mask_history=config.mask_history,
        on_bad_record=config.on_bad_record,
        strict_data=config.strict_data,
        seed=config.seed,
    )
    check_vocabulary([*data.train, data.eval], decoder.vocab_size)
    _check_lengths(data, decoder.rope)
    if config.exact_match_samples and all(isinstance(example, Text) for example in data.eval_examples):
        logger.warning("exact_match_samples has no effect: held-out plain text asks nothing")
    schedule = Schedule(
        data.train,
        micro_batch_size=config.micro_batch_size * batch_ways(mesh),
        accumulation_steps=config.gradient_accumulation_steps,
        max_length=config.max_length,
        packing=config.packing,
        parts=mesh.shape["context"],
        weights=data.weights,
        seed=config.seed,
        rows=rows_here(mesh, config.micro_batch_size * batch_ways(mesh)),
    )
    total_steps = config.max_steps or max(schedule.steps(config.num_train_epochs), 1)
    _tell_of_steps(config, total_steps)
    inputs = Inputs(config, mesh, resolved, decoder, renderer, data, schedule, total_steps)
    announce(decoder, weights, inputs.recipe.quantization, inputs.recipe.storage)
    return inputs


def _tell_of_steps(config: Config, total_steps: int) -> None:
    """Warn about settings that count more updates than this run has."""
    if config.warmup_steps >= total_steps:
        logger.warning(
            "the peak learning rate is never reached: warmup_steps is %d, and the run has %d steps",
            config.warmup_steps,
            total_steps,
        )
    for key, what in {"save_steps": "saved", "eval_steps": "evaluated"}.items():
        if (every := getattr(config, key)) is not None and every > total_steps:
            logger.warning(
                "%s is %d, and the run has %d steps: it is %s after the last only", key, every, total_steps, what
            )
    if config.eval_steps is not None and config.early_stopping_patience is not None:
        evaluations = math.ceil(total_steps / config.eval_steps)
        if config.early_stopping_patience >= evaluations:
            logger.warning(
                "early_stopping_patience is %d, and the run has %d evaluations: it never stops early",
                config.early_stopping_patience,
                evaluations,
            )


def _check_lengths(data: Prepared, rope: Rope) -> None:
    """Check that each example fits the model's positions. In a packed row positions restart with each example."""
    longest = max(int(examples.lengths.max(initial=0)) for examples in (*data.train, data.eval))
    if longest > rope.max_positions and rope.type != "dynamic":
        raise ValueError(
            f"the longest example has {longest} tokens, but the model has {rope.max_positions} positions "
            f"(max_position_embeddings of its config.json); set `max_length` to {rope.max_positions} or less"
        )


def _digest_of_adapter(directory: str | None) -> str:
    digests = []
    for path in [] if directory is None else sorted(Path(directory).glob("adapter_*")):
        with open(path, "rb") as file:
            digests.append(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return _sha256("\n".join(digests))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
