"""A method file of one's own, wherever it lies and whatever it is called."""

from pathlib import Path

import joblib
import pytest

from koinon.bench.checks import checks_of
from koinon.core import UserError, load
from koinon.share import mmoe


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """MMoE's file under the name of a module of the standard library, with annotations kept as text."""
    first, rest = Path(mmoe.__file__).read_text(encoding="utf-8").split("\n", 1)
    file = tmp_path / "json.py"
    file.write_text(f"{first}\nfrom __future__ import annotations\n{rest}", encoding="utf-8")
    return file


def test_it_passes_the_checks(own):
    failed = {}
    for check in checks_of(load(str(own))):
        try:
            check.run()
        except Exception as error:
            failed[check.name] = error
    assert not failed


def test_it_is_sent_to_other_processes(own):
    kind = load(str(own))
    there = joblib.Parallel(n_jobs=2)(joblib.delayed(repr)(kind(experts=n)) for n in (3, 4))
    assert there == [repr(kind(experts=n)) for n in (3, 4)]


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise ValueError('no')\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no"):
        load(str(file))
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="defines 0"):
        load(str(tmp_path / "empty.py"))
