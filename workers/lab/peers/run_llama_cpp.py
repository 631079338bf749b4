"""llama.cpp on a GGUF file: what memory holds is read once, the rest is mapped and read again and again.

The prompt is the given tokens, repeated to its length. After it come as many tokens as are given, but
llama.cpp's own greedy ones: in a model without experts all tokens take the same. With experts a random model
that repeats one token would need the same few again and again: there the tokens are `--forced`. Each is the
end of a prompt whose beginning is kept, so that it is one step of one token.
"""

from __future__ import annotations

from itertools import cycle, islice, pairwise
from typing import Any

from workers.lab.peers.common import arguments, measured, read_bytes
from workers.lab.peers.llama_cpp import LlamaCpp, leave


def main() -> None:
    given = arguments(
        __doc__,
        forced="the file's tokens are the prompt's and then those to decode",
        direct="read the file past the page cache instead of mapping it",
    )
    tokens = [int(word) for word in given.tokens.read_text().split()]
    if given.forced:
        model = LlamaCpp(given.checkpoint, len(tokens) + 1, given.threads, given.limit, given.direct)
        leave(forced(model, tokens, given.prompt_tokens))
    prompt = list(islice(cycle(tokens), given.prompt_tokens))
    context = len(prompt) + len(tokens)
    model = LlamaCpp(given.checkpoint, context, given.threads, given.limit, given.direct)
    parts: list[tuple[dict[str, float], int]] = []

    def note(part: dict[str, Any]) -> None:
        parts.append((part["timings"], read_bytes()))

    model.complete(prompt, len(tokens), note, ignore_eos=True, timings_per_token=True)
    result = measured(token_seconds(parts), (parts[-1][1] - parts[0][1]) / (len(tokens) - 1), model.version)
    timings = parts[0][0]
    leave({**result, "prompt_tokens": timings["prompt_n"], "prompt_seconds": 1e-3 * timings["prompt_ms"]})


def forced(model: LlamaCpp, tokens: list[int], prompt_tokens: int) -> dict[str, Any]:
    """Each token after the prompt in a step of its own. Raises RuntimeError where it was none."""
    seconds, start = [], 0
    timings: list[dict[str, float]] = []
    for end in range(prompt_tokens, len(tokens) + 1):
        timings.append(model.complete(tokens[:end], 1, cache_prompt=True)["timings"])
        if end == prompt_tokens:
            start = read_bytes()
            continue
        if timings[-1]["prompt_n"] != 1:
            raise RuntimeError(f"llama.cpp computed {timings[-1]['prompt_n']} tokens again")
        seconds.append(1e-3 * timings[-1]["prompt_ms"])
    result = measured(seconds, (read_bytes() - start) / max(1, len(seconds)), model.version)
    first = timings[0]
    return {**result, "prompt_tokens": first["prompt_n"], "prompt_seconds": 1e-3 * first["prompt_ms"]}


def token_seconds(parts: list[tuple[dict[str, float], int]]) -> list[float]:
    """Of every token but the first, which the prompt brings; a part has those since the part before.

    Text that makes no whole character until its end comes as one part: then the mean stands for each.
    """
    if len(parts) == 1:
        ((only, _),) = parts
        count = int(only["predicted_n"])
        return [1e-3 * only["predicted_ms"] / count] * (count - 1)
    seconds = []
    for (before, _), (after, _) in pairwise(parts):
        if count := int(after["predicted_n"] - before["predicted_n"]):
            seconds += [1e-3 * (after["predicted_ms"] - before["predicted_ms"]) / count] * count
    return seconds


if __name__ == "__main__":
    main()
