"""Type checkers take types from packages only: a wheel has a stub package of the same text beside each flat module."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithStubs(build_py):
    def run(self) -> None:
        super().run()
        for module in () if self.editable_mode else self.py_modules or ():
            stubs = Path(self.build_lib, f"{module}-stubs")
            stubs.mkdir(parents=True, exist_ok=True)
            self.copy_file(f"{module}.py", str(stubs / "__init__.pyi"))


setup(cmdclass={"build_py": BuildWithStubs})
