"""The trained mixture: its layer of experts, balance loss, optimiser, training and checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY, make_tokenizer, reference_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from storage.builtin import corpus, train
from storage.builtin.experts import GroupedExperts, Groups, Routing, evenness
from storage.builtin.muon import StackedMuon
from storage.builtin.network import Network, Shape
from storage.builtin.plot import read_log
from storage.builtin.siblings import EXPERTS, TOP_K
from storage.builtin.train import FFN_WIDTH, Architecture, Recipe
from storage.builtin.validate import load

SMALL = Shape(d_model=32, d_ff=8 * EXPERTS, layers=2, heads=4, vocabulary=VOCABULARY)
RECIPE = Recipe(6, 2, warmup_steps=1, adam_rate=0.03, target_share=0.0, tokens=2560)
STORY = "Once upon a time there was a little fox. Every evening the fox counted the stars above the hill. "
PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]


pytestmark = pytest.mark.usefixtures("one_thread")


class Layer(NamedTuple):
    """A small layer in float64: three tokens on two of five experts each, one expert without any."""

    x: Tensor
    weights: Tensor
    chosen: Tensor
    inner: Tensor
    down: Tensor

    def expected(self) -> Tensor:
        """Token by token, as the formula says."""
        rows = []
        for token, weights, chosen in zip(self.x, self.weights, self.chosen, strict=True):
            terms = []
            for weight, expert in zip(weights, chosen, strict=True):
                gate, up = (self.inner[expert] @ token).chunk(2)
                terms.append(weight * (self.down[expert] @ (functional.silu(gate) * up)))
            rows.append(sum(terms))
        return torch.stack(rows)


@pytest.fixture
def layer() -> Layer:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(3)
    chosen = torch.tensor([[4, 1], [1, 0], [2, 4]])
    return Layer(draw(3, 6), draw(3, 2), chosen, draw(5, 8, 6), draw(5, 6, 4))


def test_experts_are_summed_by_weight_and_so_are_their_gradients(layer: Layer) -> None:
    groups = Groups.of(layer.chosen, 5)
    output = GroupedExperts.apply(layer.x, layer.weights, groups, layer.inner, layer.down)
    torch.testing.assert_close(output, layer.expected())
    leaves = (layer.x, layer.weights, layer.inner, layer.down)
    seed = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves, seed)
    for one, other in zip(grads, torch.autograd.grad(layer.expected(), leaves, seed), strict=True):
        torch.testing.assert_close(one, other)
    assert not grads[2][3].any()  # the expert that nobody chose


def test_the_balance_loss_of_a_case_by_hand() -> None:
    """Three experts, two of four choices on the first: 3 × (½ × 0.5 + ¼ × 0.3 + ¼ × 0.2) = 1.125."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]], requires_grad=True)
    routing = Routing(probabilities, torch.tensor([[0, 1], [0, 2]]))
    assert routing.counts().tolist() == [2, 1, 1]
    balance = routing.balance()
    assert balance.item() == pytest.approx(1.125)
    (grad,) = torch.autograd.grad(balance, probabilities)
    assert grad.tolist() == [pytest.approx([0.75, 0.375, 0.375])] * 2  # experts × share / tokens
    even = Routing(torch.full((6, 3), 1 / 3), torch.tensor([[0], [1], [2]] * 2))
    assert even.balance().item() == pytest.approx(1)


def test_evenness_is_the_entropy_of_use_over_its_most() -> None:
    counts = torch.tensor([[5, 5, 5, 5], [10, 10, 0, 0], [20, 0, 0, 0]])
    assert evenness(counts).tolist() == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8)])
def test_a_stack_learns_as_its_matrices_would_one_by_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(1)
    stack = torch.nn.Parameter(torch.randn(shape))
    singles = [torch.nn.Parameter(one.detach().clone()) for one in stack]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
    ours, theirs = StackedMuon([stack], **options), torch.optim.Muon(singles, **options)
    before = stack.detach().clone()
    for _ in range(3):
        stack.grad = torch.randn(shape)
        for single, grad in zip(singles, stack.grad, strict=True):
            single.grad = grad.clone()
        ours.step()
        theirs.step()
    moved = (stack - before).abs().mean().item()
    assert moved > 0.005
    # bfloat16 inside: products of a batch round otherwise than single ones
    torch.testing.assert_close(stack, torch.stack(singles), rtol=0, atol=moved / 20)


