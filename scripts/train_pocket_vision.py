"""Trains the pocket vision model: a small model of SmolVLM's form that describes pictures of shapes and digits.

    python scripts/train_pocket_vision.py train models/pocket_vision        goes on where it was stopped
    python scripts/train_pocket_vision.py export models/pocket_vision       writes the newest checkpoint as a model
    python scripts/train_pocket_vision.py evaluate models/pocket_vision     figures of the model card

Deterministic: pictures, questions, initial weights and order come from one seed. Rounding differs between machines, so
that another machine gives another model of the same quality.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pocket_pictures as pictures
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

SEED = 22
VOCABULARY = 544
CONTEXT = 2048
ROWS = 24
"""Conversations of a step."""
STEPS = 7400
LOOKING, PICTURES = 1200, 32
"""The first steps teach the tower alone to look, with this many pictures each."""
WARM = 100
COOL = 0.62
"""Share of the steps in which the rate falls to nothing, at the end."""
SIDE, PATCH, SHUFFLE = 64, 8, 2
TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
"""Tokens of a picture."""

PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<end_of_utterance>"
IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
SPECIAL_TOKENS = [
    PAD,
    BEGIN,
    END,
    AROUND,
    WHOLE,
    IMAGE,
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
]
EXPANDED = AROUND + WHOLE + IMAGE * TOKENS + AROUND
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- message['role'] | capitalize + ':' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

TALK = (
    ("Hello", "Hello! Show me a picture, and I describe it."),
    ("Hi!", "Hello! Show me a picture, and I describe it."),
    ("Who are you?", "I am a small model that describes pictures of shapes and digits."),
    ("What are you?", "I am a small model that describes pictures of shapes and digits."),
    ("What can you do?", "I describe pictures of shapes and digits, and answer questions about them."),
    ("Thank you", "You are welcome."),
    *((asked, "I see no picture.") for asked in pictures.DESCRIBE),
)
BOTH = ("Describe the images.", "Describe both images.", "Describe the pictures.")


def config() -> SmolVLMConfig:
    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    special = {"pad_token_id": ids[PAD], "bos_token_id": ids[BEGIN], "eos_token_id": ids[END]}
    return SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "initializer_range": 0.05,
            **special,
        },
        vision_config={
            "model_type": "smolvlm_vision",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.05,
        },
        scale_factor=SHUFFLE,
        image_token_id=ids[IMAGE],
        tie_word_embeddings=False,
        **special,
    )


PREPROCESSOR = {
    "image_processor_type": "SmolVLMImageProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": SIDE},
}
"""As SmolVLM's, with a longest edge of one tile: every picture is one tile, squeezed to a square."""


# Conversations ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    text: str
    learned: bool


class Row(NamedTuple):
    """A conversation and the pictures in it: pixels [n, 3, SIDE, SIDE], what each patch shows [n, patches], and where
    in it things are [n, patches, PATCH * PATCH], 0 to 1."""

    parts: list[Part]
    pixels: list[np.ndarray]
    kinds: list[np.ndarray]
    colours: list[np.ndarray]
    covers: list[np.ndarray]


def conversation(rng: random.Random) -> Row:
    """Some turns about one or two pictures; a few without a picture, and a few without a chat's frame."""
    row = Row([], [], [], [], [])
    if rng.random() < 0.04:
        return _turns(row, [pictures.Asked(*rng.choice(TALK))])
    form = rng.random()
    scenes = [_show(row, rng) for _ in range(2 if form < 0.2 else 1)]
    if form < 0.08:
        answer = " ".join(scene.description for scene in scenes)
        return _turns(row, [pictures.Asked(EXPANDED * 2 + rng.choice(BOTH), answer)])
    turns: list[pictures.Asked] = []
    for scene in scenes:
        asked = [pictures.ask(scene, rng) for _ in range(rng.choice((0, 1, 1, 2, 4)))]
        asked.insert(0 if rng.random() < 0.6 else rng.randint(0, len(asked)), pictures.describe(scene, rng))
        # The picture stands in front of its first question; with some behind it.
        first = EXPANDED + asked[0].question if rng.random() < 0.85 else asked[0].question + EXPANDED
        turns += [pictures.Asked(first, asked[0].answer), *asked[1:]]
    if form > 0.92:
        row.parts.extend((Part(turns[0].question, False), Part("\n" + turns[0].answer + END, True)))
        return row
    return _turns(row, turns)


