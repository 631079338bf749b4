"""The built-in model's network for training is the OPT of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import reference_model
from safetensors.torch import load_file

from storage.builtin.network import Decoder, Shape

BUILTIN = Path(__file__).resolve().parent.parent / "storage" / "builtin"
SMALL = Shape(d_model=48, d_ff=96, layers=3, heads=4, vocabulary=64, positions=40)
PREFIX = "model.decoder."


def random_network(seed: int) -> Decoder:
    """Every parameter random and non-trivial; norms' weights around 1."""
    network = Decoder(SMALL)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data.copy_(noise * 0.3 + (1 if is_scale else 0))
    return network


def transformers_model(network: Decoder, shape: Shape) -> torch.nn.Module:
    """OPTForCausalLM of the shape's own config.json, with the network's weights, and only those."""
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(OPTConfig.from_dict(shape.huggingface())).float().eval()
    weights = {PREFIX + name: tensor for name, tensor in network.state_dict().items()}
    absent, unknown = model.load_state_dict(weights, strict=False)
    assert (absent, unknown) == (["lm_head.weight"], [])  # which is the embedding
    return model


@torch.no_grad()
def logits(network: Decoder, ids: torch.Tensor) -> torch.Tensor:
    hidden, _ = network(ids)
    return hidden @ network.embed_tokens.weight.T


@torch.no_grad()
def test_random_weights_give_the_logits_of_transformers() -> None:
    network = random_network(0)
    ids = torch.randint(SMALL.vocabulary, (2, SMALL.positions), generator=torch.Generator().manual_seed(1))
    expected = transformers_model(network, SMALL)(ids).logits
    found = logits(network, ids)
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


@torch.no_grad()
def test_the_shipped_weights_give_the_logits_of_transformers() -> None:
    network = Decoder(Shape())
    stored = load_file(BUILTIN / "model.safetensors")
    network.load_state_dict({name.removeprefix(PREFIX): tensor.float() for name, tensor in stored.items()})
    ids = torch.randint(Shape().vocabulary, (1, 64), generator=torch.Generator().manual_seed(1))
    expected = reference_model(BUILTIN)(ids).logits
    torch.testing.assert_close(logits(network, ids), expected, rtol=1e-5, atol=1e-5 * float(expected.std()))


def test_the_shape_is_the_one_that_is_shipped() -> None:
    assert Shape().huggingface() == json.loads((BUILTIN / "config.json").read_text(encoding="utf-8"))


def gradients(network: Decoder) -> dict[str, torch.Tensor]:
    """A copy of those that there are."""
    named = ((name, parameter.grad) for name, parameter in network.named_parameters())
    return {name: grad.clone() for name, grad in named if grad is not None}


def test_the_penalty_is_the_gradient_of_the_activations_mean() -> None:
    """A slope per layer equals the gradient of slope · (sum of activations), added to the loss."""
    network = random_network(2)
    ids = torch.arange(24).reshape(2, 12)
    slopes = torch.tensor([0.1, 0.0, 0.3])

    hidden, _ = network(ids, slopes)
    hidden.sum().backward()
    found = gradients(network)
    network.zero_grad()

    kept: list[torch.Tensor] = []
    for layer in network.layers:
        layer.fc2.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    hidden, _ = network(ids)
    loss = hidden.sum() + sum(slope * active.sum() for slope, active in zip(slopes, kept, strict=True))
    loss.backward()
    assert len(kept) == SMALL.layers
    torch.testing.assert_close(found, gradients(network), rtol=1e-4, atol=1e-4)


def test_the_head_in_chunks_is_cross_entropy() -> None:
    """In bfloat16, so within its precision; the loss of 600 targets takes two chunks."""
    network = random_network(3)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 600, SMALL.d_model, generator=generator, requires_grad=True)
    targets = torch.randint(SMALL.vocabulary, (1, 600), generator=generator)
    loss = network.loss(hidden, targets)
    loss.backward()
    found, hidden.grad = hidden.grad, None
    expected = torch.nn.functional.cross_entropy(
        (hidden @ network.embed_tokens.weight.T)[0], targets[0], reduction="sum"
    )
    expected.backward()
    assert found is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    torch.testing.assert_close(found, hidden.grad, rtol=0.05, atol=1e-2)
