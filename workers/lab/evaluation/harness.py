"""A model as evaluation harnesses ask it: continuations are scored, texts are written.

Knows no harness; `lm_eval_model.py` gives it to EleutherAI's. Scores apply each token's predicted
neurons (`offline/scoring.py`); texts come from a ring of the same configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch

from pipeline.cores import thread_count
from pipeline.models.names import configure
from pipeline.planner.divide import plan
from pipeline.quality import check_word
from pipeline.ring.generation import GenerationParams
from pipeline.ring.sampling import Sampling
from pipeline.ring.session import Session
from pipeline.serving.stopping import StopStrings
from storage.errors import UsageError
from storage.tokenizer import load_tokenizer
from workers.lab.evaluation.evaluate import continuations
from workers.lab.offline.chooser import make_chooser
from workers.lab.offline.dense import DenseModel

NEW_TOKENS = 256  # of a text, where the harness does not say
# Several names have been in use for one thing.
NEW_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Harness:
    """One model and one configuration; `quality` exact is the dense model. Use as a context manager."""

    def __init__(self, model: str = "", settings: Sequence[str] = (), quality: str = "", threads: int = 0):
        """`settings`: `section.key=value`, as `--set`. Raises what the main job's start raises."""
        chosen = {"predictor": {"quality": check_word(quality) or None}}
        source, config = configure(model, None, settings, chosen)
        self._store = source.open_store()
        self._config = config
        self._chooser = make_chooser(self._store, self._config)
        self._dense = DenseModel(self._store, thread_count(threads))
        self._tokenizer = load_tokenizer(self._store)

    @property
    def longest(self) -> int:
        """Tokens of input that the model takes."""
        return self._store.architecture.max_positions

    @property
    def first_token(self) -> int:
        """What stands before a text without context."""
        architecture = self._store.architecture
        first = (architecture.bos_token, *architecture.eos_tokens)
        return next((token for token in first if token is not None), 0)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids, by default with the special tokens that the model's tokenizer adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=special is not False).ids)

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As `evaluate.continuations`."""
        with torch.no_grad():
            return continuations(self._dense, self._chooser, pairs)

    def write(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Texts that follow the contexts, each under its own keywords (`params`), without the stop."""
        report = plan(self._store, self._config)
        with Session(self._store, report.config, report.plan) as session:
            return [self._text(session, context, keywords) for context, keywords in requests]

    def _text(self, session: Session, context: str, keywords: Mapping[str, Any]) -> str:
        wanted, stops = params(keywords)
        room = session.plan.context - wanted.max_new_tokens
        if room < 1:
            raise UsageError(
                f"{wanted.max_new_tokens} new tokens do not fit the context of {session.plan.context}"
            )
        text, stop = "", StopStrings(stops)
        prompt = self.encode(context)[-room:] or [self.first_token]
        with closing(session.pieces(prompt, wanted)) as pieces:  # closing cancels what still runs
            for piece in pieces:
                text += stop.push(piece.text)
                if stop.found:
                    break
        return text + stop.finish()

    def close(self) -> None:
        self._dense.close()

    def __enter__(self) -> Harness:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def params(keywords: Mapping[str, Any]) -> tuple[GenerationParams, tuple[str, ...]]:
    """How to decode, and the stop strings, from a harness's keywords; greedy unless they say `do_sample`."""
    until = keywords.get("until") or ()
    length = next((keywords[key] for key in NEW_TOKENS_KEYS if keywords.get(key)), NEW_TOKENS)
    sampled = bool(keywords.get("do_sample", keywords.get("temperature")))
    temperature = float(keywords.get("temperature") or 1.0) if sampled else 0.0
    found = GenerationParams(
        int(length),
        Sampling(
            temperature=temperature,
            top_k=int(keywords.get("top_k") or 0),
            top_p=float(keywords.get("top_p") or 1.0),
        ),
    )
    return found, (until,) if isinstance(until, str) else tuple(until)
