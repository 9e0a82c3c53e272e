"""The bytes of tokens: what all tokens of a text stand for, one after the other, is the text."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.token_bytes import TokenBytes, byte_alphabet
from tests.conftest import make_tokenizer

TEXT = [
    "The answer is 42, and the question is open.",
    "Naïve café: 漢字 and 😀 stand for several bytes.",
    "def add(a, b):\n    return a + b",
] * 4
EOS = "<|end|>"


def byte_level(size, corpus=TEXT, *, special=(EOS,), plain=()):
    """A byte-level BPE, as GPT-2's, Llama 3's and Qwen's are."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[0])
    made.add_tokens(list(plain))
    return made


def sentence_piece(size, corpus=TEXT):
    """A BPE over text whose spaces are ▁, with rare characters as bytes, as Llama 2's is."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        [text for text in corpus if text.isascii()],
        trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False),
    )
    # byte tokens are ordinary tokens of the vocabulary, not added ones
    state = core.to_str()
    import json

    parsed = json.loads(state)
    parsed["added_tokens"] = [
        token for token in parsed["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parsed)), eos_token=EOS, unk_token="<unk>"
    )


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("text", TEXT[:3])
def test_the_bytes_of_a_texts_tokens_are_the_text(make, text):
    tokens = TokenBytes(make(400))
    found = tokens.encode(text.encode())
    assert found is not None and b"".join(piece for _, piece in found) == text.encode()


def test_the_alphabet_is_that_of_the_library():
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_a_character_may_lie_in_several_tokens():
    tokens = TokenBytes(byte_level(270))
    found = tokens.encode("😀".encode())
    assert found is not None and len(found) == 4
    assert [piece for _, piece in found] == [bytes([byte]) for byte in "😀".encode()]


def test_added_tokens_stand_for_their_own_text():
    tokenizer = byte_level(300, plain=("<think>", "café"))
    tokens = TokenBytes(tokenizer)
    assert tokens.of(tokenizer.convert_tokens_to_ids("café")) == "café".encode()
    assert tokens.of(tokenizer.convert_tokens_to_ids(EOS)) == EOS.encode()
    assert tokens.special == {tokenizer.eos_token_id}
    assert tokens.special_names == {EOS.encode(): tokenizer.eos_token_id}


def test_every_byte_is_a_token_of_its_own():
    by_bytes = TokenBytes(byte_level(300)).by_bytes
    assert all(bytes([byte]) in by_bytes for byte in range(256))


def test_no_space_stands_before_a_text_that_goes_on():
    tokenizer = sentence_piece(400)
    tokens = TokenBytes(tokenizer)
    found, spaced = tokens.encode(b"answer"), tokens.encode(b" answer")
    assert found is not None and not tokenizer.convert_ids_to_tokens(found[0][0]).startswith("▁")
    assert spaced is not None
    assert [i for i, _ in spaced] == tokenizer("answer", add_special_tokens=False)["input_ids"]


def test_what_is_no_utf_8_cannot_be_tokenized():
    assert TokenBytes(byte_level(300)).encode("é".encode()[:1]) is None


def test_a_tokenizer_that_changes_the_text_does_not_write_it_back():
    tokenizer = byte_level(300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert TokenBytes(tokenizer).encode(b"The") is None
    assert TokenBytes(tokenizer).encode(b"the") is not None


def test_tokenizers_that_lose_spaces_are_refused():
    with pytest.raises(DiagnosticsError) as error:
        TokenBytes(make_tokenizer(), "teacher's tokenizer")
    assert str(error.value) == (
        "The teacher's tokenizer writes its text with no decoder, from which the bytes of a token"
        " cannot be told. Coverage needs a byte-level or SentencePiece tokenizer."
    )
