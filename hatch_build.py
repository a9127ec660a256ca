"""Generate the completions and the man page that the wheel installs below share/."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COMPLETIONS = {
    "bash": "bash-completion/completions/sequencerd",
    "zsh": "zsh/site-functions/_sequencerd",
    "fish": "fish/vendor_completions.d/sequencerd.fish",
}


class CustomBuildHook(BuildHookInterface[Any]):
    """Called by hatchling for each wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and add them to the wheel."""
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        from sequencerd.cli.completion import complete  # noqa: PLC0415 - of this source

        made = {path: complete(shell) for shell, path in COMPLETIONS.items()}
        # it has no wheel, so it is in the environment of a release, and not in every pip's
        if find_spec("argparse_manpage") is not None:
            made["man/man1/sequencerd.1"] = self._man_page()
        for path, text in made.items():
            file = self._folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            build_data["shared_data"][str(file)] = f"share/{path}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files, which are in the wheel now."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return Path(self.directory) / "share"

    def _man_page(self) -> str:
        from argparse_manpage.manpage import Manpage  # noqa: PLC0415

        from sequencerd.cli.arguments import make_parser  # noqa: PLC0415

        page = Manpage(make_parser(), format="single-commands-section")
        page.source = f"sequencerd {self.metadata.version}"
        page.manual = "User Commands"
        page.description = "move enrollments through sequences of steps"
        return str(page)
