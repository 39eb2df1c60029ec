"""The character tokenizer of the SDK's tests."""

from tests.sdk.conftest import char_tokenizer

__all__ = ["char_tokenizer"]
