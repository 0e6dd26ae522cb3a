"""Every test that SECURITY.md names exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_sentence_of_the_security_page_has_its_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert not [name for name in named if f"def {name}(" not in texts]
