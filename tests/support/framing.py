"""What tests share: see the names."""

from tokenizers import processors

from ctp.models.tiny import BOS, EOS, byte_tokenizer


def framed(before=True, after=True):
    """Bytes, with <bos> and <eos>, which the tokenizer puts around a text where it is told to."""
    made = byte_tokenizer()
    single = " ".join([*["<bos>"] * before, "$A", *["<eos>"] * after])
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return made


def bare(**special):
    """Bytes with these special tokens, and none put around a text."""
    made = byte_tokenizer(bos=False)
    made.eos_token = None
    made.add_special_tokens(special) if special else None
    return made
