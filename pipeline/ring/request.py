"""What is asked of a ring: a prompt and how to decode, checked once, against the model and the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from pipeline.errors import ContextExceeded
from pipeline.ring.generation import GenerationParams
from pipeline.ring.plan import Plan
from storage.errors import UsageError
from storage.store import Store


@dataclass(frozen=True, slots=True)
class Request:
    """One that the ring can answer; made by `of`."""

    ids: tuple[int, ...]  # of the prompt
    params: GenerationParams

    @classmethod
    def of(
        cls,
        prompt: str | Sequence[int],
        params: GenerationParams,
        tokenizer: Tokenizer,
        store: Store,
        plan: Plan,
    ) -> Request:
        """Raises UsageError for what is out of range, empty, or more than the model or the plan can hold."""
        params.check()
        if not prompt:
            raise UsageError("the prompt is empty")
        ids = tuple(_encode(prompt, tokenizer) if isinstance(prompt, str) else prompt)
        if not ids:
            raise UsageError("the prompt is empty")
        _check_vocabulary("the prompt holds", ids, store)
        if len(ids) >= plan.context:
            raise ContextExceeded(
                f"the prompt has {len(ids):,} tokens, and the context of {plan.context:,} "
                "must also hold at least one new token; see --context"
            )
        _check_vocabulary("the tokens to decode hold", params.forced, store)
        if params.grammar is not None and not store.architecture.eos_tokens:
            raise UsageError(f"{store.manifest.name} has no end token, which an answer of a given form needs")
        return cls(ids, params)


def _encode(prompt: str, tokenizer: Tokenizer) -> list[int]:
    try:
        # Bytes of the command line that the locale could not read are surrogates.
        prompt = prompt.encode(errors="surrogateescape").decode()
    except UnicodeError:
        raise UsageError("the prompt is not valid UTF-8") from None
    return list(tokenizer.encode(prompt).ids)


def _check_vocabulary(whose: str, ids: Sequence[int], store: Store) -> None:
    vocabulary = store.architecture.vocabulary
    bad = next((one for one in ids if not 0 <= one < vocabulary), None)
    if bad is not None:
        raise UsageError(f"{whose} token id {bad}, and the model's vocabulary has {vocabulary:,}")