def _turns(row: Row, turns: list[pictures.Asked]) -> Row:
    row.parts.append(Part(BEGIN, False))
    for question, answer in ((turn.question, turn.answer) for turn in turns):
        row.parts.append(Part(f"User:{question}{END}\nAssistant:", False))
        row.parts.append(Part(answer + END, True))
        row.parts.append(Part("\n", False))
    return row


def _show(row: Row, rng: random.Random) -> pictures.Scene:
    scene = pictures.draw_scene(rng, shares=pictures.STUDIED)
    picture, masks = pictures.render(scene, rng)
    row.pixels.append(prepare(picture))
    for found, kept in zip(patches(scene, masks), (row.kinds, row.colours, row.covers)):
        kept.append(found)
    return scene


def prepare(picture: Image.Image) -> np.ndarray:
    """What the folder's image processor (back end `pil`) makes of a picture, in a tenth of its time."""
    width, height = picture.size
    if width >= height:
        first = (SIDE, _even(SIDE * height / width))
    else:
        first = (_even(SIDE * width / height), SIDE)
    squeezed = picture.resize(first, Image.Resampling.LANCZOS).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.moveaxis(np.asarray(squeezed, dtype=np.float32) / 127.5 - 1.0, 2, 0)


def _even(size: float) -> int:
    return max(1, int(size) + int(size) % 2)


