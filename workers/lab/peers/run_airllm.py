"""AirLLM: every layer is loaded from its own file for every token. It has no KV cache on the way.

Only architectures that the installed AirLLM knows can be run; it refuses the others by itself.
"""

from __future__ import annotations

from workers.lab.peers.common import arguments, report


def main() -> None:
    given = arguments(__doc__)
    from importlib.metadata import version

    import torch
    from airllm import AutoModel

    if given.threads:
        torch.set_num_threads(given.threads)
    tokens = [int(word) for word in given.tokens.read_text().split()]
    model = AutoModel.from_pretrained(
        str(given.checkpoint), device="cpu", layer_shards_saving_path=str(given.scratch)
    )
    prompt = [tokens[0]] * given.prompt_tokens

    def decode(index: int, token: int) -> None:
        prompt.append(token)
        model.generate(torch.tensor([prompt]), max_new_tokens=1, use_cache=False)

    report(tokens, decode, version("airllm"))


if __name__ == "__main__":
    main()
