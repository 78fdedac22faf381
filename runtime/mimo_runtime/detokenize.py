"""Tokens to text while they come: only text that no later token can change.

Byte-level tokenizers split characters between tokens, and decoders of whole sequences join, strip or replace at the
edges. So the text is always that of a decoded window of tokens, minus its end where that may still change.
"""

import re
from typing import Any

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
WINDOW, CONTEXT = 64, 8  # tokens decoded at once before the older ones are dropped, and how many of them stay


class Decoder:
    """A tokenizer's decoder. One for all requests.

    `byte_ids` are its byte tokens (<0xE4>), if it has them, and `text_ids` the tokens that end a run of them: special
    tokens and unknown ids do not, because they are left out before bytes are joined.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.byte_ids = frozenset(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
        self.text_ids = frozenset(vocabulary.values()) - special - self.byte_ids

    def settled(self, ids: list[int]) -> int:
        """How many of `ids` come before the open run of byte tokens at their end, which is valid or replaced as a
        whole, so that its end decides about its beginning."""
        end = len(ids)
        while self.byte_ids and end and ids[end - 1] not in self.text_ids:
            end -= 1
        return end

    def __call__(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens and without "clean-up", which deletes spaces of code."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Text of one growing sequence. The pieces of `push` and `flush` together are the decoded whole sequence."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.ids: list[int] = []  # the window: tokens whose text may still change, and some before them as context
        self.sent = 0  # characters of the window's text that were returned

    def push(self, tokens: list[int]) -> str:
        """Adds tokens; returns the text that became final."""
        self.ids += tokens
        end = self.decoder.settled(self.ids)
        text = self.decoder(self.ids[:end]).rstrip(REPLACEMENT)
        piece = text[self.sent :]
        self.sent = max(self.sent, len(text))
        if len(self.ids) > WINDOW and end == len(self.ids):
            self._drop(text)
        return piece

    def flush(self) -> str:
        """The rest, incomplete characters included."""
        piece = self.decoder(self.ids)[self.sent :]
        self.sent += len(piece)
        return piece

    def _drop(self, text: str) -> None:
        """Shortens the window to its last tokens, if these alone decode to the end of the text (not where the cut
        would split a character; then the window grows until the next try)."""
        kept = self.ids[-CONTEXT:]
        tail = self.decoder(kept)
        if tail and self.sent == len(text) and text.endswith(tail):
            self.ids, self.sent = kept, len(tail)


class StopStrings:
    """Cuts a stream of text before the first stop string, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """Adds text; returns what may be shown. `found` tells that a stop string was reached."""
        self.held += text
        at = min((i for s in self.stops if (i := self.held.find(s)) >= 0), default=-1)
        if at >= 0:
            self.found = True
            return self._take(at, drop=True)
        longest = max((self._overlap(s) for s in self.stops), default=0)
        return self._take(len(self.held) - longest)

    def flush(self) -> str:
        """The text held back, once nothing more can come."""
        return self._take(len(self.held))

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self.held)), 0, -1) if stop.startswith(self.held[-n:])), 0)

    def _take(self, count: int, drop: bool = False) -> str:
        shown, self.held = self.held[:count], "" if drop else self.held[count:]
        return shown
