"""Tiny checkpoints of vision models with random weights, in Hugging Face layout, made by transformers.

    folder = save_vision("smolvlm", tmp_path)

Text: hidden 64, 2 layers; vision: hidden 32, 2 layers. The tokenizer is the pocket model's with the family's markers,
the chat template the family's form over plain text. `reference` opens the whole model in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.illustrated import stir_gemma4
from tests.recurrent import DELTA, EXPERTS

POCKET = Path(__file__).resolve().parents[1] / "models" / "pocket"

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Made:
    """What a maker puts together.

    Args:
        markers: texts of the tokens to add, the image's first.
    """

    def __init__(self, markers: list[str], placeholder: str = "") -> None:
        from tokenizers import AddedToken, Tokenizer

        self.tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
        self.tokenizer.add_special_tokens([AddedToken(text, special=True) for text in markers])
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.ids = [self.tokenizer.token_to_id(text) for text in markers]
        self.placeholder = placeholder or "".join(markers[:1])
        self.text = {**TEXT, "vocab_size": self.vocab_size}
        self.config: Any = None
        self.processor: dict[str, Any] = {}


def save_vision(
    family: str, folder: Path, seed: int = 0, sizes: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> Path:
    """A checkpoint of a family, by `model_type`.

    Args:
        sizes: values in place of its configuration's, by part of it; "" is the whole.
        settings: in place of the image processor's.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    made = MAKERS[family]()
    for part, values in (sizes or {}).items():
        config = getattr(made.config, part) if part else made.config
        for name, value in values.items():
            setattr(config, name, value)
    model = transformers.AutoModelForImageTextToText.from_config(made.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # Gemma 3's join
                parameter.normal_(0, 0.15)
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
        if family.startswith("gemma4"):
            stir_gemma4(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    made.tokenizer.save(str(folder / "tokenizer.json"))
    told = json.loads((POCKET / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", made.placeholder))
    (folder / "preprocessor_config.json").write_text(json.dumps({**made.processor, **settings}))
    return folder


def reference(folder: Path) -> Any:
    """The whole model in transformers, float32."""
    import torch
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def reference_processor(folder: Path) -> Any:
    """transformers' image processor with Pillow."""
    import transformers

    return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """A picture with smooth and hard parts, uint8 [height, width, 3]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([rows * 255 // max(1, height - 1), columns * 255 // max(1, width - 1), (rows + columns) % 256], 2)
    noise = random.integers(0, 64, (height, width, 3))
    return np.clip(smooth + noise - 32, 0, 255).astype(np.uint8)


def _smolvlm() -> Made:
    import transformers

    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    made = Made(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows])
    made.config = transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**made.text).to_dict(),
        vision_config={**VISION, "image_size": 32, "patch_size": 4},
        image_token_id=made.ids[0],
        scale_factor=2,
        pad_token_id=0,
    )
    made.processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_resize": True,
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 32},
        "do_image_splitting": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
        "resample": 1,
    }
    return made


def _scaling(kind: str, **settings: Any) -> dict[str, Any]:
    """Settings of an image processor that scales, and normalises as for CLIP."""
    return {
        "image_processor_type": f"{kind}ImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        **settings,
    }


def _llama(made: Made, kind: str = "Llama", **settings: Any) -> dict[str, Any]:
    import transformers

    text: dict[str, Any] = getattr(transformers, f"{kind}Config")(**{**made.text, **settings}).to_dict()
    return text


QWEN = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]


def _qwen3_vl() -> Made:
    import transformers

    made = Made(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**made.text, "head_dim": 16, "rope_parameters": rope, "num_hidden_layers": 3}
    made.config = transformers.Qwen3VLConfig(
        text_config=transformers.Qwen3VLTextConfig(**text).to_dict(),
        vision_config={**_qwen3_vision(), "deepstack_visual_indexes": [0, 1]},
        **_qwen_ids(made),
    )
    made.processor = _qwen3_processor()
    return made


def _qwen3_vision() -> dict[str, Any]:
    return {
        **{key: value for key, value in VISION.items() if not key.startswith("num_")},
        "depth": 3,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
    }


def _qwen_ids(made: Made) -> dict[str, int]:
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    return dict(zip(names, made.ids))


def _qwen3_processor() -> dict[str, Any]:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    size = {"shortest_edge": 4 * 64, "longest_edge": 100 * 64}
    return _scaling("Qwen2VL", size=size, patch_size=4, merge_size=2, temporal_patch_size=2, **half)


def _qwen3_5(kind: str = "Qwen3_5", **settings: Any) -> Made:
    """Every second layer has a recurrent state; attention turns 16 of its heads' 32 components."""
    import transformers

    made = Made(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    delta = {name: value for name, value in DELTA.items() if name.startswith(("linear", "layer", "num_hidden"))}
    text = {**made.text, **delta, "head_dim": 32, "rope_parameters": rope, **settings}
    made.config = getattr(transformers, f"{kind}Config")(
        text_config=getattr(transformers, f"{kind}TextConfig")(**text).to_dict(),
        vision_config=_qwen3_vision(),
        **_qwen_ids(made),
    )
    made.processor = _qwen3_processor()
    return made


def _qwen3_5_moe() -> Made:
    return _qwen3_5("Qwen3_5Moe", **EXPERTS)


def _qwen2_5_vl() -> Made:
    import transformers

    made = Made(QWEN, "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    vision = {key: value for key, value in VISION.items() if not key.startswith("num_")}
    made.config = transformers.Qwen2_5_VLConfig(
        text_config=transformers.Qwen2_5_VLTextConfig(**made.text, rope_parameters=rope).to_dict(),
        vision_config={
            **vision,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_qwen_ids(made),
    )
    size = {"shortest_edge": 4 * 64, "longest_edge": 100 * 64}
    made.processor = _scaling("Qwen2VL", size=size, patch_size=4, merge_size=2, temporal_patch_size=2)
    return made


def _gemma3() -> Made:
    import transformers

    made = Made(["<image_soft_token>", "<start_of_image>", "<end_of_image>"], "<start_of_image>")
    text = {**made.text, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    made.config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(),
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4},
        mm_tokens_per_image=16,
        image_token_index=made.ids[0],
        boi_token_index=made.ids[1],
        eoi_token_index=made.ids[2],
        pad_token_id=0,
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    made.processor = _scaling("Gemma3", size={"height": 32, "width": 32}, **half)
    return made


def _gemma4(**settings: Any) -> Made:
    """A larger model's form; `settings` of the language part make it a smaller one."""
    import transformers

    made = Made(["<|image|>", "<|image>", "<image|>"])
    text = {
        **made.text,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "hidden_size_per_layer_input": 0,
        "use_bidirectional_attention": "vision",
        **settings,
    }
    larger = not settings
    made.config = transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(**text).to_dict(),
        vision_config={
            **VISION,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "position_embedding_size": 512,
            "standardize": larger,
            "use_clipped_linears": not larger,
        },
        audio_config=None,
        **dict(zip(("image_token_id", "boi_token_id", "eoi_token_id"), made.ids)),
        **{f"{name}_token_id": made.vocab_size for name in ("video", "audio", "boa")},  # which prompts do not have
        eoa_token_index=made.vocab_size,
    )
    made.processor = {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 4,
        "pooling_kernel_size": 3,
        "max_soft_tokens": 70,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "resample": 3,
    }
    return made


def _gemma4_e() -> Made:
    return _gemma4(
        use_bidirectional_attention=None,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=Made([]).vocab_size + 3,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    )


def _clip(**settings: Any) -> dict[str, Any]:
    return {**VISION, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 4, **settings}


def _llava() -> Made:
    import transformers

    made = Made(["<image>"])
    made.config = transformers.LlavaConfig(
        text_config=_llama(made), vision_config=_clip(num_hidden_layers=3), image_token_index=made.ids[0]
    )
    made.processor = _scaling(
        "CLIP", size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    return made


def _llava_next() -> Made:
    import transformers

    made = Made(["<image>"])
    sizes = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    made.config = transformers.LlavaNextConfig(
        text_config=_llama(made, "Mistral", sliding_window=None),
        vision_config=_clip(num_hidden_layers=3),
        image_token_index=made.ids[0],
        image_grid_pinpoints=sizes,
    )
    crop = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    made.processor = _scaling("LlavaNext", size={"shortest_edge": 32}, image_grid_pinpoints=sizes, **crop)
    return made


def _llava_onevision() -> Made:
    import transformers

    made = Made(["<image>", "<video>"])
    sizes = [[32 * row, 32 * column] for row in range(1, 4) for column in range(1, 4)]
    made.config = transformers.LlavaOnevisionConfig(
        text_config=_llama(made, "Qwen2"),
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4},
        image_token_index=made.ids[0],
        video_token_index=made.ids[1],
        image_grid_pinpoints=sizes,
        vision_aspect_ratio="anyres_max_4",
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    made.processor = _scaling("LlavaOnevision", size={"height": 32, "width": 32}, image_grid_pinpoints=sizes, **half)
    return made


def _internvl() -> Made:
    import transformers

    made = Made(["<IMG_CONTEXT>", "<img>", "</img>"])
    made.config = transformers.InternVLConfig(
        text_config=_llama(made, "Qwen2"),
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [4, 4]},
        image_token_id=made.ids[0],
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    made.processor = _scaling(
        "GotOcr2", size={"height": 32, "width": 32}, crop_to_patches=False, min_patches=1, max_patches=6
    )
    return made


def _mistral3() -> Made:
    import transformers

    made = Made(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    vision = {**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 8}
    made.config = transformers.Mistral3Config(
        text_config=_llama(made, "Mistral", sliding_window=None, head_dim=16),
        vision_config=vision,
        image_token_index=made.ids[0],
        spatial_merge_size=2,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
    )
    made.processor = _scaling("Pixtral", size={"longest_edge": 64}, patch_size={"height": 4, "width": 4})
    return made


def _pixtral() -> Made:
    import transformers

    made = Made(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    made.config = transformers.LlavaConfig(
        text_config=_llama(made, "Mistral", sliding_window=None, head_dim=16),
        vision_config={**VISION, "model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 8},
        image_token_index=made.ids[0],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    made.processor = _scaling("Pixtral", size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    return made


MAKERS: dict[str, Callable[[], Made]] = {
    "smolvlm": _smolvlm,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_e": _gemma4_e,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "pixtral": _pixtral,
}
"""By `model_type`; pixtral: llava with Pixtral's tower; gemma4_e: a smaller Gemma 4."""
