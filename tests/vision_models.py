"""Tiny checkpoints of vision models with random weights, in Hugging Face layout, made by transformers.

    folder = save_vision("smolvlm", tmp_path)

Text: hidden 64, 2 layers; vision: hidden 32, 2 layers. The tokenizer is the pocket model's with the family's markers,
the chat template the family's form over plain text. `reference` opens the whole model in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.lm import POCKET

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
        self.placeholder = placeholder or markers[0]
        self.text = {**TEXT, "vocab_size": self.vocab_size}
        self.config: Any = None
        self.processor: dict[str, Any] = {}


def save_vision(family: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A checkpoint of a family, by `model_type`.

    Args:
        settings: in place of the image processor's.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    made = MAKERS[family]()
    model = transformers.AutoModelForImageTextToText.from_config(made.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
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


MAKERS: dict[str, Callable[[], Made]] = {"smolvlm": _smolvlm}
"""By `model_type`."""
