"""Each mistake is an error of a few lines, and the page of error messages shows today's text."""

import jax
import mistakes
import pytest

CODES = [code for codes in mistakes.MISTAKES.values() for code in codes]


@pytest.fixture(autouse=True)
def as_users_have_it():
    # Users have neither strict promotion nor the suite's ban on rank promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_page_shows_what_comes_back() -> None:
    """`python tests/support/mistakes.py` writes the page anew."""
    assert len(CODES) >= 40 and len(set(CODES)) == len(CODES)
    assert mistakes.split_page()[1] == mistakes.page_part()


def test_errors_are_short_and_name_no_address() -> None:
    for code in CODES:
        text = mistakes.make(code)
        assert len(text) <= 600 and len(text.splitlines()) <= 5, code
        assert " at 0x" not in text and "Tracer" not in text, code