def trained(recipe: Recipe, run: Path, save_every: int = 100, workers: int = 1) -> Network:
    """A small mixture trained on one story, from `run`'s last checkpoint if it has one."""
    stream = np.array(make_tokenizer().encode(STORY * 60).ids, np.uint16)
    mixture = corpus.Mixture(dict.fromkeys(corpus.SOURCES, stream))
    held_out = torch.from_numpy(stream[:129].astype(np.int64))[None]
    torch.manual_seed(recipe.seed)
    network = train.build(Architecture.QWEN3_MOE, SMALL)
    train.train(network, mixture, held_out, recipe, run, save_every, workers)
    return network


class Trained(NamedTuple):
    network: Network
    run: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoint"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run = tmp_path_factory.mktemp("whole")
    network = trained(RECIPE, run)
    train.write_checkpoint(network, make_tokenizer(), run / "checkpoint")
    return Trained(network, run)


def test_the_loss_falls_and_the_log_tells_of_the_experts(whole: Trained) -> None:
    records = read_log(whole.run / "log.jsonl")
    assert len(records) == RECIPE.steps
    assert records[0]["loss"] == pytest.approx(np.log(VOCABULARY), abs=0.1)  # nothing known yet
    assert records[-1]["valid"] < 4.5
    for record in records:
        assert len(record["balance"]) == len(record["evenness"]) == SMALL.layers
        assert 0.4 < min(record["evenness"]) <= max(record["evenness"]) <= 1


def test_the_balance_loss_makes_use_more_even(whole: Trained, tmp_path: Path) -> None:
    trained(Recipe(**{**vars(RECIPE), "balance": 1.0}), tmp_path)
    weighed, hardly = (read_log(run / "log.jsonl")[-1] for run in (tmp_path, whole.run))
    assert np.mean(weighed["balance"]) < np.mean(hardly["balance"])


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(
    whole: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its sixth step, two after the state that was saved."""
    batch = corpus.Mixture.batch

    def killed(self: corpus.Mixture, step: int, *rest: object) -> object:
        if step == 5:
            raise KeyboardInterrupt
        return batch(self, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(corpus.Mixture, "batch", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(RECIPE, tmp_path, save_every=3)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4]
    resumed = trained(RECIPE, tmp_path, save_every=3)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == list(range(RECIPE.steps))
    for (name, one), other in zip(whole.network.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_two_workers_train_as_one_does(whole: Trained, tmp_path: Path) -> None:
    """A step has two passes, and a sum of two has no order."""
    shared = trained(RECIPE, tmp_path, workers=2)
    for (name, one), other in zip(whole.network.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(one, other), name


@torch.no_grad()
def test_it_computes_what_transformers_makes_of_the_checkpoint(whole: Trained) -> None:
    """And every tensor of the checkpoint is in 16 bits, an expert's matrices by themselves, none missing."""
    from transformers import AutoModelForCausalLM

    stored, said = AutoModelForCausalLM.from_pretrained(whole.checkpoint, output_loading_info=True)
    config = json.loads((whole.checkpoint / "config.json").read_text(encoding="utf-8"))
    assert [type(stored).__name__] == config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    tensors = load_file(whole.checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.layers.1.mlp.experts.31.down_proj.weight"].shape == (SMALL.d_model, 8)
    ids = torch.tensor([PROMPT])
    expected = reference_model(whole.checkpoint)(ids).logits
    network = load(whole.checkpoint)
    hidden, _ = network(ids)
    assert expected.std() > 1
    assert (hidden @ network.head.T - expected).abs().max() < 1e-4
    assert [routing.chosen.shape for routing in network.routings()] == [(len(PROMPT), TOP_K)] * SMALL.layers
    for one, other in zip(network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(one, other.to(torch.bfloat16).float())


def test_at_full_size_it_fits_into_twelve_megabytes_at_four_bits() -> None:
    """Experts in 5 bits with their scales, the rest in 8.5; trained in float32."""
    shape = Shape(d_ff=FFN_WIDTH[Architecture.QWEN3_MOE] * Shape().d_model)
    network = train.build(Architecture.QWEN3_MOE, shape)
    parameters = dict(network.named_parameters())
    experts = sum(parameter.numel() for parameter in parameters.values() if parameter.ndim == 3)
    rest = sum(parameter.numel() for parameter in parameters.values()) - experts
    assert experts == 8 * 32 * 3 * 256 * 64
    assert (experts * 5 + rest * 8.5) / 8 < 11e6
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
