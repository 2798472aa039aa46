"""The held-out loss, packed and not, on one device and on many."""

from copy import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.data.tokenized import Tokenized, TokenizedSet
from jaxft.models import kernels
from jaxft.models.kernels import Backend
from jaxft.models.linear import Adapter
from jaxft.objectives.sft import Sft
from jaxft.sharding.mesh import make_mesh
from jaxft.training import held_out
from jaxft.training.held_out import AHEAD, HeldOut
from jaxft.training.state import Partition

pytestmark = pytest.mark.usefixtures("quick_compiles")

DENSE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
SPARSE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def examples(count: int, longest: int = 60, seed: int = 0) -> TokenizedSet:
    """Of 2 to `longest` tokens; some of each are learned."""
    random = np.random.default_rng(seed)
    sizes = random.integers(2, longest + 1, count)
    return TokenizedSet.of(
        Tokenized(random.integers(0, 96, size).astype(np.int32), np.arange(size) >= random.integers(1, size))
        for size in sizes
    )


class Judged:
    """A model and the ways to put examples before it; `batches` counts those that the last `loss` made."""

    def __init__(self, directory, mesh):
        self.model, self.mesh = jaxft.load_model(directory, dtype="float32", mesh=mesh), mesh
        self.partition = Partition(self.model, Adapter)
        self.batches = 0

    def loss(self, given: TokenizedSet, *, rows: int, max_length: int = 64, long_rows: bool = False):
        judge = HeldOut(
            given,
            self.model.config,
            Backend("auto", self.mesh),
            "float32",
            rows=rows,
            max_length=max_length,
            long_rows=long_rows,
        )
        self.batches = sum(1 for _ in judge.batches())
        partition, traces = copy(self.partition), []
        partition.join = lambda *parts: traces.append(None) or self.partition.join(*parts)
        found = judge.evaluator(partition, Sft())(*self.partition.split(self.model))
        assert len(traces) == 1, "one program for all batches"
        return found.loss, found.count


@pytest.fixture(scope="module")
def one():
    return make_mesh({}, jax.devices()[:1])


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "experts"])
@pytest.mark.parametrize("count, rows, max_length", [(1, 4, 64), (37, 4, 64), (120, 3, 128), (90, 1, 100)])
def test_packing_changes_no_loss(random_checkpoint, one, monkeypatch, config, count, rows, max_length):
    judged, given = Judged(random_checkpoint(config), one), examples(count)
    total, learned = judged.loss(given, rows=rows, max_length=max_length)
    packed = judged.batches
    longer = judged.loss(given, rows=rows, max_length=max_length, long_rows=True)
    monkeypatch.setattr(held_out, "packs", lambda *_: False)
    alone = judged.loss(given, rows=rows, max_length=max_length)
    assert learned == alone[1] == longer[1] == given.loss_mask.sum()
    assert total == pytest.approx(alone[0], rel=1e-6)
    assert longer[0] == pytest.approx(alone[0], rel=1e-6)
    assert judged.batches == -(-count // rows)
    if count > rows:
        assert packed < 0.8 * judged.batches


def test_the_loss_is_that_of_the_logits(random_checkpoint, one):
    judged, given = Judged(random_checkpoint(DENSE), one), examples(23)
    wanted = 0.0
    for index in range(len(given)):
        tokens, learned = given[index]
        logits = jax.nn.log_softmax(judged.model(jnp.asarray(tokens)[None])[0].astype(jnp.float32))
        wanted -= sum(float(logits[place - 1, tokens[place]]) for place in np.flatnonzero(learned) if place)
    assert judged.loss(given, rows=4)[0] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 2, "fsdp": 2}, {"fsdp": 2, "context": 4}])
def test_a_mesh_changes_no_loss(random_checkpoint, one, sizes):
    directory, given = random_checkpoint(DENSE), examples(70)
    alone = Judged(directory, one).loss(given, rows=4)
    together = Judged(directory, make_mesh(sizes)).loss(given, rows=16)
    assert together == pytest.approx(alone, rel=1e-6)


def test_the_host_reads_once(random_checkpoint, one, monkeypatch):
    """And runs no further ahead of the devices than it says."""
    judged, given = Judged(random_checkpoint(DENSE), one), examples(200)
    reads, waits = [], []
    read = held_out.on_host
    monkeypatch.setattr(held_out, "on_host", lambda array: reads.append(array.shape) or read(array))

    class Watched(held_out.deque):
        def __getitem__(self, place):
            waits.append(place)
            return super().__getitem__(place)

    monkeypatch.setattr(held_out, "deque", Watched)
    judged.loss(given, rows=2)
    assert reads == [(200,)] * 2, "the losses and the counts of all batches"
    assert len(waits) == judged.batches - AHEAD > 10


def test_a_kernel_that_cannot_pack_is_kept(monkeypatch, one):
    """Rows then hold one example, and its kernel."""
    case = kernels.Case("gpu", (9, 0), 256, jnp.dtype("bfloat16"), 4, 64, 1, False, False, False)
    monkeypatch.setattr(kernels, "_case", lambda *given: case._replace(packed=given[4]))
    decoder = type("Decoder", (), {"attention_softcap": None, "attention_sinks": False, "num_heads": 4, "head_dim": 64})
    dtype = jnp.dtype("bfloat16")
    assert not kernels.packs(decoder, Backend("auto", one), dtype)
    assert not kernels.packs(decoder, Backend("cudnn", one), dtype)
    assert kernels.packs(decoder, Backend("blockwise", one), dtype)
    case = case._replace(softcap=True)
    assert kernels.packs(decoder, Backend("auto", one), dtype), "blockwise in any case"
