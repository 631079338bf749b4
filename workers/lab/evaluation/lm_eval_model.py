"""flashring in EleutherAI's harness: this module as a program, with `lm_eval`'s own arguments.

    python -m workers.lab.evaluation.lm_eval_model run --model flashring \\
        --model_args model=opt-6.7b,quality=exact --tasks hellaswag,piqa

The extra `lm-eval` installs the harness. Requests become tokens as the harness's own Hugging Face
model makes them (`TemplateLM`).
"""

from __future__ import annotations

import sys
from typing import Any

from pipeline import ending
from pipeline.console import say
from workers.lab.evaluation.harness import Harness

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    say(f"this needs more packages: pip install -c constraints.txt -e '.[lm-eval]' ({error})")
    sys.exit(2)

# Context and continuation as text, and each as token ids.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("flashring")
class FlashringLM(TemplateLM):  # type: ignore[misc]
    """`model` and `quality` as the main job's options; `settings`: `section.key=value`, with blanks between.

    Batch size and device, which the harness gives every model, mean nothing here.
    """

    def __init__(
        self,
        model: str = "",
        quality: str = "",
        settings: str = "",
        threads: int = 0,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        self.harness = Harness(model, settings.split(), quality, threads)

    @property
    def eot_token_id(self) -> int:
        return self.harness.first_token

    @property
    def tokenizer_name(self) -> str:
        return "flashring"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        return self.harness.encode(string, add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Encoded], **ignored: Any) -> list[tuple[float, bool]]:
        found = self.harness.score([(context, continuation) for _, context, continuation in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        sums = []
        # The prefix token stands for the tokenizer's special ones, so each token is predicted once.
        for (text,) in [request.args for request in requests]:
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                self.harness.longest,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(logprob for logprob, _ in self.harness.score(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = self.harness.write([request.args for request in requests])
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


if __name__ == "__main__":
    sys.exit(ending.exit_status(cli_evaluate))
