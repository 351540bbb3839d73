"""Text handling around the tokenizer: incremental detokenizer, stop strings, chat templates."""

from minipaged.text.chat import render_chat
from minipaged.text.stream import TextStream

__all__ = ["TextStream", "render_chat"]
