"""Mutation tests: each bug of `tests.mutants` must make every check listed with it fail."""

import pytest

from tests.mutants import MUTANTS

CHECKS = list(dict.fromkeys(check for mutant in MUTANTS for check in mutant.killed_by))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_the_bug_is_noticed(mutant):
    with mutant.applied():
        for check in mutant.killed_by:
            try:
                check()
            # If nothing is raised, pytest.raises fails with an exception that is not a subclass of Exception.
            except (Exception, pytest.fail.Exception):
                continue
            pytest.fail(f"{getattr(check, '__name__', check)} passes despite the bug: {mutant.bug}")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: getattr(check, "func", check).__name__)
def test_without_a_bug_the_checks_pass(check):
    check()
