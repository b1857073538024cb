"""Puts the configurations of this repository into the wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigurations(build_py):
    """Copies configs/ into the package, where an installed dbtrain looks for them."""

    def run(self) -> None:
        """Build the package, and add them; an editable installation finds them beside itself."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "dbtrain" / "configs"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted((Path(__file__).parent / "configs").glob("*.yaml")):
            shutil.copy(source, target)


setup(cmdclass={"build_py": WithConfigurations})
