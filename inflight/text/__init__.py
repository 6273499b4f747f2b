"""Text to tokens and back: tokenizer, incremental detokenizer, stop texts, chat templates."""

from inflight.startup import switch_off
from inflight.text.chat import shown
from inflight.text.defaults import sampling_defaults
from inflight.text.grammar import GrammarCompiler, Matcher, json_grammar
from inflight.text.tail import TextTail
from inflight.text.template import ChatTemplate
from inflight.text.thought import ThoughtMatcher, thought_matcher
from inflight.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "GrammarCompiler",
    "Matcher",
    "TextTail",
    "ThoughtMatcher",
    "Tokenizer",
    "json_grammar",
    "load_tokenizer",
    "sampling_defaults",
    "shown",
    "thought_matcher",
]

switch_off()
