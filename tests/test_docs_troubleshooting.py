"""What the page on trouble quotes is what fastkd says."""

from __future__ import annotations

import re

import pytest
from messages import GAP, texts
from pages import ROOT, read_page

PAGE = read_page("docs/troubleshooting.md")
QUOTES = [quote.strip("` ") for quote in re.findall(r"^> (.+)$", PAGE, flags=re.MULTILINE)]
# fewer letters stand in too much
LEAST = 12


@pytest.fixture(scope="module")
def said() -> set[str]:
    return texts(ROOT / "fastkd")


def test_the_page_has_thirty_or_more() -> None:
    assert len(set(QUOTES)) == len(QUOTES) >= 30


@pytest.mark.parametrize("quote", QUOTES)
def test_a_quote_stands_in_the_source(quote: str, said: set[str]) -> None:
    assert len(re.sub(rf"[{GAP}\\W]", "", quote)) >= LEAST
    assert any(quote in text for text in said)


def test_a_quote_that_nobody_says_is_found(said: set[str]) -> None:
    assert not any("out of memory: buy more" in text for text in said)


def test_every_quote_is_followed_by_what_to_do() -> None:
    for after in re.split(r"^> .+$", PAGE, flags=re.MULTILINE)[1:]:
        assert len(after.partition("\n#")[0].strip()) > 30
