"""Tiny checkpoints that say a given text: a Llama of one layer whose neurons are the places of scripts.

A prompt that holds the token `<|script:NAME|>` makes the model write that script, greedy or sampled, alone or under a
grammar that allows it. The files are a checkpoint as any other: config.json, model.safetensors, tokenizer.json.

How it works: every token has a code of +1 and -1. Heads of attention look some tokens back (`BACK`) and at the script's
token, and write the codes that they find there beside the token's own. A place of a script is a neuron that fires where
these tokens and the script are the right ones; what it writes is the code of the next token. At a script's beginning
fewer tokens are compared, and the neuron that compares more is stronger. A token is a word of the scripts or a byte, so
that a text has the same tokens whoever writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

BACK = (*range(1, 15), 17, 21)
CODE, THETA = 32, 1e8
CONST, OWN, SOURCE, FLAG, FILL = 0, 1, 1 + CODE, 1 + 2 * CODE, 2 + 2 * CODE
PAST = [3 + 2 * CODE + CODE * n for n in range(len(BACK))]
SCRIPT = PAST[-1] + CODE
SAID = SCRIPT + CODE
HIDDEN = -(-(SAID + CODE) // 64) * 64
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

Float = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Scripted:
    """What a checkpoint holds.

    Attributes:
        scripts: texts by name, each with the token that ends it.
        template: the chat template; None: there is none.
        eos: tokens that end a generation.
        special: added tokens that decoding hides; plain: added tokens that it shows.
        after: by script, what the model goes on with behind a text that it did not choose itself.
    """

    scripts: Mapping[str, str]
    template: str | None
    eos: Sequence[str]
    special: Sequence[str] = ()
    plain: Sequence[str] = ()
    after: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Writes the checkpoint."""
        folder.mkdir(parents=True)
        names = [f"<|script:{name}|>" for name in self.scripts]
        tokenizer = _tokenizer(self._texts(), [*dict.fromkeys([*self.eos, *self.special]), *names], self.plain)
        ids = tokenizer.get_vocab(with_added_tokens=True)
        markers = [ids[name] for name in names]
        known = [
            (number, list(seen), next)
            for number, name in enumerate(self.scripts)
            for seen, next in self._places(name, tokenizer).items()
        ]
        weights = _weights(max(ids.values()) + 1, markers, known)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        tokenizer.save(str(folder / "tokenizer.json"))
        ends = [ids[text] for text in self.eos]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(weights["lm_head.weight"]),
            "hidden_size": HIDDEN,
            "intermediate_size": len(weights["model.layers.0.mlp.up_proj.weight"]),
            "num_hidden_layers": 1,
            "num_attention_heads": len(BACK) + 1,
            "num_key_value_heads": len(BACK) + 1,
            "head_dim": CODE,
            "hidden_act": "silu",
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": THETA,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "eos_token_id": ends,
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": self.eos[0]}))
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template)
        return folder

    def _texts(self) -> list[str]:
        behind = [text for rules in self.after.values() for one in rules.items() for text in one]
        return [*self.scripts.values(), *behind]

    def _places(self, name: str, tokenizer: Tokenizer) -> dict[tuple[int, ...], int]:
        """The places of a script: the tokens that are compared, the latest first, and the next one."""

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False).ids)

        found: dict[tuple[int, ...], int] = {}
        for before, text in [("", self.scripts[name]), *self.after.get(name, {}).items()]:
            first, tokens = len(encode(before)), encode(before) + encode(text)
            for at in range(first, len(tokens)):
                seen = tuple(tokens[at - 1 - back] for back in (0, *BACK) if back < at)
                if found.setdefault(seen, tokens[at]) != tokens[at]:
                    raise ValueError(f"the places of {name} cannot be told apart: {text}")
        return found


