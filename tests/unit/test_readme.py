"""README.md and README.ko.md say the same: the same sections, commands, names, numbers, rows and links."""

import re
from collections import Counter

import pytest
from helpers import ROOT

LANGUAGES = {"README.md", "README.ko.md"}  # each links to the other one


def sections(name):
    """-> [(level of the heading, text below it)], the title first."""
    blocks, lines = 0, []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        blocks += line.startswith("```")
        if blocks % 2 == 0 and re.match(r"#+ ", line):
            lines.append((line.index(" "), []))
        else:
            lines[-1][1].append(line)
    return [(level, "\n".join(below)) for level, below in lines]


def code_blocks(text):
    """Without comments, which are in the language of the document."""
    blocks = re.findall(r"^```.*\n((?:.*\n)*?)```$", text, re.M)
    return [[re.sub(r"(^|\s+)# .*", "", line).rstrip() for line in block.splitlines()] for block in blocks]


def links(text):
    """In any order: that of the words differs."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)
    return Counter(target for target in targets if target not in LANGUAGES)


def outside_code_blocks(text):
    return re.sub(r"^```(?:.*\n)*?```$", "", text, flags=re.M)


def code_spans(text):
    return set(re.findall(r"`([^`\n]+)`", outside_code_blocks(text)))


def numbers(text):
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", outside_code_blocks(text)))


def table_rows(text):
    """-> number of cells per row."""
    return [len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]


def list_items(text):
    return [re.match(r"(?:-|\d+\.)", line)[0] for line in text.splitlines() if re.match(r"(?:-|\d+\.) ", line)]


def test_the_sections_are_the_same():
    english, korean = ([level for level, _ in sections(name)] for name in ("README.md", "README.ko.md"))
    assert english == korean and english.count(1) == 1


@pytest.mark.parametrize("content", [code_blocks, links, code_spans, numbers, table_rows, list_items])
def test_each_section_has_the_same(content):
    for (_, english), (_, korean) in zip(sections("README.md"), sections("README.ko.md"), strict=True):
        assert content(english) == content(korean), korean.strip().partition("\n")[0]


def test_the_korean_one_is_korean():
    """A section that is copied but not translated has no Hangul."""
    for _, text in sections("README.ko.md"):
        prose = re.sub(r"`[^`]*`", "", outside_code_blocks(text))
        assert len(re.findall(r"[가-힣]", prose)) > 20, text[:100]
