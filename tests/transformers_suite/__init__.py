"""Transformers' own test mixins, importable: `from .transformers_suite.test_modeling_common import ModelTesterMixin`.

The package is our loader plus, on its search path, the unpacked tests of the installed version. Rank processes import
the mixins by these names, so all of it happens at import. Where the distribution cannot be had, importing skips the
test module that asked, or fails if the variable CI is set.
"""

import os
import sys

import pytest

from . import stand_ins
from .source import Unavailable, unpacked_tests

try:
    _tests = unpacked_tests()
except Unavailable as error:
    if "CI" in os.environ:
        raise
    pytest.skip(str(error), allow_module_level=True)
__path__.append(str(_tests))

# What the mixins import and the source distribution lacks; should a later one carry it, the original is used.
for _name in (
    "distributed_testing_utils",
    "exporters.test_export",
    "generation.test_utils",
    "utils.test_configuration_utils",
):
    if not (_tests / f"{_name.replace('.', '/')}.py").is_file():
        _parent = _name.partition(".")[0]
        sys.modules[f"{__name__}.{_parent}"] = sys.modules[f"{__name__}.{_name}"] = stand_ins
