"""Figures of routing, on cases that a person can count."""

from __future__ import annotations

import pytest
import torch
import typer

from storage.builtin.locality import Prompt, chance, hottest, locality, members, mixture, route, table
from storage.builtin.network import Decoder, Shape
from storage.builtin.siblings import EXPERTS, TOP_K, MixtureOfExperts, settings

SMALL = Shape(d_model=32, d_ff=8 * EXPERTS, layers=4, heads=2, vocabulary=300)


@pytest.fixture
def network() -> MixtureOfExperts:
    torch.manual_seed(5)
    network = MixtureOfExperts(settings("qwen3_moe", SMALL))
    for layer in network.decoder.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)
        torch.nn.init.normal_(layer.mlp.down_proj, std=0.5)  # layers that change what the next router sees
    return network.eval()


def test_reuse_and_popularity_by_hand() -> None:
    """Two experts a token: every second token has the same two, expert 0 is in all."""
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2], [0, 1], [0, 2], [0, 1], [0, 2], [0, 1], [0, 2]])
    used = members(chosen, 20)[None]
    found = locality([Prompt(used, {})], layer=0)
    assert found.reuse == {1: pytest.approx(0.5), 8: pytest.approx(1)}
    assert found.chance == pytest.approx((1 + 0.25 + 0.25) / 2)
    assert found.touched == 3
    assert found.recall == {}
    counts = torch.tensor([10, 5, 5, 0])
    assert [hottest(counts, number) for number in (1, 2, 4)] == pytest.approx([0.5, 0.75, 1])
    assert chance(torch.full((8,), 3), tokens=12) == pytest.approx(2 / 8)  # even use: top_k / experts


def test_a_prompt_has_hot_experts_of_its_own() -> None:
    one = members(torch.arange(8).repeat(4, 1), 32)[None]
    other = members(torch.arange(8, 16).repeat(12, 1), 32)[None]
    found = locality([Prompt(one, {}), Prompt(other, {})], layer=0)
    assert found.hot == {8: 1, 16: 1}
    assert found.overall == {8: 0.75, 16: 1}


def test_recall_is_what_the_router_names_from_an_earlier_input(network: MixtureOfExperts) -> None:
    """Computed again, token by token, from what the layers were given."""
    ids = torch.arange(24) % 7 * 31
    given: list[torch.Tensor] = []
    blocks = [layer.mlp for layer in network.decoder.layers]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(args[0][0].detach()))
    prompt = route(network, ids)
    truth = [(x @ block.gate.weight.T).topk(TOP_K).indices for x, block in zip(given, blocks, strict=True)]
    for layer in range(4):
        found = locality([prompt], layer)
        assert list(found.recall) == [ahead for ahead in (1, 2, 3) if ahead <= layer]
        for ahead, recall in found.recall.items():
            guess = (given[layer - ahead] @ blocks[layer].gate.weight.T).topk(TOP_K).indices
            hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth[layer], guess, strict=True)]
            assert recall == pytest.approx(sum(hits) / (TOP_K * len(ids)))
            assert TOP_K / EXPERTS < recall < 1


def test_layers_that_add_nothing_are_foretold_wholly(network: MixtureOfExperts) -> None:
    for layer in network.decoder.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj)
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    prompt = route(network, torch.arange(24) * 11)
    assert locality([prompt], 3).recall == {1: 1, 2: 1, 3: 1}


def test_the_table_has_a_line_a_layer_and_their_mean(network: MixtureOfExperts) -> None:
    prompt = route(network, torch.arange(24) * 11)
    lines = list(table([locality([prompt], layer) for layer in range(4)]))
    assert len(lines) == 2 + 4 + 1
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| – | – | – |")
    recalls = [float(line.split("|")[-4]) for line in lines[3:6]]
    assert float(lines[6].split("|")[-4]) == pytest.approx(sum(recalls) / 3, abs=0.11)


def test_a_dense_checkpoint_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="no mixture of experts"):
        mixture(Decoder(Shape(d_model=32, d_ff=16, layers=1, heads=2, vocabulary=300)))
