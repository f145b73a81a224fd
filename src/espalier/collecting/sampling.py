"""How many of the calibration tokens a probe keeps where it cannot keep all, evenly strided; imports no torch."""

INPUT_TOKENS = 4096  # of a layer's inputs: 67 MB for D = 4096
GRAM_ALL_TOKENS_EXPERTS = 16  # inner products of residuals: up to so many experts, of every token
GRAM_TOKENS = 16_384  # beyond it, of at most so many
GRAM_BYTES = 2**29  # and no more than so many bytes of them a layer: 4,017 tokens of 256 experts


def stride(tokens: int, most: int) -> int:
    """Distance of the tokens of an evenly strided sample of at most `most` of `tokens`."""
    return max(1, -(-tokens // most))


def sampled(tokens: int, most: int) -> int:
    """Tokens of an evenly strided sample of at most `most` of them."""
    return -(-tokens // stride(tokens, most))


def gram_token_bytes(experts: int) -> int:
    """Bytes that `residual_gram` keeps of one token in one layer."""
    return 4 * (experts * (experts + 1) // 2 + 2 * experts + 1) + 8


def gram_stride(experts: int, tokens: int) -> int:
    """Distance of those of `tokens` of which `residual_gram` keeps the inner products of `experts`."""
    if experts <= GRAM_ALL_TOKENS_EXPERTS:
        return 1
    return stride(tokens, min(GRAM_TOKENS, GRAM_BYTES // gram_token_bytes(experts)))


def gram_sample(experts: int, tokens: int) -> int:
    """Of so many tokens, those of which `residual_gram` keeps the inner products of `experts`."""
    return -(-tokens // gram_stride(experts, tokens))
