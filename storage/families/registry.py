"""Which family a checkpoint belongs to. Adding a family: one file, one entry here."""

from __future__ import annotations

from storage.errors import UnsupportedModel
from storage.families.bamboo import BAMBOO
from storage.families.falcon import FALCON, OLD_KINDS
from storage.families.family import Family, Settings
from storage.families.gemma2 import GEMMA2
from storage.families.gemma3 import GEMMA3, GEMMA3_TEXT
from storage.families.gpt_oss import GPT_OSS
from storage.families.granite import GRANITE
from storage.families.granitemoe import GRANITEMOE
from storage.families.llama import LLAMA, SPARSELLAMA
from storage.families.minicpm import MINICPM
from storage.families.mistral import MISTRAL
from storage.families.mixtral import MIXTRAL
from storage.families.olmo2 import OLMO2
from storage.families.olmoe import OLMOE
from storage.families.opt import OPT
from storage.families.phi3 import PHI3
from storage.families.qwen2 import QWEN2
from storage.families.qwen2_moe import QWEN2_MOE
from storage.families.qwen3 import QWEN3
from storage.families.qwen3_moe import QWEN3_MOE
from storage.families.smallthinker import SMALLTHINKER
from storage.families.smollm3 import SMOLLM3

_ALL = (
    OPT,
    FALCON,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA3,
    PHI3,
    SMOLLM3,
    OLMO2,
    OLMOE,
    GRANITE,
    GRANITEMOE,
    GPT_OSS,
    SMALLTHINKER,
    SPARSELLAMA,
    MINICPM,
    BAMBOO,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
ALIASES = dict.fromkeys(OLD_KINDS, FALCON)  # what a model_type was called before


def family_of(config: Settings) -> Family:
    """The family of a `config.json`.

    Raises UnsupportedModel naming the architecture, or the quantisation, and what is supported.
    """
    kind = config.get("model_type")
    supported = ", ".join(FAMILIES)
    known = FAMILIES | ALIASES
    if not isinstance(kind, str) or kind not in known:
        names = config.get("architectures")
        name = names[0] if isinstance(names, list) and names else kind
        raise UnsupportedModel(
            f"model architecture {name} (model_type {kind!r}) is not supported; "
            f"supported model types are {supported}"
        )
    family, quantised = known[kind], config.get("quantization_config")
    if quantised and not (isinstance(quantised, dict) and quantised.get("quant_method") in family.quantised):
        raise UnsupportedModel(
            "quantised checkpoints are not supported; supported are float32, float16 and bfloat16 weights"
        )
    return family
