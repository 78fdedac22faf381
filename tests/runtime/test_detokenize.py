"""Streamed text is the decoded whole, whatever the cuts, and no piece is taken back."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mimo_runtime.detokenize import CONTEXT, WINDOW, Decoder, Detokenizer, StopStrings


def byte_level() -> Decoder:
    """256 byte tokens, and merges that cut through characters ("é" is c3 a9, "è" c3 a8)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "Ġt", "tÃ", "©Ã", "he"])}
    raw = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("t", "Ã"), ("©", "Ã"), ("h", "e")]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Decoder(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>"))


def sentence_piece() -> Decoder:
    """Words that begin with a space mark, stripped at the start, and byte tokens for the rest, as Llama 2 has them."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁a", "▁the", "b", "▁", ".", "中"]
    raw = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return Decoder(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))


DECODERS = {"byte level": byte_level(), "byte fallback": sentence_piece()}


def pieces(decoder: Decoder, rounds: list[list[int]]) -> list[str]:
    text = Detokenizer(decoder)
    return [*(text.push(r) for r in rounds), text.flush()]


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_are_the_whole_text_for_any_tokens_and_cuts(decoder, data):
    """Any tokens: broken characters, lone continuation bytes, special tokens, ids that the tokenizer does not know."""
    size = len(decoder.tokenizer)
    # Half of the examples dwell on bytes of multi-byte characters, where the cuts hurt.
    token = st.integers(0, size + 1) | st.sampled_from([*decoder.tokenizer.encode("é中🙂e"), size - 1])
    rounds = data.draw(st.lists(st.lists(token, max_size=8), max_size=40))
    assert "".join(pieces(decoder, rounds)) == decoder([t for r in rounds for t in r])


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_random_texts_longer_than_the_window(decoder):
    rng, size = random.Random(0), len(decoder.tokenizer)
    likely = decoder.tokenizer.encode("é中🙂e", add_special_tokens=False)
    for _ in range(60):
        ids = [rng.choice(likely) if rng.random() < 0.6 else rng.randrange(size) for _ in range(400)]
        cuts = sorted(rng.choices(range(400), k=rng.randrange(1, 200)))
        rounds = [ids[a:b] for a, b in itertools.pairwise([0, *cuts, 400])]
        assert "".join(pieces(decoder, rounds)) == decoder(ids)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_a_long_text_is_streamed_in_step_and_the_window_stays_small(decoder):
    ids = decoder.tokenizer.encode("thé naïve 中文 🙂 tea, ", add_special_tokens=False)
    if decoder.byte_ids:
        words = ["▁the", "b", "▁", "▁a", "中", "<0xC3>", "<0xA9>", "."]
        ids = decoder.tokenizer.convert_tokens_to_ids(words)
    text, shown, widest = Detokenizer(decoder), "", 0
    for i in range(600):
        shown += text.push([ids[i % len(ids)]])
        widest = max(widest, len(text.ids))
        whole = decoder([ids[k % len(ids)] for k in range(i + 1)])
        assert whole.startswith(shown) and len(whole) - len(shown) <= 4
    assert widest <= WINDOW + 2 * CONTEXT


def test_a_character_is_shown_once_all_its_bytes_are_there():
    decoder = DECODERS["byte level"]
    ids = decoder.tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6  # a, four bytes, b
    assert pieces(decoder, [[i] for i in ids]) == ["a", "", "", "", "🙂", "b", ""]
    assert pieces(decoder, [[i] for i in ids[:3]]) == ["a", "", "", "\ufffd"]  # cut off within the character


def test_byte_tokens_are_held_until_their_run_ends():
    """One broken character makes the decoder replace the valid bytes before it as well."""
    decoder = DECODERS["byte fallback"]
    ids = decoder.tokenizer.convert_tokens_to_ids(["▁a", "<0x41>", "<0xE4>", "b"])
    assert pieces(decoder, [[i] for i in ids]) == ["a", "", "", "\ufffd\ufffdb", ""]
    ids = decoder.tokenizer.convert_tokens_to_ids(["▁a", "<0x41>", "<unk>", "<0xE4>", "b"])  # a special token is no end
    assert pieces(decoder, [[i] for i in ids]) == ["a", "", "", "", "\ufffd\ufffdb", ""]
    ids = decoder.tokenizer.convert_tokens_to_ids(["▁a", "<0xC3>", "<0xA9>", "b"])
    assert pieces(decoder, [[i] for i in ids]) == ["a", "", "", "éb", ""]


def test_spaces_before_full_stops_stay():
    decoder = DECODERS["byte level"]
    decoder.tokenizer.clean_up_tokenization_spaces = True
    ids = decoder.tokenizer.encode("a . b ?", add_special_tokens=False)
    assert "".join(pieces(decoder, [[i] for i in ids])) == "a . b ?"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_a_search_of_the_whole_text_cuts(parts, stops):
    text = "".join(parts)
    ends = [(text.index(s) + len(s), text.index(s)) for s in stops if s in text]
    stream, shown = StopStrings(tuple(stops)), ""
    for part in [c for p in parts for c in p]:  # a character at a time, so the stop that completes first ends the text
        shown += stream.push(part)
        assert text.startswith(shown)
        if stream.found:
            break
    if not stream.found:
        assert not ends and shown + stream.flush() == text
    else:
        first = min(ends)[0]
        assert shown == text[: min(at for end, at in ends if end == first)]


def test_only_the_possible_beginning_of_a_stop_string_is_held():
    stream = StopStrings(("\n\nUser:", "END"))
    assert [stream.push(p) for p in ("Hi", "\n", "there EN", "D?")] == ["Hi", "", "\nthere ", ""]
    assert stream.found
