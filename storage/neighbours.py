"""What stands beside `tokenizer.json` and changes the ids of a text.

Padding and truncation that were on when the file was saved are of a training, not of the model. Tokens may be
known only to `tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json`, and some are special
only there. transformers adds them when it loads a tokenizer; a store's `tokenizer.json` has them already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from storage.errors import CheckpointError
from storage.json_object import read_json

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
DECODER = "added_tokens_decoder"
# Names under which a token is special; a model may have more of its own, which end in `_token` as well.
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# What a class calls special where no file says so, as far as the vocabulary has it.
_END = ("<|endoftext|>",)
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "GPT2Tokenizer": _END,
    "Qwen2Tokenizer": _END,
    "GPTNeoXTokenizer": _END,
    "CodeGenTokenizer": _END,
    "LlamaTokenizer": ("<unk>", "<s>", "</s>"),
    "GemmaTokenizer": ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>"),
}


def completed(data: bytes, checkpoint: Path) -> bytes:
    """`tokenizer.json` as a plain call of transformers would use it; unchanged where nothing is missing.

    Raises CheckpointError for a file that cannot be read.
    """
    path = checkpoint / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    cut_or_padded = tokenizer.truncation is not None or tokenizer.padding is not None
    before = tokenizer.get_added_tokens_decoder()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.add_tokens(missing(tokenizer, Named.read(checkpoint)))
    after = tokenizer.get_added_tokens_decoder()
    if not cut_or_padded and _described(before) == _described(after):
        return data
    return tokenizer.to_str().encode()


class Named:
    """What the files beside a tokenizer say of single tokens."""

    def __init__(
        self, config: Mapping[str, Any], special: Mapping[str, Any], added: Mapping[str, Any]
    ) -> None:
        """A `tokenizer_config.json` with a table is newer than the other two, which do not count then."""
        self.values = dict(config) if DECODER in config else {**config, **special}
        self._table = config.get(DECODER)
        self._added = added

    @classmethod
    def read(cls, checkpoint: Path) -> Named:
        """Of a checkpoint's directory; what is not there says nothing. Raises CheckpointError."""

        def found(name: str) -> dict[str, Any]:
            return read_json(checkpoint / name) if (checkpoint / name).is_file() else {}

        return cls(found(CONFIG), found(SPECIAL), found(ADDED))

    def special(self) -> Iterator[AddedToken]:
        """Those that are called by a name, such as `eos_token`."""
        for key, value in self.values.items():
            if key in LISTS:
                values = value.values() if isinstance(value, dict) else value
                yield from map(_named, values if isinstance(value, list | dict) else ())
            elif key.endswith("_token") and isinstance(value, str | dict) and content(value):
                yield _named(value)

    def usual(self) -> Iterator[AddedToken]:
        """Those that the tokenizer's class calls special unless told otherwise."""
        name = str(self.values.get("tokenizer_class") or "").removesuffix("Fast")
        return map(_named, DEFAULTS.get(name, ()))

    def numbered(self) -> dict[int, AddedToken]:
        """Those that have a number in the newer table, or else in the older file. Raises CheckpointError."""
        try:
            if self._table is not None:
                return {int(index): _token(entry) for index, entry in self._table.items()}
            special = {token.content for token in self.special()}
            return {
                int(index): AddedToken(text, special=text in special, normalized=text not in special)
                for text, index in self._added.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            where = ADDED if self._table is None else f"{DECODER} of {CONFIG}"
            raise CheckpointError(f"the added tokens ({where}) cannot be read: {error}") from error


def content(token: Any) -> str:
    """A token as these files write it: a string, or an object around one."""
    return str(token.get("content") or "") if isinstance(token, dict) else str(token or "")


def missing(tokenizer: Tokenizer, named: Named) -> list[AddedToken]:
    """What transformers adds, in its order: numbered tokens, then those that are special by a name."""
    known = tokenizer.get_added_tokens_decoder()
    described = set(_described(known).values())
    numbered = [token for _, token in sorted(named.numbered().items()) if repr(token) not in described]
    usual = (token for token in named.usual() if tokenizer.token_to_id(token.content) is not None)
    there = {token.content for token in [*known.values(), *numbered]}
    found = {token.content: token for token in [*usual, *named.special()]}
    return [*numbered, *(token for text, token in found.items() if text and text not in there)]


def _described(tokens: Mapping[int, AddedToken]) -> dict[int, str]:
    return {index: repr(token) for index, token in tokens.items()}


def _token(entry: Any) -> AddedToken:
    """One of the table. Raises TypeError."""
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise TypeError(f"{entry!r:.60} is no token")
    return AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})


def _named(value: Any) -> AddedToken:
    flags = (
        {flag: bool(value[flag]) for flag in FLAGS[:-1] if flag in value} if isinstance(value, dict) else {}
    )
    return AddedToken(content(value), special=True, **{"normalized": False, **flags})
