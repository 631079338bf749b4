"""A prompt that begins like the last request is not prefilled again, and means the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from ring import config, plan_for

from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.convert import convert

pytestmark = pytest.mark.ring

PROMPT = [2, 17, 40, 9, 77, 31, 60, 5]
PARAMS = GenerationParams(max_new_tokens=6, ignore_eos=True)


def decode(session: Session, prompt: list[int]) -> tuple[list[int], list[float]]:
    for _ in session.generate(prompt, PARAMS):
        pass
    assert session.last is not None
    return session.last.tokens, session.last.logprobs


@pytest.mark.parametrize("variant", ["opt", "falcon-relu", "falcon-rw"])
def test_a_turn_reuses_what_the_last_one_left(tmp_path: Path, variant: str):
    store = convert(
        write_checkpoint(tmp_path / "checkpoint", variant, "float32"), tmp_path / "store", name="x"
    )
    chosen = config(predictor={"kind": "all", "refine": False})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        answer, _ = decode(session, PROMPT)
        turn = [*PROMPT, *answer, 11, 12, 13]
        fresh_tokens, fresh_logprobs = decode(session, turn)
        assert session.last is not None
        assert session.last.cached == 0
        decode(session, PROMPT)
        session.reuse_prefix = True
        tokens, logprobs = decode(session, turn)
        assert session.last.cached == len(PROMPT) + len(answer) - 1
        assert tokens == fresh_tokens
        np.testing.assert_allclose(logprobs, fresh_logprobs, atol=1e-3)
        decode(session, turn)
        assert session.last.cached == len(turn) - 1  # something is left to compute
        decode(session, [2, 99, *turn])
        assert session.last.cached == 1


def test_a_cancelled_prefill_leaves_nothing_to_reuse(tmp_path: Path):
    store = convert(write_checkpoint(tmp_path / "checkpoint", "opt", "float32"), tmp_path / "store", name="x")
    chosen = config(predictor={"kind": "all", "refine": False})
    with Session(store, chosen, plan_for(store, chosen)) as session:
        session.reuse_prefix = True
        wanted = decode(session, PROMPT)
        assert list(session.pieces([2, 3, 4], PARAMS, cancelled=lambda: True)) == []
        assert decode(session, PROMPT) == wanted
        assert session.last is not None
        assert session.last.cached == 0
