"""Text to tokens and back: tokenizer, incremental detokenizer, stop texts, chat templates."""

from inflight.telemetry import switch_off
from inflight.text.chat import shown
from inflight.text.defaults import sampling_defaults
from inflight.text.detokenizer import Detokenizer
from inflight.text.grammar import GrammarCompiler, Matcher, json_grammar
from inflight.text.stop import StopTexts
from inflight.text.template import ChatTemplate
from inflight.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "GrammarCompiler",
    "Matcher",
    "StopTexts",
    "Tokenizer",
    "json_grammar",
    "load_tokenizer",
    "sampling_defaults",
    "shown",
]

switch_off()
