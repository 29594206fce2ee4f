"""Puts a copy of microq.py into the wheel as its stubs, so that type checkers read the
hints of an installed microq: a module of one file can have no py.typed (PEP 561).

Hatchling calls it, see pyproject.toml.  Its own force-include can't do this, since it
moves a file that is in the wheel already."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = tempfile.mkdtemp()
        if version != "editable":  # there the copy would become out of date
            copy = shutil.copy(Path(self.root, "microq.py"), self.folder)
            build_data["force_include"][copy] = "microq-stubs/__init__.pyi"

    def finalize(self, *details: Any) -> None:
        shutil.rmtree(self.folder)
