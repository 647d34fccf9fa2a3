"""A user's reward file as a module: imported once, under a name that a spawned process can import too.

The folder of the file is a package, `utils.rewards.files.FOLDER`, and its name holds the folder's path: a process that
unpickles a function of the file finds the file by the name. The modules in the folder import each other under their
plain names: `import utils` in the file is the `utils.py` beside it, and not the package `utils` of this project.
"""

import builtins
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

__path__: list[str] = []  # makes a package of this module; Finder finds its modules
ROOT = Path(__file__).resolve().parents[2]


def import_file(file: Path) -> ModuleType:
    """The module of a Python file, executed at the first call, and again after a change in its folder.

    Raises any exception of the file.
    """
    folder = str(file.parent)
    package = f"{__name__}.{quote_path(folder)}"
    imported: dict[str, Any] = {
        name: module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")
    }
    if any(
        file_stamp(module.__file__) != module.__stamp__ for module in imported.values() if hasattr(module, "__stamp__")
    ):
        for name in imported:
            del sys.modules[name]
    if folder not in sys.path:
        sys.path.append(folder)  # for importlib.import_module("helper"), which does not say who imports
    importlib.invalidate_caches()
    return importlib.import_module(f"{package}.{quote_path(file.stem)}")


def file_stamp(path: str) -> tuple[int, int] | None:
    """Time and size of a file; None if it is gone."""
    return (os.stat(path).st_mtime_ns, os.stat(path).st_size) if os.path.exists(path) else None


def quote_path(path: str) -> str:
    """A path as one part of a module's name, without dots."""
    return quote(os.fsencode(path), safe="").replace(".", "%2E")


def unquote_path(part: str) -> str:
    return os.fsdecode(unquote_to_bytes(part))


class Finder:
    """Finds `utils.rewards.files.FOLDER` and the modules in it."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        folder, *inner = name.removeprefix(f"{__name__}.").split(".")
        folder = unquote_path(folder)
        if not inner:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [folder]
            return spec
        found = PathFinder.find_spec(name, path)
        if found is None and len(inner) == 1:  # an encoded name, such as v1.2.py
            file = os.path.join(folder, f"{unquote_path(inner[0])}.py")
            found = importlib.util.spec_from_file_location(name, file) if os.path.exists(file) else None
        if found and found.origin and type(found.loader) is SourceFileLoader:
            found.loader = Loader(name, found.origin, folder)
        return found


class Loader(SourceFileLoader):
    """Executes a file of a user's folder, with an `import` that looks beside the file first."""

    def __init__(self, name: str, path: str, folder: str) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        # the import statement, at the top of a file or in a function, calls __import__ of the file's own builtins
        own = functools.partial(import_beside, f"{__name__}.{quote_path(self.folder)}", self.folder)
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": own}
        module.__dict__["__stamp__"] = file_stamp(self.path)
        super().exec_module(module)


def import_beside(
    package: str,
    folder: str,
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`__import__` for the modules of `package`: an absolute name that is found in `folder` is one of the package."""
    if level or not is_beside(package, folder, name.partition(".")[0]):
        return builtins.__import__(name, globals, locals, fromlist, level)
    if fromlist:  # from a.b import c: c may be a module too
        return builtins.__import__(f"{package}.{name}", globals, locals, fromlist)
    importlib.import_module(f"{package}.{name}")
    return sys.modules[f"{package}.{name.partition('.')[0]}"]


def is_beside(package: str, folder: str, top: str) -> bool:
    """True if `top` is a module or package in the folder. As in Python, a folder without __init__.py comes last."""
    spec = Finder.find_spec(f"{package}.{top}", [folder])
    if spec is None or Path(folder) == ROOT:
        return False
    if spec.origin:
        return True
    installed = PathFinder.find_spec(top, [place for place in sys.path if Path(place or ".").resolve() != ROOT])
    known = installed and installed.origin or top in sys.builtin_module_names
    return not known and any(Path(folder, top).glob("*.py"))


def explain_import(error: BaseException, file: Path) -> str:
    """ ". utils is a name of this project ..." where code of a user's file got our module for its own; else ""."""
    if not isinstance(error, ImportError | AttributeError):
        return ""
    module = Path(getattr(error, "path", None) or getattr(getattr(error, "obj", None), "__file__", None) or "")
    package, _, inner = (getattr(error, "name", None) or "").partition(".")
    if isinstance(error, ModuleNotFoundError) and inner and (ROOT / package).is_dir():
        module = ROOT / package / inner
    if ROOT not in module.parents or "site-packages" in module.parts or {ROOT, *module.parents} & {file.parent}:
        return ""
    ours = module.parts[len(ROOT.parts)].removesuffix(".py")
    return (
        f". {ours} is a name of this project too: a reward file finds its own {ours} in its folder ({file.parent}) "
        "alone, by an import statement. Move yours there, or rename it"
    )


if Finder not in sys.meta_path:
    sys.meta_path.insert(0, Finder)
