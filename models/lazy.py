"""CompressAI and timm without what their packages import beside it, which takes twice as long as PyTorch.

Importing any part of CompressAI runs `compressai/__init__.py`, which imports data sets of point clouds (so
torch_geometric) and every model; its entropy models import scipy.stats for one number; timm imports all its models. The
code of the packages named here runs when something is asked of them that is in no other module. So the layers, the
entropy models and the coder are imported by themselves, and other code finds all of the packages as ever.
"""

import importlib
import sys
import time
from collections.abc import Sequence
from importlib import _bootstrap
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Each with the attributes that are asked of it all the same, and the modules which have them.
LATER: dict[str, dict[str, str]] = {
    "compressai": {"available_entropy_coders": __name__, "get_entropy_coder": __name__},
    "compressai.latent_codecs": {"LatentCodec": "compressai.latent_codecs.base"},
    "compressai.models": {},
    "compressai.zoo": {},
    "scipy.stats": {},
    "timm": {},
    "timm.layers": {},
}
# A package of these whose other modules import from it: it runs before any but the named ones is looked for.
FIRST: dict[str, set[str]] = {"timm": {"timm.layers"}}


def get_entropy_coder() -> str:
    """As CompressAI's, until that is run: its first coder."""
    return "ans"


def available_entropy_coders() -> list[str]:
    """As CompressAI's, until that is run."""
    return ["ans"]


class _LaterLoader(Loader):
    """Runs a package when an attribute is asked for that it does not have."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        elsewhere = LATER[module.__name__]
        running = False

        def find(name: str) -> object:
            if name in elsewhere:
                return getattr(importlib.import_module(elsewhere[name]), name)
            missing = AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            for again in (True, False):
                try:
                    # Other threads wait while one runs the package. Where two wait for what the other imports, one is
                    # told so by this lock, which is the import system's own and has no public name.
                    with _bootstrap._ModuleLockManager(module.__name__):
                        if running:  # it asks itself, before it has the name
                            raise missing
                        if vars(module).get("__getattr__") is find:  # nobody else has run it in between
                            run()
                    break
                except _bootstrap._DeadlockError:
                    if not again:
                        raise missing from None
                    time.sleep(0.1)  # for the other thread to take the lock
            return getattr(module, name)

        def run() -> None:
            nonlocal running
            module.__spec__.loader = module.__loader__ = self.loader
            running = True
            try:
                self.loader.exec_module(module)  # an error here comes again when it is asked again
            finally:
                running = False
            if vars(module).get("__getattr__") is find:
                del module.__getattr__

        module.__getattr__ = find


class _FoundLoader(Loader):
    """Gives the import system a module that is there already: its package, which ran meanwhile, imported it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put its own there


class _LaterFinder(MetaPathFinder):
    """Finds the packages of LATER."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package = name.rpartition(".")[0]
        if name not in FIRST.get(package, {name}) and name not in sys.modules:  # else it is loaded again
            hasattr(sys.modules.get(package), "__version__")  # runs it, unless it has run or is running
            if name in sys.modules:
                return ModuleSpec(name, _FoundLoader(sys.modules[name]))
        spec = PathFinder.find_spec(name, path, target) if name in LATER else None
        if spec and spec.loader:
            spec.loader = _LaterLoader(spec.loader)
        return spec


def install() -> None:
    """Have the packages that are not imported yet run later."""
    if not any(isinstance(finder, _LaterFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LaterFinder())
