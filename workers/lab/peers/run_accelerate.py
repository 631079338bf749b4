"""Transformers with Accelerate's disk offload: what does not fit is read from the checkpoint again and again.

The prompt is fed as token 0 repeated: only its length matters to the time of the tokens after it.
"""

from __future__ import annotations

from workers.lab.peers.common import arguments, report


def main() -> None:
    given = arguments(__doc__)
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM

    if given.threads:
        torch.set_num_threads(given.threads)
    tokens = [int(word) for word in given.tokens.read_text().split()]
    # What the process itself needs, and room for a layer that is loaded while another still is.
    room = max(1 << 28, int(0.6 * given.limit) - (1 << 30))
    model = AutoModelForCausalLM.from_pretrained(
        given.checkpoint,
        dtype="auto",
        device_map="auto",
        max_memory={"cpu": room},
        offload_folder=str(given.scratch),
    )
    model.train(False)
    prompt = torch.full((1, given.prompt_tokens), tokens[0])
    with torch.no_grad():
        state = {"cache": model(prompt, use_cache=True).past_key_values}

        def decode(index: int, token: int) -> None:
            out = model(torch.tensor([[token]]), past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values

        report(tokens, decode, accelerate.__version__)


if __name__ == "__main__":
    main()
