"""Families: what configs mean, and that stores hold the model that transformers runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from checkpoints import DTYPES, VARIANTS, reference_model, write_checkpoint
from safetensors.numpy import load_file, save_file

from storage.architecture import Architecture, LinearScaling, Llama3Scaling, Rope
from storage.convert import convert
from storage.errors import UnsupportedModel
from storage.families.registry import FAMILIES, family_of

PROMPT = [2, *(5 + (17 * i) % 250 for i in range(40))]
FALCON_7B: dict[str, Any] = {  # as tiiuae/falcon-7b's config.json has it
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_store_holds_the_model_that_transformers_runs(tmp_path: Path, variant: str) -> None:
    store = convert(write_checkpoint(tmp_path / "model", variant), tmp_path / "store", name=variant)
    with torch.no_grad():
        expected = reference_model(tmp_path / "model")(torch.tensor([PROMPT])).logits[0].double()
    assert expected.std() >= 1
    assert (dense.logits(store, PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["opt-post-norm", "falcon-40b"])
def test_every_dtype_is_kept(tmp_path: Path, variant: str, dtype: str) -> None:
    store = convert(write_checkpoint(tmp_path / "model", variant, dtype), tmp_path / "store", name=variant)
    assert {row.codec for layer in store.layout.layers for row in layer.unit.rows} == {dtype}
    with torch.no_grad():
        expected = reference_model(tmp_path / "model")(torch.tensor([PROMPT])).logits[0].double()
    assert (dense.logits(store, PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("prefix", ["decoder.", ""])
def test_opt_under_its_older_names(tmp_path: Path, prefix: str) -> None:
    model = write_checkpoint(tmp_path / "model", "opt")
    usual = convert(model, tmp_path / "usual", name="opt")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.replace("model.decoder.", prefix): value for name, value in tensors.items()},
        model / "model.safetensors",
    )
    assert convert(model, tmp_path / "older", name="opt").manifest.files == usual.manifest.files


def test_falcon_without_its_prefix(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "falcon-7b")
    usual = convert(model, tmp_path / "usual", name="falcon")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): value for name, value in tensors.items()},
        model / "model.safetensors",
    )
    assert convert(model, tmp_path / "bare", name="falcon").manifest.files == usual.manifest.files


def test_tensors_decide_whether_the_head_is_tied(tmp_path: Path) -> None:
    """A tied config with an equal head, and an untied config with an equal head, store it once."""
    model = write_checkpoint(tmp_path / "model", "opt")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].copy()
    save_file(tensors, model / "model.safetensors")
    assert convert(model, tmp_path / "equal", name="opt").architecture.tied_head
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, model / "model.safetensors")
    untied = convert(model, tmp_path / "unequal", name="opt")
    assert not untied.architecture.tied_head
    assert (load_file(untied.path / "resident.safetensors")["head.weight"] == tensors["lm_head.weight"]).all()


def test_stop_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "opt")
    assert convert(model, tmp_path / "one", name="opt").architecture.eos_tokens == (2,)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert convert(model, tmp_path / "two", name="opt").architecture.eos_tokens == (2, 7)


OLD_7B: dict[str, Any] = {  # as tiiuae/falcon-7b's config.json had it in 2023
    "model_type": "RefinedWebModel",
    "architectures": ["RWForCausalLM"],
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
OLD_40B = {  # as tiiuae/falcon-40b's
    **{key: value for key, value in OLD_7B.items() if key != "multi_query"},
    "model_type": "RefinedWeb",
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
}


def test_the_falcons_of_2023() -> None:
    old = family_of(OLD_7B).architecture(OLD_7B)
    assert old == family_of(FALCON_7B).architecture(FALCON_7B)
    new = {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "hidden_size": 8192,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "num_hidden_layers": 60,
    }
    assert family_of(OLD_40B).architecture(OLD_40B) == family_of(new).architecture(new)


@pytest.mark.parametrize("variant", ["falcon-7b", "falcon-rw", "falcon-40b"])
def test_a_checkpoint_of_2023_makes_the_store_of_today(variant: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", variant)
    today = convert(model, tmp_path / "today", name="falcon")
    config = json.loads((model / "config.json").read_text())
    old = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    grouped = config.pop("new_decoder_architecture", False)
    if grouped:
        old["num_kv_heads"] = "n_head_kv"
    config = {old.get(key, key): value for key, value in config.items()}
    config["model_type"] = "RefinedWeb" if grouped or variant == "falcon-rw" else "RefinedWebModel"
    (model / "config.json").write_text(json.dumps(config))
    then = convert(model, tmp_path / "then", name="falcon")
    assert then.manifest.files == today.manifest.files
    assert then.architecture == today.architecture


def test_falcon_7b() -> None:
    model = family_of(FALCON_7B).architecture(FALCON_7B)
    layer, attention = model.layers[0], model.layers[0].attention
    assert (layer.parallel, attention.alibi, set(layer.norms)) == (True, False, {"attention_input"})
    assert (attention.heads, attention.kv_heads, attention.head_dim, layer.ffn.neurons) == (71, 1, 64, 18176)
    assert (layer.ffn.activation, model.tied_head, attention.rope) == ("gelu", True, Rope(10000.0))
    assert model.layers == (layer,) * 32
    assert (model.max_positions, model.eos_tokens) == (2048, (11,))


@pytest.mark.parametrize(
    "place",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}],
)
def test_rotary_base_in_both_places(place: dict[str, Any]) -> None:
    config = {**FALCON_7B, **place, "rope_scaling": None}
    assert family_of(config).architecture(config).layers[0].attention.rope == Rope(5e5)


def test_opt_350m() -> None:
    config = {
        "model_type": "opt",
        "hidden_size": 1024,
        "word_embed_proj_dim": 512,
        "ffn_dim": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "do_layer_norm_before": False,
    }
    family = family_of(config)
    model = family.architecture(config)
    assert (set(model.layers[0].norms), model.layers[0].parallel) == ({"attention_sum", "ffn_sum"}, False)
    assert (model.final_norm, model.embed_dim) == (None, 512)
    names = [item.name for item in family.resident(config, model)]
    assert "project_in.weight" in names
    assert not any(name.startswith(("final_norm", "head")) for name in names)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, ["BloomForCausalLM", "opt, falcon"]),
        ({"model_type": None}, ["None", "opt, falcon"]),
        ({"activation": "silu"}, ["silu", "relu", "gelu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised", "bfloat16"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear", "default"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["yarn", "default"]),
        ({"new_decoder_architecture": True, "parallel_attn": False}, ["parallel_attn false"]),
        ({"num_ln_in_parallel_attn": 2}, ["num_ln_in_parallel_attn 2"]),
        ({"multi_query": False, "num_kv_heads": 1}, ["num_kv_heads 1"]),
        ({"new_decoder_architecture": True, "num_kv_heads": 8}, ["num_kv_heads 8"]),
        ({"hidden_size": 4545}, ["hidden_size 4545", "71"]),
        ({"num_hidden_layers": "32"}, ["num_hidden_layers", "'32'"]),
        ({"bias": "yes"}, ["bias", "'yes'"]),
        ({"eos_token_id": [-1]}, ["eos_token_id"]),
        ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon"]),
    ],
)
def test_what_is_not_supported_is_named(settings: dict[str, Any], words: list[str]) -> None:
    config = {**FALCON_7B, **settings}

    def read() -> None:
        family = family_of(config)
        family.resident(config, family.architecture(config))

    with pytest.raises(UnsupportedModel) as raised:
        read()
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("kind", FAMILIES)
def test_more_layers_than_any_model_has_are_refused_at_once(kind: str) -> None:
    """A description of a thousand million layers would take all of the memory."""
    sizes = {
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 10**9,
        "shared_expert_intermediate_size": 128,
        "sliding_window": 128,
        "vocab_size": 99,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    config = {"model_type": kind, **sizes, "text_config": {"model_type": "gemma3_text", **sizes}}
    with pytest.raises(UnsupportedModel, match="num_hidden_layers must be at most 4,096, not 1,000,000,000"):
        family_of(config).architecture(config)


LLAMA_3: dict[str, Any] = {  # as meta-llama/Llama-3.2-1B's config.json has it
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GEMMA_3_4B: dict[str, Any] = {  # as google/gemma-3-4b-it's config.json has it
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}


def described(config: dict[str, Any]) -> Architecture:
    family = family_of(config)
    model = family.architecture(config)
    assert Architecture.from_json(json.loads(json.dumps(model.to_json()))) == model
    family.resident(config, model)
    return model


def test_llama_3() -> None:
    model = described(LLAMA_3)
    ffn, attention = model.layers[0].ffn, model.layers[0].attention
    assert (ffn.kind, ffn.activation, ffn.units, model.sparse) == ("gated", "silu", 8192, False)
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.scale) == (32, 8, 64, 1 / 8)
    assert attention.rope == Rope(5e5, None, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert (model.tied_head, model.max_positions, len(model.layers)) == (True, 131072, 16)
    parameters = {**LLAMA_3["rope_scaling"], "rope_theta": 500000.0}  # as transformers 5 writes it
    newer = {key: value for key, value in LLAMA_3.items() if not key.startswith("rope")}
    assert described({**newer, "rope_parameters": parameters}) == model


def test_gemma_3_out_of_a_checkpoint_that_reads_images() -> None:
    model = described(GEMMA_3_4B)
    assert (model.d_model, model.vocabulary, model.eos_tokens) == (2560, 262_208, (1, 106))
    assert [layer.attention.window for layer in model.layers[:7]] == [*[1024] * 5, None, 1024]
    assert model.layers[0].attention.rope == Rope(1e4)
    assert model.layers[5].attention.rope == Rope(1e6, None, LinearScaling(8.0))
    assert (model.embedding_scale, model.tied_head) == (2560**0.5, True)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_gemma_3_under_an_image_reader_is_the_text_model(tmp_path: Path, prefix: str) -> None:
    model = write_checkpoint(tmp_path / "model", "gemma3")
    usual = convert(model, tmp_path / "usual", name="gemma")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.replace("model.", prefix, 1): value for name, value in tensors.items()},
        model / "model.safetensors",
    )
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    inner = convert(model, tmp_path / "inner", name="gemma")
    assert inner.manifest.files == usual.manifest.files
    assert inner.architecture == usual.architecture


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"head_dim": None}, {"head_dim": 64}),
        ({"num_key_value_heads": None}, {"kv_heads": 32}),
        ({"model_type": "qwen3", "head_dim": 128}, {"head_dim": 128, "window": None}),
        ({"model_type": "mistral"}, {"window": 4096}),
        ({"model_type": "mistral", "sliding_window": None}, {"window": None}),
        ({"model_type": "phi3", "sliding_window": 2047, "rope_scaling": None}, {"window": 2047}),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 144}, {"scale": 1 / 12, "softcap": 50}),
    ],
)
def test_defaults_of_attention(changed: dict[str, Any], found: dict[str, Any]) -> None:
    attention = described({**LLAMA_3, **changed}).layers[0].attention
    assert {name: getattr(attention, name) for name in found} == found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_act": "mish"}, ["mish", "silu", "fatrelu"]),
        ({"hidden_act": "fatrelu"}, ["hidden_act_param"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "llama3"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_scaling": [2.0]}, ["rope parameters"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["short_factor", "32"]),
        ({"partial_rotary_factor": 0.4}, ["25 dimensions", "64"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads 5", "32"]),
        ({"head_dim": None, "hidden_size": 2049}, ["2049", "32 heads"]),
        ({"intermediate_size": None}, ["intermediate_size"]),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 16}, ["chunked_attention"]),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, ["layer_types", "16"]),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping 50.0"]),
        ({"model_type": "gemma3", "text_config": 1}, ["text_config", "1"]),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, ["no_rope_layers", "16"]),
        ({"model_type": "bamboo", "hidden_act": "silu"}, ["bamboo", "silu"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantised"]),
    ],
)
def test_what_a_gated_decoder_does_not_support_is_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as raised:
        described({**LLAMA_3, **settings})
    assert all(word in str(raised.value) for word in words), str(raised.value)
