"""docs/reliability.md names only tests that exist."""

import re
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def test_every_test_that_the_table_of_faults_names_exists():
    text = (CHECKOUT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (CHECKOUT / "tests" / file).read_text(encoding="utf-8"), test
