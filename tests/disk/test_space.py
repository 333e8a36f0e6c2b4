"""Free space is asked for wherever a target is to lie."""

from __future__ import annotations

import os
from itertools import count

import numpy as np
import pytest

from varstore.disk.save.space import check_space
from varstore.values.plan import plan_save


@pytest.mark.parametrize("target", ["/a/b/c", "/"])
def test_the_search_for_a_folder_that_exists_ends_where_nothing_can_be_looked_at(monkeypatch, target):
    asked = count()

    def isdir(_):
        assert next(asked) < 100
        return False

    monkeypatch.setattr(os.path, "isdir", isdir)
    check_space(plan_save({"w": np.zeros(2)}), target)
