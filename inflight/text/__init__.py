"""Text to tokens and back: tokenizer, incremental detokenizer, stop texts, chat templates."""

from inflight.startup import switch_off
from inflight.text.answers import CALLS, THOUGHTS, find_form, open_reader, thought_of
from inflight.text.chat import prefill_of, shown
from inflight.text.defaults import sampling_defaults
from inflight.text.forced import call_grammar, framed
from inflight.text.forced_declared import declared_calls
from inflight.text.function import Function
from inflight.text.grammar import GrammarCompiler, Matcher, json_grammar
from inflight.text.tail import TextTail
from inflight.text.template import ChatTemplate
from inflight.text.thought import ThoughtMatcher, thought_matcher
from inflight.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "CALLS",
    "THOUGHTS",
    "ChatTemplate",
    "Function",
    "GrammarCompiler",
    "Matcher",
    "TextTail",
    "ThoughtMatcher",
    "Tokenizer",
    "call_grammar",
    "declared_calls",
    "find_form",
    "framed",
    "json_grammar",
    "load_tokenizer",
    "open_reader",
    "prefill_of",
    "sampling_defaults",
    "shown",
    "thought_matcher",
    "thought_of",
]

switch_off()
