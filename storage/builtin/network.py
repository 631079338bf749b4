"""Networks as the trainer sees them, and the built-in model's: OPT (pre-norm, ReLU).

OPT exists beside transformers' own class because training needs the FFN activations for the
sparsity penalty, at once and without hooks. Its parameters are named as Hugging Face names them:
what `Network.tensors` gives is a checkpoint that `OPTForCausalLM.from_pretrained` loads unchanged; a
test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.builtin.experts import Routing

POSITION_OFFSET = 2  # OPT's learned positions start at row 2


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    d_model: int = 256
    d_ff: int = 2048
    layers: int = 8
    heads: int = 4
    vocabulary: int = 4096
    positions: int = 1280

    def huggingface(self) -> dict[str, object]:
        """The `config.json` of this shape."""
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "do_layer_norm_before": True,
            "enable_bias": True,
            "hidden_size": self.d_model,
            "word_embed_proj_dim": self.d_model,
            "ffn_dim": self.d_ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions,
            "vocab_size": self.vocabulary,
            "layer_norm_elementwise_affine": True,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "torch_dtype": "float16",
        }


class PenalisedReLU(torch.autograd.Function):
    """ReLU whose backward pass adds `slope` to the gradient of every non-zero activation.

    That is the gradient of an L1 penalty, without the two passes over the activations that the
    penalty as a term of the loss costs (a fifth of a training step on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        active = torch.relu(x)
        ctx.save_for_backward(active, slope)
        return active

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        active, slope = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0] + slope.to(grads[0].dtype), active, 0), None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a tied head, in chunks whose logits stay in the CPU's cache.

    `hidden` `[n, d_model]`, `weight` `[vocabulary, d_model]`, `targets` `[n]`; the gradients are
    computed in the forward pass, so that no logits are kept.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        low = weight.to(torch.bfloat16)
        hidden_low = hidden.to(torch.bfloat16)
        total = torch.zeros(())
        grad_hidden = torch.empty_like(hidden_low)
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(targets), ChunkedCrossEntropy.CHUNK):
            part = slice(start, start + ChunkedCrossEntropy.CHUNK)
            wanted = targets[part, None]
            log_probability = torch.log_softmax((hidden_low[part] @ low.T).float(), dim=-1)
            total -= log_probability.gather(1, wanted).sum()
            grad = log_probability.exp_()
            grad.scatter_add_(1, wanted, torch.full(wanted.shape, -1.0))
            grad_low = grad.to(torch.bfloat16)
            grad_hidden[part] = grad_low @ low
            grad_weight += grad_low.T @ hidden_low[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.to(ctx.dtype) * grads[0].to(ctx.dtype), grad_weight * grads[0], None


class Network(nn.Module):
    """What the trainer needs: a decoder, whose head is its embedding, and how a checkpoint holds it.

    Called with `ids` `[rows, length]` and `slopes` `[steered]` it gives the normed hidden states
    `[rows, length, d_model]` and the FFN activations of each steered layer.
    """

    config: dict[str, Any]  # the checkpoint's `config.json`
    prefix: str  # of the tensors' names in the checkpoint
    dtype: torch.dtype  # of the tensors in the checkpoint
    steered: int  # layers whose FFN activity is penalised: all of them, or none
    d_ff: int  # activations of a steered layer, a token

    @property
    def head(self) -> Tensor:
        """`[vocabulary, d_model]`."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as a checkpoint's tensors."""
        return {f"{self.prefix}{name}": t.detach().to(self.dtype) for name, t in self.state_dict().items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the parameters from a checkpoint's tensors, widened to float32."""
        self.load_state_dict({name.removeprefix(self.prefix): t.float() for name, t in tensors.items()})

    def routings(self) -> list[Routing]:
        """What each layer's router said in the latest call; empty where a network has no experts."""
        return []

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy in nats of `targets` `[rows, length]`."""
        loss: Tensor = ChunkedCrossEntropy.apply(hidden.flatten(0, 1), self.head, targets.flatten())
        return loss


def initialise(network: nn.Module, layers: int, residual: tuple[str, ...]) -> None:
    """Matrices random, narrower where they add to the residual stream; biases zero; norms as they are."""
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            scale = (2 * layers) ** -0.5 if name.endswith(residual) else 1.0
            nn.init.normal_(parameter, std=0.02 * scale)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q_proj = nn.Linear(shape.d_model, shape.d_model)
        self.k_proj = nn.Linear(shape.d_model, shape.d_model)
        self.v_proj = nn.Linear(shape.d_model, shape.d_model)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            projection(x).view(rows, length, self.heads, -1).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(rows, length, width))
        return out


class Layer(nn.Module):
    """One pre-norm block; returns the residual stream and the FFN activations."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(shape.d_model)
        self.self_attn = Attention(shape)
        self.final_layer_norm = nn.LayerNorm(shape.d_model)
        self.fc1 = nn.Linear(shape.d_model, shape.d_ff)
        self.fc2 = nn.Linear(shape.d_ff, shape.d_model)

    def forward(self, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        active: Tensor = PenalisedReLU.apply(self.fc1(self.final_layer_norm(x)), slope)
        return x + self.fc2(active), active


class Decoder(Network):
    """Embeddings, blocks and final norm; the head is the embedding."""

    prefix = "model.decoder."
    dtype = torch.float16

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.config = shape.huggingface()
        self.d_ff = shape.d_ff
        self.steered = shape.layers
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.d_model)
        self.embed_positions = nn.Embedding(shape.positions + POSITION_OFFSET, shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_layer_norm = nn.LayerNorm(shape.d_model)
        initialise(self, shape.layers, residual=("out_proj.weight", "fc2.weight"))

    @property
    def head(self) -> Tensor:
        return self.embed_tokens.weight

    def forward(self, ids: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Normed hidden states `[rows, length, d_model]` and each layer's FFN activations.

        `slopes` `[layers]` is the gradient of the sparsity penalty by one activation; none: zero.
        """
        slopes = torch.zeros(len(self.layers)) if slopes is None else slopes
        positions = torch.arange(ids.shape[1], device=ids.device) + POSITION_OFFSET
        x = self.embed_tokens(ids) + self.embed_positions(positions)
        activations = []
        for layer, slope in zip(self.layers, slopes, strict=True):
            x, active = layer(x, slope)
            activations.append(active.detach())
        return self.final_layer_norm(x), activations