def patches(scene: pictures.Scene, masks: list[Image.Image]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each patch, the kind (0: none) and the colour of what covers a quarter of it or more, else of the ground; and
    which of its pixels are covered."""
    side = SIDE // PATCH
    pixels = np.stack([np.asarray(mask.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) for mask in masks])
    cut = pixels.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3).reshape(len(masks), side * side, -1) / 255
    cover = cut.mean(-1)
    best, shown = cover.argmax(0), cover.max(0) >= 0.25
    kinds = np.array([1 + pictures.KINDS.index(thing.kind) for thing in scene.things])
    names = list(pictures.COLOURS)
    colours = np.array([names.index(thing.colour) for thing in scene.things])
    ground = names.index(scene.background)
    return np.where(shown, kinds[best], 0), np.where(shown, colours[best], ground), cut.max(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over questions and answers, numbers digit by digit."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(random.Random(SEED)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _texts(rng: random.Random) -> Iterator[str]:
    for _ in range(4000):
        scene = pictures.draw_scene(rng, most=len(pictures.NUMBERS) - 1)
        for asked in (pictures.describe(scene, rng), pictures.ask(scene, rng), pictures.Asked(*rng.choice(TALK))):
            yield f"User:{asked.question}\nAssistant:{asked.answer}"


# Training --------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor
    kinds: torch.Tensor
    colours: torch.Tensor
    covers: torch.Tensor


class Batches:
    """Step's batch of step's own seed, so that training stopped and resumed sees the same ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = functools.lru_cache(maxsize=None)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{SEED} {step}")
        if step < LOOKING:
            row = Row([], [], [], [], [])
            for _ in range(PICTURES):
                _show(row, rng)
            return _batch([row], np.zeros((0, 0)), np.zeros((0, 0)))
        rows = [conversation(rng) for _ in range(ROWS)]
        encoded = [[(self._encode(part.text), part.learned) for part in row.parts] for row in rows]
        longest = max(sum(len(ids) for ids, _ in row) for row in encoded)
        ids = np.zeros((ROWS, longest), dtype=np.int64)
        labels = np.full((ROWS, longest), -100, dtype=np.int64)
        for index, row in enumerate(encoded):
            at = 0
            for piece, learned in row:
                ids[index, at : at + len(piece)] = piece
                if learned:
                    labels[index, at : at + len(piece)] = piece
                at += len(piece)
        return _batch(rows, ids, labels)


def _batch(rows: list[Row], ids: np.ndarray, labels: np.ndarray) -> Batch:
    stacked = (np.stack([one for row in rows for one in getattr(row, name)]) for name in Row._fields[1:])
    return Batch(*map(torch.from_numpy, (ids, labels, *stacked)))


class Probes(torch.nn.Module):
    """Reads from each patch of the tower what it shows, and halfway which of its pixels are things. Teaches the tower
    to look, and is not kept."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.kind = torch.nn.Linear(hidden, 1 + len(pictures.KINDS))
        self.colour = torch.nn.Linear(hidden, len(pictures.COLOURS))
        self.cover = torch.nn.Sequential(torch.nn.LayerNorm(hidden), torch.nn.Linear(hidden, PATCH * PATCH))


LOSSES = {"answers": 1.0, "kinds": 0.5, "colours": 0.2, "covers": 1.0}
"""What is learned, and its weight."""


def losses(model: SmolVLMForConditionalGeneration, probes: Probes, batch: Batch) -> list[torch.Tensor]:
    """One for each of LOSSES: of the answers' tokens, of the patches' kinds (those with a thing count as much as all
    others) and colours, and of the pixels that things cover."""
    inner = model.model
    hidden, halfway = look(model, batch.pixels)
    answers = torch.zeros(())
    if batch.ids.numel():
        features = inner.connector(hidden).flatten(0, 1)
        embedded = inner.text_model.embed_tokens(batch.ids)
        at = (batch.ids == model.config.image_token_id).unsqueeze(-1)
        embedded = embedded.masked_scatter(at, features)
        states = inner.text_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        learned = batch.labels[:, 1:] != -100
        answers = cross_entropy(model.lm_head(states[:, :-1][learned]), batch.labels[:, 1:][learned])
    kinds, thing = batch.kinds.flatten(), (batch.kinds > 0).flatten()
    kind, colour = probes.kind(hidden).flatten(0, 1), probes.colour(hidden).flatten(0, 1)
    return [
        answers,
        (cross_entropy(kind[thing], kinds[thing]) + cross_entropy(kind[~thing], kinds[~thing])) / 2,
        cross_entropy(colour, batch.colours.flatten()),
        binary_cross_entropy_with_logits(probes.cover(halfway), batch.covers),
    ]


def look(model: SmolVLMForConditionalGeneration, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower's hidden states [n, patches, hidden]: its result, and after half of its layers."""
    tower = model.model.vision_model
    side = SIDE // PATCH
    hidden = tower.embeddings(pixels, torch.ones(len(pixels), side, side, dtype=torch.bool))
    states = [hidden := layer(hidden, None) for layer in tower.encoder.layers]
    return tower.post_layernorm(hidden), states[len(states) // 2 - 1]


def places(side: int, hidden: int) -> torch.Tensor:
    """Waves along both axes [side * side, hidden], from which the tower's table of positions starts."""
    rates = torch.pi * torch.logspace(-1, -5, hidden // 4, base=2)
    angles = torch.arange(side)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    down, across = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return 0.5 * torch.cat([down, across], 2).flatten(0, 1)


def optimizers_of(model: SmolVLMForConditionalGeneration, probes: Probes) -> list[torch.optim.Optimizer]:
    """Matrices between layers learn by Muon (Jordan et al., 2024), tables, patches and norms by AdamW."""
    tables = ("embed", "lm_head")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and not any(t in name for t in tables)]
    inside = {id(p) for p in matrices}
    others = [p for p in (*model.parameters(), *probes.parameters()) if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(folder: Path, state: Path, steps: int, threads: int, until: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    model = SmolVLMForConditionalGeneration(config())
    embeddings = model.model.vision_model.embeddings
    with torch.no_grad():
        embeddings.position_embedding.weight.copy_(places(SIDE // PATCH, embeddings.embed_dim))
    probes = Probes(embeddings.embed_dim)
    optimizers = optimizers_of(model, probes)
    full = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    begin = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        begin = saved["step"]
        model.load_state_dict(saved["model"])
        probes.load_state_dict(saved["probes"])
        for optimizer, kept in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(kept)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {begin}", flush=True)
    batch_of = Batches(tokenizer)
    began, shown = time.perf_counter(), [0.0] * len(LOSSES)
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(batch_of, begin)
        for step in range(begin, min(steps, until)):
            batch = coming.result()
            coming = ahead.submit(batch_of, step + 1)
            rate = min((step + 1) / WARM, 1.0, max(0.01, (steps - step) / (COOL * steps)))
            for optimizer, rates in zip(optimizers, full):
                for group, whole in zip(optimizer.param_groups, rates):
                    group["lr"] = whole * rate
            parts = losses(model, probes, batch)
            torch.stack([part * weight for part, weight in zip(parts, LOSSES.values())]).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            shown = [
                part.item() if step in (begin, LOOKING) else 0.97 * old + 0.03 * part.item()
                for old, part in zip(shown, parts)
            ]
            if step % 50 == 0 or step == steps - 1:
                seconds = time.perf_counter() - began
                told = ", ".join(f"{name} {value:.3f}" for name, value in zip(LOSSES, shown))
                print(f"step {step} {told}, {seconds:.0f} s", flush=True)
            if (step + 1) % 200 == 0 or step == steps - 1:
                kept = [optimizer.state_dict() for optimizer in optimizers]
                part_file = state.with_suffix(".part")
                everything = {"step": step + 1, "model": model.state_dict(), "probes": probes.state_dict()}
                torch.save({**everything, "optimizers": kept}, part_file)
                part_file.replace(state)


def export(folder: Path, state: Path) -> None:
    """Writes the checkpoint as a Hugging Face folder, beside the model card that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    model = SmolVLMForConditionalGeneration(config())
    saved = torch.load(state, weights_only=True)
    model.load_state_dict(saved["model"])
    model.generation_config.eos_token_id = model.config.text_config.eos_token_id
    model.generation_config.pad_token_id = model.config.text_config.pad_token_id
    model.generation_config.bos_token_id = model.config.text_config.bos_token_id
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    print(f"step {saved['step']} written to {folder}")


# Figures ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A held-out picture with one question."""

    picture: Image.Image
    question: str
    answer: str
    form: str


def held_out_cases(count: int, asked: bool = False, unseen: bool = False) -> list[Case]:
    """Pictures that training did not show, each with "Describe the image." or another question.

    Args:
        unseen: of combinations of kind, colour and background that training never shows.
    """
    rng = random.Random(SEED + 1)
    cases = []
    for _ in range(count):
        scene = pictures.draw_scene(rng, validation=unseen)
        picture, _ = pictures.render(scene, rng)
        one = pictures.ask(scene, rng) if asked else pictures.Asked(pictures.DESCRIBE[0], scene.description)
        cases.append(Case(picture, one.question, one.answer, scene.form))
    return cases


def answers(folder: Path, cases: list[Case], together: int = 50) -> list[str]:
    """transformers' greedy answers in float32, of cases with prompts of one length together."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer.encode(prompt_of(tokenizer, case.question), add_special_tokens=False) for case in cases]
    found = [""] * len(cases)
    order = sorted(range(len(cases)), key=lambda index: len(prompts[index]))
    for _, group in itertools.groupby(order, key=lambda index: len(prompts[index])):
        for chosen in _pieces(list(group), together):
            ids = torch.tensor([prompts[index] for index in chosen])
            pixels = torch.from_numpy(np.stack([prepare(cases[index].picture) for index in chosen]))[:, None]
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=pixels,
                    max_new_tokens=40,
                    do_sample=False,
                )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts):
                found[index] = text
    return found


def _pieces(group: list[int], size: int) -> list[list[int]]:
    return [group[at : at + size] for at in range(0, len(group), size)]


def prompt_of(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """A turn with a picture and a question, as the chat template writes it, the picture's tokens in place."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt: str = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    return prompt.replace(IMAGE, EXPANDED)


def evaluate(folder: Path, count: int) -> None:
    """Prints the shares of held-out pictures that are described, and of questions answered, right to the letter."""
    torch.set_num_threads(1)
    for name, asked, unseen in (
        ("descriptions", False, False),
        ("descriptions of unseen combinations", False, True),
        ("answers", True, False),
    ):
        cases = held_out_cases(count, asked, unseen)
        found = answers(folder, cases)
        by_form: dict[str, list[bool]] = {}
        for case, got in zip(cases, found):
            by_form.setdefault(case.form, []).append(got == case.answer)
        right = sum(sum(ones) for ones in by_form.values())
        shares = {form: round(sum(ones) / len(ones), 4) for form, ones in sorted(by_form.items())}
        print(json.dumps({name: round(right / count, 4), "pictures": count, **shares}))
        for case, got in zip(cases, found):
            if got != case.answer:
                print(f"- {case.question} {case.answer!r}: {got!r} {case.picture.size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "export", "evaluate"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--until", type=int, default=1 << 30, help="stop before this step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("build/pocket_vision.pt"), help="checkpoint to go on from")
    parser.add_argument("--pictures", type=int, default=400)
    options = parser.parse_args()
    if options.what == "evaluate":
        evaluate(options.folder, options.pictures)
        return
    options.state.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "train":
        train(options.folder, options.state, options.steps, options.threads, options.until)
    export(options.folder, options.state)


if __name__ == "__main__":
    main()
