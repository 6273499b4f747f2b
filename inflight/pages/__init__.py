"""Files of the prompt cache: their names, their form, and the bound of their folder."""

from inflight.pages.chain import PAGE, Piece, page_blocks, tail, whole_pages
from inflight.pages.files import HEADER, PageFiles
from inflight.pages.look import Found, look

__all__ = ["HEADER", "PAGE", "Found", "PageFiles", "Piece", "look", "page_blocks", "tail", "whole_pages"]
