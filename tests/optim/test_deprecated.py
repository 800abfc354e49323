"""Names of 0.1 still work, and say what they are called now."""

import pytest

import kfacopt


@pytest.mark.parametrize(
    ("old", "new"),
    [("ExactKFACBackend", kfacopt.EigenKFACBackend), ("ExactEKFACBackend", kfacopt.FullEKFACBackend)],
)
def test_renamed_classes_are_found_by_their_old_names(old, new):
    with pytest.warns(DeprecationWarning, match=f"kfacopt.{old} is now kfacopt.{new.__name__}"):
        assert getattr(kfacopt, old) is new


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'KFACC'"):
        _ = kfacopt.KFACC
