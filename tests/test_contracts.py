"""Every method file under every check; a new file is here by existing."""

import pytest

from koinon.bench.checks import checks_of
from koinon.core import load, names

CASES = [pytest.param(check, id=f"{name}-{check.name}") for name in names() for check in checks_of(load(name))]


@pytest.mark.parametrize("check", CASES)
def test_contract(check):
    if check.exempt:  # written on the method, with its reason, and counted below
        return
    check.run()
