"""Transformers with Accelerate's disk offload: what does not fit is read from the checkpoint again and again.

The prompt is fed as token 0 repeated: only its length matters to the time of the tokens after it.
"""

from __future__ import annotations

from workers.lab.peers.common import arguments, report


def shares(limit: int, device: str, device_limit: int) -> dict[int | str, int]:
    """What a model may take of each memory, in bytes: less than there is, for all that is not weights."""
    # What the process itself needs, a GPU's driver too, and room for a layer that is loaded while another is.
    process = (1 << 30) if device == "cpu" else (2 << 30)
    host = max(1 << 28, int(0.6 * limit) - process)
    if device == "cpu":
        return {"cpu": host}
    return {0 if device == "cuda" else device: int(0.8 * device_limit), "cpu": host}


def main() -> None:
    given = arguments(__doc__)
    import accelerate
    import torch
    from transformers import AutoModelForCausalLM

    if given.threads:
        torch.set_num_threads(given.threads)
    tokens = [int(word) for word in given.tokens.read_text().split()]
    model = AutoModelForCausalLM.from_pretrained(
        given.checkpoint,
        dtype="auto",
        device_map="auto",
        max_memory=shares(given.limit, given.device, given.device_limit),
        offload_folder=str(given.scratch),
    )
    model.train(False)
    prompt = torch.full((1, given.prompt_tokens), tokens[0], device=given.device)
    with torch.no_grad():
        state = {"cache": model(prompt, use_cache=True).past_key_values}

        def decode(index: int, token: int) -> None:
            inputs = torch.tensor([[token]], device=given.device)
            out = model(inputs, past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values
            out.logits[0, -1].argmax().item()  # the host waits for the device

        report(tokens, decode, accelerate.__version__)


if __name__ == "__main__":
    main()
