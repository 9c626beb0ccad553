"""Many cases in one test: for those that are quick, alike, and leave nothing behind."""

import functools
import inspect

import pytest


def in_one_test(names, cases):
    """As ``pytest.mark.parametrize``, but one test that goes through all cases, and names each one that failed."""
    cases = list(cases)
    names = [name.strip() for name in names.split(",")]
    assert cases, f"no case of {names}"

    def decorate(test):
        @functools.wraps(test)
        def loop(**fixtures):
            failed = []
            for case in cases:
                values = case if len(names) > 1 else [case]
                try:
                    test(**fixtures, **dict(zip(names, values, strict=True)))
                except (Exception, pytest.fail.Exception) as error:
                    failed.append(f"{case!r}: {type(error).__name__}: {error}")
            assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(failed)

        parameters = inspect.signature(test).parameters.values()
        loop.__signature__ = inspect.Signature([p for p in parameters if p.name not in names])
        return loop

    return decorate
