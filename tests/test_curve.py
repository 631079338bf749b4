"""The curve of models without zeros: its arithmetic beside plain numpy, and the dial that is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from storage.convert import convert
from storage.store import Store
from workers.lab.evaluation.curve.layer import Inputs, LayerFfn
from workers.lab.evaluation.curve.passes import Passes
from workers.lab.evaluation.curve.variant import DENSE, Variant
from workers.lab.offline.dense import DenseModel

COPY = "q4"
KINDS = ("llama", "opt-gelu")
F64 = np.float64


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A gated one in sequence, and a plain one with biases, 64 wide."""
    base = tmp_path_factory.mktemp("curve")
    changes = {"llama": {"intermediate_size": 256}, "opt-gelu": {"ffn_dim": 256}}
    return {
        name: convert(
            write_checkpoint(base / name, name, "float32", changes=changes[name]),
            base / f"{name}-store",
            name=name,
        )
        for name in KINDS
    }


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(5, 250, (4, 24))


@pytest.fixture(scope="module", params=KINDS)
def passes(request: pytest.FixtureRequest, stores: dict[str, Store]) -> Passes:
    return Passes(stores[request.param], [COPY], 1)


def one_layer(passes: Passes, count: int = 40) -> tuple[LayerFfn, Inputs, torch.Tensor]:
    """A layer with random inputs, and centres that are not zero."""
    generator = torch.Generator().manual_seed(7)
    own, early, previous = torch.randn(3, count, passes.store.architecture.d_model, generator=generator)
    ffn = passes.layer(1)
    return ffn, Inputs(own, early, previous), 0.1 * torch.randn(ffn.norm.shape, generator=generator)


def naive(ffn: LayerFfn, rows: str, x: np.ndarray) -> np.ndarray:
    """Activations in float64, from the matrices alone."""
    chosen = ffn.rows if rows == "true" else ffn.copies[COPY]
    up = x @ chosen.up.numpy().T.astype(F64)
    up += ffn.up_bias.numpy() if ffn.up_bias.numel() else 0
    if chosen.gate is None:
        return 0.5 * up * (1 + torch.erf(torch.from_numpy(up / np.sqrt(2))).numpy())
    gate = x @ chosen.gate.numpy().T.astype(F64)
    return gate / (1 + np.exp(-gate)) * up


def whole(count: int) -> torch.Tensor:
    found = torch.zeros(count, dtype=torch.bool)
    found[0] = True
    return found


@pytest.mark.parametrize("scored", ["true", "own", "early", "previous"])
@pytest.mark.parametrize("others", ["nothing", "mean", "low"])
@pytest.mark.parametrize("reads", ["all", "down"])
def test_outputs_are_those_of_a_loop(passes: Passes, scored: str, others: str, reads: str) -> None:
    """Neuron by neuron, token by token; the first row has all of them in true rows."""
    ffn, inputs, middle = one_layer(passes, 12)
    share, centred = 0.3, others == "mean"
    variant = Variant("", share, None, scored, centred, others, reads, COPY)  # type: ignore[arg-type]
    output, chosen = ffn.output(variant, 1, inputs, middle, whole(12))
    true, low = (naive(ffn, rows, inputs.own.numpy().astype(F64)) for rows in ("true", "low"))
    source = inputs.of(variant.scored).numpy().astype(F64)
    scored_by = naive(ffn, "true" if scored == "true" else "low", source)
    scores = np.abs(scored_by - (middle.numpy() if centred else 0)) * np.linalg.norm(ffn.rows.down, axis=1)
    for row in range(12):
        best_ones = set(np.argsort(-scores[row])[: round(share * scores.shape[1])])
        expected = np.zeros(output.shape[1]) + (ffn.down_bias.numpy() if ffn.down_bias.numel() else 0)
        for neuron in range(scores.shape[1]):
            if row == 0 or neuron in best_ones:
                a = true if row == 0 or reads == "all" else low
                expected += a[row, neuron] * ffn.rows.down[neuron].numpy()
            elif others == "mean":
                expected += float(middle[neuron]) * ffn.rows.down[neuron].numpy()
            elif others == "low":
                expected += low[row, neuron] * ffn.copies[COPY].down[neuron].numpy()
        assert chosen[row].sum() == (scores.shape[1] if row == 0 else len(best_ones))
        np.testing.assert_allclose(output[row].numpy(), expected, atol=2e-4)


def test_the_centres_bias_is_the_sum_of_skipped_means(passes: Passes) -> None:
    """bias + the chosen ones' distance to their centre, as a ring computes it, is the curve's output."""
    ffn, inputs, middle = one_layer(passes)
    variant = Variant("", 0.2, scored="own", centred=True, others="mean", copy=COPY)
    output, chosen = ffn.output(variant, 1, inputs, middle, whole(40))
    a = ffn.activations(ffn.rows, inputs.own)
    bias = middle @ ffn.rows.down + (ffn.down_bias if ffn.down_bias.numel() else 0)
    torch.testing.assert_close(output, bias + ((a - middle) * chosen) @ ffn.rows.down, atol=1e-4, rtol=1e-4)


def test_all_neurons_are_the_exact_model(passes: Passes, tokens: np.ndarray) -> None:
    """To the bit, whatever the others would have got; and the dense model's logits."""
    every = [
        DENSE,
        Variant("none are low", 1.0, others="low", copy=COPY),
        Variant("none are skipped", 1.0, others="mean", centred=True),
        Variant("above nothing", None, (-np.inf,) * 3, "own", others="low", copy=COPY),
    ]
    with torch.no_grad():
        outputs = passes.run(tokens, every, [torch.ones(256)] * 3)
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
    with DenseModel(passes.store, 1) as dense, torch.no_grad():
        expected = dense.forward(tokens)
    torch.testing.assert_close(passes.logits(outputs[0].flatten(0, 1)), expected.flatten(0, 1))


@pytest.mark.parametrize(("bits", "copy"), [(8, "q8"), (4, "q4")])
def test_copies_are_the_rows_of_a_store_of_so_many_bits(
    stores: dict[str, Store], tmp_path: Path, bits: int, copy: str
) -> None:
    """Down rows too, which lie by output there."""
    store = stores["llama"]
    low = convert(store.path.with_name("llama"), tmp_path / "low", name="low", bits=bits)
    assert low.layout.unit.width == 64
    ours = Passes(store, [copy], 1).layer(1).copies[copy]
    theirs = Passes(low, [], 1).layer(1).rows
    for role in ("gate", "up", "down"):
        assert torch.equal(getattr(ours, role), getattr(theirs, role))
