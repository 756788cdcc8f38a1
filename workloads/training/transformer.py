"""A decoder-only Transformer, whole: embedding, blocks of causal attention and SwiGLU, head.

    model = Transformer(LlamaConfig(vocab_size=1024, hidden_size=192, ...))
    logits_BTV = model(ids_BT).logits
    to_llama(model.config, full_state(model)).save_pretrained(folder)  # what Transformers and vLLM load

Vaswani et al. 2017 (arXiv:1706.03762), with what Touvron et al. 2023 (Llama, arXiv:2302.13971) put together: RMSNorm
ahead of each layer (Zhang and Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al. 2021, arXiv:2104.09864),
SwiGLU (Shazeer 2020, arXiv:2002.05202), and grouped queries (Ainslie et al. 2023, arXiv:2305.13245). Weights have the
names, layouts and, for a seed, the initial values of Transformers' Llama. There is no cache: the model that was saved
generates.

Shapes: B sequences, T tokens, D width, N heads of queries, K heads of keys and values, H width of a head, V vocabulary.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput


class Transformer(nn.Module):
    """Decoder and head. ``config.tie_word_embeddings`` makes the head's weight the embedding's.

    Raises ValueError for what a LlamaConfig can ask for and this model does not have.
    """

    base_model_prefix = "model"
    _no_split_modules = ("Block",)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=config.initializer_range)

    @property
    def base_model(self) -> "Decoder":
        """All but the head."""
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """The logits_BTV of the token after each of ``input_ids`` (B, T); the rest as ``Decoder.forward`` takes it."""
        assert not use_cache
        hidden_BTD = self.model(input_ids, attention_mask, position_ids).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.apply(partial(_initialise, deviation=config.initializer_range))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> BaseModelOutput:
        """Hidden states (B, T, D) of ``input_ids`` (B, T).

        ``attention_mask`` is 1 on tokens and 0 on padding, which stands on the right: there no token sees it, and its
        own states mean nothing. ``position_ids`` are those of packed sequences, and restart at 0 with every example:
        examples do not see each other. Raises ValueError for padding on the left.
        """
        if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
            raise ValueError("padding stands on the right of a sequence: some of these have it elsewhere")
        mask_B1TT = None if position_ids is None else _mask_of_packed(position_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x_BTD = self.embed_tokens(input_ids)
        cos_B1TH, sin_B1TH = _rotation(position_ids, self.config, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos_B1TH, sin_B1TH, mask_B1TT)
        return BaseModelOutput(last_hidden_state=self.norm(x_BTD))


class Block(nn.Module):
    """Attention, then SwiGLU; each reads the norm of the residual stream and adds to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """The residual stream after this block."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_B1TH, sin_B1TH, mask_B1TT)
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return out_BTD


class Attention(nn.Module):
    """Causal attention. N / K heads of queries share one of keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim
        self.grouped = heads != shared
        self.q_proj = nn.Linear(width, heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(width, shared * self.head_size, bias=False)
        self.v_proj = nn.Linear(width, shared * self.head_size, bias=False)
        self.o_proj = nn.Linear(heads * self.head_size, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """What each token gathers from those before it and itself, or from those that the mask says."""
        q_BNTH = _rotate(self._heads(self.q_proj(x_BTD)), cos_B1TH, sin_B1TH)
        k_BKTH = _rotate(self._heads(self.k_proj(x_BTD)), cos_B1TH, sin_B1TH)
        v_BKTH = self._heads(self.v_proj(x_BTD))
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BKTH, v_BKTH, attn_mask=mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=self.grouped
        )
        out_BTD: Tensor = self.o_proj(out_BNTH.transpose(1, 2).flatten(2))
        return out_BTD

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class SwiGLU(nn.Module):
    """Two projections up, one of which gates the other, and one down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Token by token."""
        out_BTD: Tensor = self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out_BTD


def to_llama(config: LlamaConfig, state: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """Transformers' Llama with the weights ``state`` of a Transformer. Of tied weights one name is enough."""
    llama = LlamaForCausalLM(config)
    head = {"lm_head.weight": state["model.embed_tokens.weight"]} if config.tie_word_embeddings else {}
    llama.load_state_dict({**state, **head})
    return llama


def from_llama(llama: LlamaForCausalLM) -> Transformer:
    """A Transformer with the weights of Transformers' Llama."""
    model = Transformer(llama.config)
    model.load_state_dict(llama.state_dict())
    return model


def _check(config: LlamaConfig) -> None:
    has = {
        "rotary positions without scaling": config.rope_parameters["rope_type"] == "default",
        "SiLU": config.hidden_act == "silu",
        "no biases": not (config.attention_bias or config.mlp_bias),
        "no dropout": not config.attention_dropout,
    }
    if missing := [name for name, given in has.items() if not given]:
        raise ValueError(f"this Transformer has {' and '.join(missing)}, the config asks for something else")


def _initialise(module: nn.Module, deviation: float) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx] = 0


def _rotation(positions_BT: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles by which each pair of a head's coordinates turns at each position, in float32
    until the last: pair i of H / 2 turns by theta^(-2i / H) a token."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions_BT.device, dtype=torch.float32)
    angles_BTP = positions_BT[..., None] * config.rope_parameters["rope_theta"] ** (-pairs / config.head_dim)
    angles_B1TH = torch.cat((angles_BTP, angles_BTP), -1)[:, None]
    return angles_B1TH.cos().to(dtype), angles_B1TH.sin().to(dtype)


def _rotate(x_BNTH: Tensor, cos_B1TH: Tensor, sin_B1TH: Tensor) -> Tensor:
    """Turn the pairs: coordinate i goes with i + H / 2."""
    first, second = x_BNTH.chunk(2, -1)
    return x_BNTH * cos_B1TH + torch.cat((-second, first), -1) * sin_B1TH


def _mask_of_packed(positions_BT: Tensor) -> Tensor:
    """(B, 1, T, T), true where a token may look: at its own example, up to itself."""
    example_BT = (positions_BT == 0).cumsum(1)
    alike_BTT = example_BT[:, :, None] == example_BT[:, None]
    return alike_BTT.tril()[:, None]
