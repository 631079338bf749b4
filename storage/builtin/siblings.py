"""The built-in model's siblings: decoders of other families, trained by its recipe.

`qwen3` is a gated SiLU network of Llama's block with a norm of each query and key head; `falcon` is a GELU
network of Falcon's parallel block; `qwen3_moe` is the first with experts in the place of each FFN. All have
two query heads a key-value head, rotary positions, no biases and a tied head. No activation is penalised, so
that transformers' own classes train them, but for the experts: transformers is needed here, and at no other
place of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storage.builtin.experts import Experts, Routing, stack, unstack
from storage.builtin.network import Network, Shape, initialise

EXPERTS, TOP_K = 32, 4  # of a layer of `qwen3_moe`; each expert has its share of the FFN's width

# What transformers' classes with a head call their decoder; projections that add to the residual stream.
DECODER = {"qwen3": "model", "qwen3_moe": "model", "falcon": "transformer"}
RESIDUAL = {
    "qwen3": ("o_proj.weight", "down_proj.weight"),
    "qwen3_moe": ("o_proj.weight", "down_proj"),
    "falcon": ("dense.weight", "dense_4h_to_h.weight"),
}


def settings(family: str, shape: Shape) -> dict[str, Any]:
    """The `config.json` of one sibling."""
    return {
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions,
        "vocab_size": shape.vocabulary,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
    } | {"qwen3": _qwen3, "qwen3_moe": _qwen3_moe, "falcon": _falcon}[family](shape)


def _qwen3(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": shape.d_ff,
        "num_key_value_heads": max(1, shape.heads // 2),
        "head_dim": shape.d_model // shape.heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
    }


def _qwen3_moe(shape: Shape) -> dict[str, Any]:
    return _qwen3(shape) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": shape.d_ff // EXPERTS,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _falcon(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "ffn_hidden_size": shape.d_ff,
        "num_kv_heads": max(1, shape.heads // 2),
        "activation": "gelu",
        "alibi": False,
        "bias": False,
        "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-5,
        "multi_query": False,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "parallel_attn": True,
    }


class Sibling(Network):
    """The decoder that transformers makes of a `config.json`; parameters have their names in a checkpoint."""

    prefix = ""
    steered = d_ff = 0
    dtype = torch.bfloat16

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers import AutoConfig, AutoModel

        super().__init__()
        self.config = dict(config)
        family = config["model_type"]
        decoder = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        self.add_module(DECODER[family], decoder)
        self.train()
        initialise(self, config["num_hidden_layers"], RESIDUAL[family])

    @property
    def decoder(self) -> Any:
        """transformers' module."""
        return self.get_submodule(DECODER[self.config["model_type"]])

    @property
    def head(self) -> Tensor:
        weight: Tensor = self.decoder.get_input_embeddings().weight
        return weight

    def forward(self, ids: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Normed hidden states `[rows, length, d_model]`; no activations, since none are steered."""
        return self.decoder(input_ids=ids, use_cache=False).last_hidden_state, []


class MixtureOfExperts(Sibling):
    """`qwen3_moe`: transformers' decoder with our experts in it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        for layer in self.decoder.layers:
            layer.mlp = Experts(config)
        initialise(self, config["num_hidden_layers"], RESIDUAL[config["model_type"]])

    def routings(self) -> list[Routing]:
        return [layer.mlp.routing for layer in self.decoder.layers]

    def tensors(self) -> dict[str, Tensor]:
        return dict(unstack(super().tensors()))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        super().load(stack(tensors))


def sibling(config: Mapping[str, Any]) -> Sibling:
    """The network of one `config.json`, its parameters drawn."""
    return MixtureOfExperts(config) if config["model_type"] == "qwen3_moe" else Sibling(config)
