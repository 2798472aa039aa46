"""AdamW (arXiv 1711.05101) with clipping and a schedule, as transformers' Trainer composes them."""

import math
from collections.abc import Iterable

import optax

from jaxft import rules
from jaxft.config import Config

DECAY = ((r"(norm\.weight|\.bias)$", False), (r".", True))
"""Norms and biases are not decayed; everything else is."""


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Learning rate of each update, counted from 0: linear warm-up from 0 to the peak, then as configured.

    >>> from jaxft.config import Config
    >>> config = Config(model_name_or_path="m", output_dir="o", datasets=[{"path": "d"}], learning_rate=1.0,
    ...     lr_scheduler_type="linear", warmup_steps=2)
    >>> [round(float(learning_rate_schedule(config, 6)(step)), 2) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    remaining = max(total_steps - warmup, 1)
    after = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, remaining),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, remaining),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.lr_scheduler_type]
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), after], [warmup])


def make_optimizer(config: Config, total_steps: int, names: Iterable[str]) -> optax.GradientTransformation:
    """Clip to the global norm, then AdamW. `names` are those of the trained parameters."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=rules.assign(DECAY, names, may_be_idle=True),
    )
    return optax.chain(clip, adamw)
