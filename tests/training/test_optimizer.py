"""Clipping, AdamW and its schedule beside a plain implementation and transformers' schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.config import Config
from jaxft.training.optimizer import learning_rate_schedule, make_optimizer

PEAK = 3e-3


def config(**changes) -> Config:
    settings = {"model_name_or_path": "m", "output_dir": "o", "datasets": ["d"], "learning_rate": PEAK}
    return Config(**settings | changes)


# The schedule


@pytest.mark.parity
@pytest.mark.parametrize("warmup", [0, 1, 7], ids=lambda steps: f"warmup{steps}")
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_is_that_of_transformers(kind, warmup):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if kind == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
        theirs = make(optimizer, num_warmup_steps=warmup, num_training_steps=40)
    expected = []
    for _ in range(45):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    # transformers lets a cosine rise again after the last step.
    ours = learning_rate_schedule(config(lr_scheduler_type=kind, warmup_steps=warmup), 40)
    np.testing.assert_allclose([float(ours(step)) for step in range(41)], expected[:41], rtol=1e-5, atol=1e-9)


@pytest.mark.parity
@pytest.mark.parametrize("total", [3, 10, 33, 100])
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.5])
def test_a_ratio_warms_up_as_long_as_in_transformers(tmp_path, ratio, total):
    pytest.importorskip("torch")
    from transformers import TrainingArguments

    theirs = TrainingArguments(output_dir=tmp_path, warmup_steps=ratio, use_cpu=True).get_warmup_steps(total)
    rates = learning_rate_schedule(config(lr_scheduler_type="constant", warmup_ratio=ratio), total)
    ours = next(step for step in range(total + 1) if float(rates(step)) == np.float32(PEAK))
    assert ours == theirs >= 1


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_warmup_longer_than_the_run_only_rises(kind):
    rates = learning_rate_schedule(config(lr_scheduler_type=kind, warmup_steps=20), 10)
    found = [float(rates(step)) for step in range(10)]
    np.testing.assert_allclose(found, [PEAK * step / 20 for step in range(10)], rtol=1e-6)


# AdamW

NAMES = {
    "model.layers.0.0.self_attn.q_proj.adapter.A": True,
    "model.layers.0.0.self_attn.q_proj.adapter.magnitude": True,
    "model.embed_tokens.weight": True,
    "model.layers.0.0.mlp.down_proj.weight": True,
    "model.layers.0.0.self_attn.q_proj.bias": False,
    "model.layers.0.0.input_layernorm.weight": False,
    "model.layers.0.0.post_attention_layernorm.weight": False,
    "model.layers.0.0.self_attn.k_norm.weight": False,
    "model.norm.weight": False,
}


def adamw(parameters, gradients, settings: Config, rates) -> dict[str, np.ndarray]:
    """Algorithm 2 of arXiv 1711.05101 after clipping to the global norm, in float64."""
    w = {name: value.astype(np.float64) for name, value in parameters.items()}
    m, v = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    b1, b2 = settings.adam_beta1, settings.adam_beta2
    for t, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in gradient.values()))
        clip = min(1.0, settings.max_grad_norm / norm) if settings.max_grad_norm else 1.0
        for name, decayed in NAMES.items():
            g = clip * gradient[name]
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            direction = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + settings.adam_epsilon)
            w[name] = w[name] - rates[t - 1] * (direction + settings.weight_decay * decayed * w[name])
    return w


@pytest.mark.core
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.3, "max_grad_norm": 0},
        {"max_grad_norm": 0.5, "weight_decay": 0.1},
        {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "max_grad_norm": 30.0},
    ],
)
def test_updates_are_those_of_adamw(changes):
    settings = config(lr_scheduler_type="linear", warmup_steps=3, **changes)
    random = np.random.default_rng(0)

    def draw(scale: float) -> dict[str, np.ndarray]:
        return {name: random.normal(0, scale, (4, 3)).astype(np.float32) for name in NAMES}

    start, gradients = draw(1.0), [draw(scale) for scale in (1.0, 0.01, 5.0, 0.3, 1.0, 2.0)]
    optimizer = make_optimizer(settings, 8, NAMES)
    found, state = jax.tree.map(jnp.asarray, start), None
    state = optimizer.init(found)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in gradients:
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradient), state, found)
            found = optax.apply_updates(found, updates)
    rates = [PEAK * rate for rate in (0, 1 / 3, 2 / 3, 1, 4 / 5, 3 / 5)]
    expected = adamw(start, gradients, settings, rates)
    for name in NAMES:
        moved = np.abs(expected[name] - start[name]).max()
        assert moved > 1e-4
        np.testing.assert_allclose(found[name], expected[name], atol=3e-5 * moved + 3e-7, err_msg=name)
