"""What the families of encoders call their sizes and weights, and how their layers differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EncoderForm:
    """A family of encoders. Names of weights are without `.weight` and `.bias`.

    Attributes:
        word, position, token_type: tables of embeddings; None: the family has none.
        embedding_norm: of their sum; None: there is none.
        scaled: embeddings of words are multiplied with the root of the width.
        layers: in front of a layer's number.
        qkv: queries, keys and values; one name if they are stored as one.
        attention_norm: behind attention, or in front of it where `pre_norm`.
        up: of the MLP: one name; or those of a gate and of what it multiplies; or one in which they are stacked.
        gated: the MLP has a gate. gate_last: of a stack, the gate is the second half.
        mlp_norm: as `attention_norm`.
        pre_norm: norms stand in front of attention and MLP, and there is one behind all layers.
        first_norm: the first layer has one in front of attention too.
        result_norms: of what attention and the MLP give, before it is added; empty: there are none.
        head_norms: of each head of queries and of keys; empty: there are none.
        final_norm: the one behind all layers.
        rms: its norms are RMSNorms, and their weights the distance from 1.
        relative: what is added to scores by distance: `bias` (MPNet) or `content` (DeBERTa); empty: nothing.
        qkv_bias, out_bias, up_bias, down_bias: whether the products have one.
        offset: positions are counted from the padding token's number + 1, and padding tokens are not counted.
        fields: where a size has another name in config.json than BERT's.
        defaults: of sizes that config.json may leave out.
        theta: of the rotation; None: there is none.
    """

    word: str = "embeddings.word_embeddings"
    position: str | None = "embeddings.position_embeddings"
    token_type: str | None = "embeddings.token_type_embeddings"
    embedding_norm: str | None = "embeddings.LayerNorm"
    scaled: bool = False
    layers: str = "encoder.layer."
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    out: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: tuple[str, ...] = ("intermediate.dense",)
    gated: bool = False
    gate_last: bool = False
    down: str = "output.dense"
    mlp_norm: str = "output.LayerNorm"
    pre_norm: bool = False
    first_norm: bool = False
    result_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    final_norm: str = ""
    rms: bool = False
    relative: str = ""
    qkv_bias: bool = True
    out_bias: bool = True
    up_bias: bool = True
    down_bias: bool = True
    offset: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    theta: float | None = None

    def get(self, config: Mapping[str, Any], name: str) -> Any:
        """A field of config.json by BERT's name for it; None: it has none."""
        value = config.get(self.fields.get(name, name))
        return self.defaults.get(name) if value is None else value


_BERT_SIZES = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu",
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
_BERT = EncoderForm(defaults=_BERT_SIZES)
_ROBERTA = EncoderForm(offset=True, defaults={**_BERT_SIZES, "vocab_size": 50265, "pad_token_id": 1})
_DISTILBERT = EncoderForm(
    token_type=None,
    layers="transformer.layer.",
    qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up=("ffn.lin1",),
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
    fields={
        "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim", "hidden_act": "activation",
    },
    defaults={**_BERT_SIZES, "num_hidden_layers": 6},
)  # fmt: skip
_MODERNBERT = EncoderForm(
    word="embeddings.tok_embeddings",
    position=None,
    token_type=None,
    embedding_norm="embeddings.norm",
    layers="layers.",
    qkv=("attn.Wqkv",),
    out="attn.Wo",
    attention_norm="attn_norm",
    up=("mlp.Wi",),
    gated=True,
    down="mlp.Wo",
    mlp_norm="mlp_norm",
    pre_norm=True,
    final_norm="final_norm",
    qkv_bias=False,
    out_bias=False,
    up_bias=False,
    down_bias=False,
    fields={"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"},
    defaults={
        "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12,
        "hidden_act": "gelu", "intermediate_size": 1152, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
    },
    theta=160000.0,
)  # fmt: skip
_NOMIC = EncoderForm(
    position=None,
    embedding_norm="emb_ln",
    layers="encoder.layers.",
    qkv=("attn.Wqkv",),
    out="attn.out_proj",
    attention_norm="norm1",
    up=("mlp.fc12", "mlp.fc11"),
    gated=True,
    down="mlp.fc2",
    mlp_norm="norm2",
    qkv_bias=False,
    out_bias=False,
    up_bias=False,
    down_bias=False,
    defaults={
        **_BERT_SIZES, "vocab_size": 30528, "hidden_act": "silu", "max_position_embeddings": 2048,
    },
    theta=1000.0,
)  # fmt: skip
_GTE = EncoderForm(
    position=None,
    qkv=("attention.qkv_proj",),
    out="attention.o_proj",
    attention_norm="attn_ln",
    up=("mlp.up_gate_proj",),
    gated=True,
    gate_last=True,
    down="mlp.down_proj",
    mlp_norm="mlp_ln",
    up_bias=False,
    defaults={**_BERT_SIZES, "max_position_embeddings": 8192, "type_vocab_size": 1},
    theta=160000.0,
)
_MPNET = EncoderForm(
    token_type=None,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    offset=True,
    relative="bias",
    defaults={**_BERT_SIZES, "vocab_size": 30527, "pad_token_id": 1},
)
_DEBERTA = EncoderForm(
    qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    relative="content",
    defaults={**_BERT_SIZES, "vocab_size": 128100, "type_vocab_size": 0, "layer_norm_eps": 1e-7},
)
_GEMMA3 = EncoderForm(
    word="embed_tokens",
    position=None,
    token_type=None,
    embedding_norm=None,
    scaled=True,
    layers="layers.",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    attention_norm="input_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    gated=True,
    down="mlp.down_proj",
    mlp_norm="pre_feedforward_layernorm",
    pre_norm=True,
    first_norm=True,
    result_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    final_norm="norm",
    rms=True,
    qkv_bias=False,
    out_bias=False,
    up_bias=False,
    down_bias=False,
    fields={"hidden_act": "hidden_activation", "layer_norm_eps": "rms_norm_eps"},
    defaults={
        **_BERT_SIZES, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "max_position_embeddings": 131072,
    },
    theta=1e6,
)  # fmt: skip

ENCODER_FORMS: Mapping[str, EncoderForm] = {
    "bert": _BERT,
    "camembert": _ROBERTA,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "gemma3_text": _GEMMA3,
    "gte": _GTE,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "new": _GTE,
    "nomic_bert": _NOMIC,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
"""By a config's `model_type`."""
