"""Prints what pyproject.toml asks for, of the package and of all its groups, one line each. With
the name of a group, that group's: `clients` is only printed so.

On a machine without an NVIDIA GPU, `torch` from the default index brings gigabytes of CUDA
libraries; where pip can see a CPU build (a wheel folder, an extra index), the range in
pyproject.toml admits it and pip prefers it.

xgrammar is left out: the Makefile installs it without what it declares.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
groups = project["dependency-groups"]
clients = groups.pop("clients")
lines = [*project["project"]["dependencies"], *sum(groups.values(), [])]
if sys.argv[1:]:
    lines = {**groups, "clients": clients}[sys.argv[1]]
sys.stdout.write("\n".join(line for line in lines if not line.startswith("xgrammar")) + "\n")
