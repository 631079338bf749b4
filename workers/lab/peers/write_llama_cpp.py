"""llama.cpp's greedy continuations of prompts, with how sure it was of each token.

Reads a JSON list of prompts, each a list of token ids, and prints a list of continuations: of every token the
two likeliest as [id, log-probability]. The first of the two is what was written, also where it ends the text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from workers.lab.peers.llama_cpp import LlamaCpp, leave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="GGUF")
    parser.add_argument("prompts", type=Path, help="JSON file")
    parser.add_argument("--tokens", type=int, required=True, help="at most, of each continuation")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    given = parser.parse_args()
    prompts = json.loads(given.prompts.read_text())
    model = LlamaCpp(given.file, max(map(len, prompts)) + given.tokens, given.threads)
    answers = [model.complete(prompt, given.tokens, logprobs=2) for prompt in prompts]
    leave(
        [
            [
                [[one["id"], one["logprob"]] for one in token["top_logprobs"]]
                for token in answer["choices"][0]["logprobs"]["content"]
            ]
            for answer in answers
        ]
    )


if __name__ == "__main__":
    main()