def _tokenizer(texts: Sequence[str], special: Sequence[str], plain: Sequence[str]) -> Tokenizer:
    """Words of the texts, bytes, and added tokens."""
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Za-z0-9_]+|[^A-Za-z0-9_]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = [word for text in texts for word, _ in cut.pre_tokenize_str(text) if word.isascii()]
    vocabulary = {word: id for id, word in enumerate(dict.fromkeys([*ALPHABET, *words]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    return tokenizer


def _codes(count: int, chance: np.random.Generator) -> Float:
    """Codes of which no two agree in more than four fifths of their places."""
    found = np.empty((0, CODE), np.float32)
    while len(found) < count:
        fresh = chance.choice(np.array([-1, 1], np.float32), CODE)
        if not len(found) or (found @ fresh).max() <= 0.6 * CODE:
            found = np.vstack([found, fresh])
    return found


def _weights(vocab: int, markers: Sequence[int], places: Sequence[tuple[int, list[int], int]]) -> dict[str, Float]:
    chance = np.random.default_rng(0)
    size = -(-vocab // 64) * 64
    codes, names = _codes(size, chance), _codes(len(markers), chance)
    embed = np.zeros((size, HIDDEN), np.float32)
    embed[:, CONST] = 1
    embed[:, OWN : OWN + CODE] = codes
    embed[:, FILL] = (CODE + 1) ** 0.5  # all rows are equally long
    for number, id in enumerate(markers):
        embed[id, SOURCE : SOURCE + CODE], embed[id, FLAG], embed[id, FILL] = names[number], 1, 0
    first = float(np.sqrt(np.square(embed[0]).sum() / HIDDEN))  # what the norms divide by
    heads = len(BACK) + 1
    second = float(np.sqrt((np.square(embed[0]).sum() + heads * CODE) / HIDDEN))

    query, key, value = (np.zeros((heads * CODE, HIDDEN), np.float32) for _ in range(3))
    out = np.zeros((HIDDEN, heads * CODE), np.float32)
    half, turns = CODE // 2, THETA ** -(np.arange(16) / (CODE // 2))
    sharp = 400 * first
    for head, back in enumerate(BACK):  # the score is highest where the angles agree: `back` tokens ago
        row = head * CODE
        key[row : row + 16, CONST] = first
        query[row : row + 16, CONST] = sharp * np.cos(back * turns)
        query[row + half : row + half + 16, CONST] = -sharp * np.sin(back * turns)
        value[row : row + CODE, OWN : OWN + CODE] = np.eye(CODE) * first
        out[PAST[head] : PAST[head] + CODE, row : row + CODE] = np.eye(CODE)
    row = len(BACK) * CODE
    key[row + half - 1, FLAG] = first  # this pair hardly turns
    query[row + half - 1, CONST] = 20 * sharp
    value[row : row + CODE, SOURCE : SOURCE + CODE] = np.eye(CODE) * first
    out[SCRIPT : SCRIPT + CODE, row : row + CODE] = np.eye(CODE)

    count = -(-len(places) // 64) * 64
    gate, up = np.zeros((count, HIDDEN), np.float32), np.zeros((count, HIDDEN), np.float32)
    down = np.zeros((HIDDEN, count), np.float32)
    steep = 100 * second
    for index, (number, seen, next) in enumerate(places):
        gate[index, SCRIPT : SCRIPT + CODE] = steep * names[number] / CODE
        for at, id in zip([OWN, *PAST], seen):
            gate[index, at : at + CODE] = steep * codes[id] / CODE
        gate[index, CONST] = -steep * (len(seen) + 1 - 0.15)
        up[index, CONST] = second
        down[SAID : SAID + CODE, index] = codes[next] * 4.0 ** len(seen)
    head_ = np.zeros((size, HIDDEN), np.float32)
    head_[:, SAID : SAID + CODE] = codes
    ones, layer = np.ones(HIDDEN, np.float32), "model.layers.0."
    return {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": ones,
        "lm_head.weight": head_,
        f"{layer}input_layernorm.weight": ones.copy(),
        f"{layer}post_attention_layernorm.weight": ones.copy(),
        f"{layer}self_attn.q_proj.weight": query,
        f"{layer}self_attn.k_proj.weight": key,
        f"{layer}self_attn.v_proj.weight": value,
        f"{layer}self_attn.o_proj.weight": out,
        f"{layer}mlp.gate_proj.weight": gate,
        f"{layer}mlp.up_proj.weight": up,
        f"{layer}mlp.down_proj.weight": down,
    }
