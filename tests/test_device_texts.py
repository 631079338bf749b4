"""How many tokens two devices have in common: counting, and one real pair of rings."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from workers.lab.evaluation import devices
from workers.lab.evaluation.devices import Agreement, Difference, Followed, follow

TEXT = [7, 8, 9, 10, 11]
SURE = [-0.1, -0.2, -0.3, -0.4, -0.5]


def other(likes: dict[int, tuple[int, float]], asked: list[tuple[int, ...]]) -> devices.Follow:
    """A device that has TEXT's tokens, but for those at some places, and all of them 0.25 less likely."""

    def write(forced: Sequence[int]) -> tuple[list[int], list[float]]:
        asked.append(tuple(forced))
        found, logprobs = list(forced), [at - 0.25 for at in SURE]
        for place in range(len(forced), len(TEXT)):
            token, logprob = likes.get(place, (TEXT[place], logprobs[place]))
            if found != TEXT[:place]:
                token, logprob = 0, -9.0  # behind another text
            found.append(token)
            logprobs[place] = logprob
        return found, logprobs

    return write


def test_a_device_that_agrees_is_asked_once() -> None:
    asked: list[tuple[int, ...]] = []
    found = follow(TEXT, SURE, other({}, asked))
    assert (found.differences, asked) == ((), [()])
    assert found.noise == pytest.approx([0.25] * 5)


def test_each_difference_has_its_margin_and_is_left_behind() -> None:
    asked: list[tuple[int, ...]] = []
    found = follow(TEXT, SURE, other({1: (3, -0.4), 4: (2, -0.7)}, asked))
    assert [one.at for one in found.differences] == [1, 4]
    assert [one.margin for one in found.differences] == pytest.approx([-0.4 + 0.45, -0.7 + 0.75])
    assert asked == [(), (7, 8), (7, 8, 9, 10, 11)]
    assert found.noise == pytest.approx([0.25] * 5), "of the text's tokens, not of the other ones"


def test_a_near_tie_is_below_the_bound() -> None:
    text = Followed(10, (Difference(2, 0.001), Difference(5, 0.3)), (0.0, 0.002))
    found = Agreement("x", "torch-cpu", 0.02, (text, Followed(10, (), (0.001,))))
    assert (found.tokens, found.equal, found.near) == (20, 18, 1)
    told = found.to_json()
    assert told["largest_margin"] == 0.3
    assert told["noise"] == {"median": 0.001, "largest": 0.002}


@pytest.mark.ring
def test_the_built_in_model_by_torch(monkeypatch: pytest.MonkeyPatch, here: Callable[..., Any]) -> None:
    monkeypatch.setattr(devices, "PROMPT_TOKENS", 12)
    line = ["--prompts", "2", "--tokens", "12", "--json", "--set", "compute.threads=1"]
    done = here(devices.run, *line, "--set", "compute.context=64")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["device"], told["tokens"]) == ("torch-cpu", 24)
    assert told["equal"] + told["near"] == 24
    assert 0 < told["noise"]["largest"] < 1e-3, "these are two devices, of one model"


def test_the_cpu_is_not_compared_with_itself(here: Callable[..., Any]) -> None:
    done = here(devices.run, "--device", "cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--device cpu is what the others are compared with" in done.stderr
