"""Checks that a wheel holds the package and nothing else, and that it is what gets imported.

Usage: check_wheel.py WHEEL SITE_PACKAGES
"""

import importlib
import importlib.util
import sys
import zipfile
from pathlib import Path

# What the extra `cuda` brings: a machine without a GPU does not have it.
OF_EXTRAS = {"flashinfer"}

wheel, site = sys.argv[1:]
names = zipfile.ZipFile(wheel).namelist()
strangers = [n for n in names if not n.startswith(("loraplex/", "loraplex-"))]
assert not strangers, f"the wheel holds files outside the package: {strangers}"
for needed in ("loraplex/__init__.py", "loraplex/py.typed", "loraplex/native/loraplex_native.so"):
    assert needed in names, f"the wheel lacks {needed}"
modules = [
    n.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for n in names
    if n.endswith(".py")
]
for module in modules:
    specification = importlib.util.find_spec(module)
    assert specification is not None and specification.origin is not None, module
    path = Path(specification.origin)
    assert path.is_relative_to(site), f"{module} comes from {path}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in OF_EXTRAS:
            raise
sys.stdout.write(f"{Path(wheel).name}: {len(modules)} modules import from the wheel\n")
