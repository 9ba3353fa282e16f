"""The import table of the design, and the rules that keep it honest: read from the source, nothing is imported.

Each rule is a function of one module, tried on made-up modules below, so that a rule that finds nothing is known to be able to.
"""

import ast
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKING_HALF = ("ladimo.convert", "ladimo.export", "ladimo.cli", "ladimo.__main__", "ladimo.demo")
SHARED_HALF = ("ladimo.model", "ladimo.policy", "ladimo.prefill", "ladimo.checkpoint", "ladimo.auto", "ladimo.hf")


@dataclass(frozen=True)
class Module:
    name: str
    source: str

    def within(self, *packages: str) -> bool:
        return within(self.name, *packages)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @cached_property
    def names_used(self) -> set[str]:
        """Every name and dotted name that the module reads."""
        return {ast.unparse(node) for node in ast.walk(self.tree) if isinstance(node, (ast.Attribute, ast.Name))}

    @cached_property
    def imports(self) -> set[str]:
        """Everything imported anywhere in the module, as dotted names; `from a import b` counts as a.b."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: relative import"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        return found

    def imported(self, *packages: str) -> set[str]:
        return {name for name in self.imports if within(name, *packages)}

    def imported_outside(self, *packages: str) -> set[str]:
        """Imports of our own code or of distributions (the standard library apart) that are not in `packages`."""
        return {
            name for name in self.imports if name.split(".")[0] not in sys.stdlib_module_names and not within(name, *packages)
        }


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@cache
def modules() -> tuple[Module, ...]:
    return tuple(read_modules())


def read_modules() -> Iterator[Module]:
    for package in ("ladimo", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield Module(name, path.read_text(encoding="utf-8"))


# One row per room: what it may import besides the standard library (None = anything not forbidden), and what it may not.
# A name stands for itself and everything under it. All rows that match a module hold for it.
WEB = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client")
TABLE: list[tuple[str, tuple[str, ...] | None, tuple[str, ...]]] = [
    ("ladimo", None, ("server", *WEB)),
    ("ladimo.model", ("torch", "triton", "ladimo.model"), ()),
    ("ladimo.policy", ("ladimo.model.config", "ladimo.model.precision", "ladimo.model.rule", "ladimo.policy"), ()),
    ("ladimo.prefill", ("torch", "ladimo.model", "ladimo.policy", "ladimo.prefill"), ()),
    (
        "ladimo.checkpoint",
        ("torch", "safetensors", "huggingface_hub", "ladimo.model", "ladimo.policy", "ladimo.checkpoint"),
        (),
    ),
    ("ladimo.auto", ("transformers", "ladimo.model.config", "ladimo.hf"), ()),
    ("ladimo.hf", ("torch", "transformers", "ladimo.model", "ladimo.policy", "ladimo.checkpoint.TensorReader"), ()),
    ("ladimo.convert", None, ("ladimo.cli",)),
    ("ladimo.export", None, ("ladimo.convert", "ladimo.cli")),
    ("ladimo.demo", None, ("ladimo.convert", "ladimo.export", "ladimo.cli")),
    ("server", None, MAKING_HALF),
    ("server.engine", ("torch", "numpy", *SHARED_HALF, "server.engine"), ("ladimo.hf",)),
    ("server.policies", None, ("torch", "server.api", "server.app", *WEB)),
    ("server.text", None, ("torch", "server.api", "server.app", "server.engine", *WEB)),
    ("server.api", None, ("torch", "server.app", "server.settings")),
    (
        "server.metrics",
        (
            *("prometheus_client", "server.engine.messages", "server.engine.request"),
            *("server.exposition", "server.expert_metrics"),
        ),
        (),
    ),
    ("server.expert_metrics", ("server.engine.messages", "server.exposition"), ()),
    ("server.exposition", ("prometheus_client",), ()),
]
SEEN_FROM_API = (
    "ladimo.__version__",
    "ladimo.policy",
    "ladimo.model.config",
    "ladimo.model.rule",
    "server.engine.async_engine",
    "server.engine.messages",
    "server.engine.request",
)


def import_table(module: Module) -> set[str]:
    found = set()
    for room, allowed, forbidden in TABLE:
        if module.within(room):
            found |= module.imported(*forbidden)
            if allowed is not None:
                found |= module.imported_outside(*allowed)
    return found


def shared_half_knows_nothing_of_the_making_half(module: Module) -> set[str]:
    return module.imported(*MAKING_HALF) if module.name == "ladimo" or module.within(*SHARED_HALF) else set()


def server_knows_only_the_shared_half(module: Module) -> set[str]:
    if not module.within("server"):
        return set()
    return {
        name
        for name in module.imported("ladimo")
        if name not in ("ladimo", "ladimo.__version__") and not within(name, *SHARED_HALF)
    }


def asyncio_only_at_the_border_of_the_engine(module: Module) -> set[str]:
    if not module.within("server.engine") or module.name == "server.engine.async_engine":
        return set()
    return module.imported("asyncio", "anyio")


def api_sees_only_values_and_the_border_of_the_engine(module: Module) -> set[str]:
    if not module.within("server.api"):
        return set()
    return module.imported("ladimo", "server.engine") - {"ladimo"} - module.imported(*SEEN_FROM_API)


def environment_only_in_settings(module: Module) -> set[str]:
    # The compiler's cache follows the user's XDG_CACHE_HOME, whoever uses the package.
    if module.name in ("server.settings", "ladimo.model.cpu.cache"):
        return set()
    return uses(module, "os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv")


def nothing_stored_is_executed(module: Module) -> set[str]:
    """No pickle in any disguise, no code from a checkpoint, no text run as code."""
    found = module.imported("pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    found |= uses(module, "torch.load", "torch.save", "torch.hub", "numpy.load", "np.load", "eval", "exec")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            found |= {node.arg} if ast.unparse(node.value) != "False" else set()
    return found


def uses(module: Module, *names: str) -> set[str]:
    """Which of the dotted names the module reads or imports."""
    return (module.names_used | module.imports) & set(names)


def graph(source: Iterable[Module]) -> dict[str, set[str]]:
    """For each module the modules of ours that it imports, wherever in its text, for types alone too."""
    known = {module.name: module for module in source}

    def home(name: str) -> str:
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name

    return {name: {home(each) for each in module.imports} - {"", name} for name, module in known.items()}


def reached(imports: dict[str, set[str]], name: str) -> set[str]:
    """Everything that a module imports, directly or not."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for each in imports.get(waiting.pop(), ()):
            if each not in found:
                found.add(each)
                waiting.append(each)
    return found


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves by way of others."""
    return {name for name in imports if name in reached(imports, name)}


# What a room must not import by way of others either. Policies are values and arithmetic: they need no web framework, and
# `ladimo.policy` needs no torch.
FAR: list[tuple[str, tuple[str, ...]]] = [
    ("ladimo.policy", ("torch", *WEB)),
    ("ladimo", ("server", *WEB)),
    ("server.policies", WEB),
    ("server.text", WEB),
    ("server.engine", WEB),
]


def far_imports(source: Sequence[Module], room: str, forbidden: tuple[str, ...]) -> set[str]:
    """Modules that a room reaches and that import what the room must not."""
    imports = graph(source)
    inside = {module.name for module in source if module.within(room)}
    seen = inside.union(*(reached(imports, name) for name in inside))
    return {module.name for module in source if module.name in seen and module.imported(*forbidden)}


MOST_FILES = 15  # of Python in one package, __init__.py and packages inside apart
MOST_LINES = 400  # of a Python file


def crowded(files: Iterable[Path]) -> dict[str, int]:
    """Folders with more Python files than a reader takes in at a glance."""
    counts = Counter(path.parent.as_posix() for path in files if path.name != "__init__.py")
    return {folder: count for folder, count in counts.items() if count > MOST_FILES}


RULES: list[Callable[[Module], set[str]]] = [
    import_table,
    shared_half_knows_nothing_of_the_making_half,
    server_knows_only_the_shared_half,
    asyncio_only_at_the_border_of_the_engine,
    api_sees_only_values_and_the_border_of_the_engine,
    environment_only_in_settings,
    nothing_stored_is_executed,
]


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule: Callable[[Module], set[str]]) -> None:
    broken = {module.name: sorted(found) for module in modules() if (found := rule(module))}
    assert not broken


def python_files() -> list[Path]:
    packages = ("ladimo", "server", "deploy", "loadtests", "tests")
    return [path.relative_to(ROOT) for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def test_no_folder_is_crowded() -> None:
    assert crowded(python_files()) == {}


def test_a_crowded_folder_is_found() -> None:
    files = [Path(f"a/{number}.py") for number in range(16)] + [Path(f"b/{number}.py") for number in range(15)]
    assert crowded([*files, Path("b/__init__.py"), Path("b/c/0.py")]) == {"a": 16}


def test_no_file_is_long() -> None:
    lengths = {path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert len(lengths) > 300
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph(modules())) == set()


def test_a_circle_is_found() -> None:
    a, b = Module("ladimo.a", "from ladimo.b import x"), Module("ladimo.b", "def f():\n    from ladimo import a")
    assert circles(graph([a, b, Module("ladimo.c", "import ladimo.a")])) == {"ladimo.a", "ladimo.b"}


@pytest.mark.parametrize(("room", "forbidden"), FAR)
def test_rooms_do_not_reach_what_they_must_not_import(room: str, forbidden: tuple[str, ...]) -> None:
    assert far_imports(modules(), room, forbidden) == set()


def test_an_indirect_import_is_found() -> None:
    source = [Module("server.policies.a", "from server.errors import E"), Module("server.errors", "import fastapi.exceptions")]
    assert far_imports(source, "server.policies", WEB) == {"server.errors"}


def test_every_room_is_inhabited() -> None:
    """A row of the table that no module matches would hold nothing."""
    names = [module.name for module in modules()]
    assert [room for room, _, _ in TABLE if not any(within(name, room) for name in names)] == []


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (import_table, "ladimo.checkpoint", "import server"),
        (import_table, "ladimo.convert.pipeline", "from server.engine import core"),
        (import_table, "ladimo.cli", "def f():\n    from fastapi import FastAPI"),
        (import_table, "ladimo.model.moe", "import safetensors.torch"),
        (import_table, "ladimo.model", "from ladimo.policy import LayerRule"),
        (import_table, "ladimo.model.experts", "import numpy"),
        (import_table, "ladimo.policy", "import torch"),
        (import_table, "ladimo.policy", "from ladimo.model.moe import ExpertLayer"),
        (import_table, "ladimo.checkpoint", "import transformers"),
        (import_table, "ladimo.hf", "from ladimo.checkpoint import load_model"),
        (import_table, "ladimo.convert.ffn.split", "import ladimo.cli"),
        (import_table, "server.engine.core", "import fastapi"),
        (import_table, "server.engine.core", "from prometheus_client import Counter"),
        (import_table, "server.engine.config", "import pydantic"),
        (import_table, "server.engine.core", "from server.metrics import Metrics"),
        (import_table, "server.engine.model_runner", "from ladimo.hf import LadimoLlamaConfig"),
        (import_table, "server.policies.store", "import torch"),
        (import_table, "server.text.tokenizer", "from server.api import schemas"),
        (import_table, "server.api.routes.completions", "import torch.nn"),
        (import_table, "server.metrics", "from server.policies.store import PolicyStore"),
        (shared_half_knows_nothing_of_the_making_half, "ladimo", "import ladimo.convert"),
        (shared_half_knows_nothing_of_the_making_half, "ladimo.checkpoint", "from ladimo import convert"),
        (shared_half_knows_nothing_of_the_making_half, "ladimo.hf", "from ladimo.demo.corpus import library_sources"),
        (server_knows_only_the_shared_half, "server.app", "from ladimo import cli"),
        (server_knows_only_the_shared_half, "server.engine.core", "import ladimo.convert.evaluation"),
        (server_knows_only_the_shared_half, "server.text.tokenizer", "from ladimo.demo.train import CHAT_TEMPLATE"),
        (asyncio_only_at_the_border_of_the_engine, "server.engine.core", "import asyncio"),
        (asyncio_only_at_the_border_of_the_engine, "server.engine.scheduling.scheduler", "from asyncio import Queue"),
        (
            api_sees_only_values_and_the_border_of_the_engine,
            "server.api.routes.routing",
            "from server.engine.core import EngineCore",
        ),
        (api_sees_only_values_and_the_border_of_the_engine, "server.api.routes.ops", "from server.engine import core"),
        (
            api_sees_only_values_and_the_border_of_the_engine,
            "server.api.services",
            "from ladimo.model.transformer import MoeTransformer",
        ),
        (environment_only_in_settings, "server.app", "import os\nx = os.environ['A']"),
        (environment_only_in_settings, "ladimo.cli", "import os\nos.environ.setdefault('A', 'b')"),
        (environment_only_in_settings, "ladimo.hf", "from os import environ"),
        (environment_only_in_settings, "ladimo.convert.streamed_model", "import os\nx = os.getenv('A')"),
        (nothing_stored_is_executed, "ladimo.checkpoint", "import pickle"),
        (nothing_stored_is_executed, "ladimo.checkpoint", "def f():\n    from pickle import load"),
        (nothing_stored_is_executed, "ladimo.convert.pipeline", "import torch\nx = torch.load('a')"),
        (nothing_stored_is_executed, "ladimo.convert.pipeline", "from torch import load"),
        (nothing_stored_is_executed, "server.text.tokenizer", "AutoTokenizer.from_pretrained(p, trust_remote_code=True)"),
        (nothing_stored_is_executed, "server.app", "eval('1')"),
    ],
)
def test_rule_can_fail(rule: Callable[[Module], set[str]], name: str, source: str) -> None:
    assert rule(Module(name, source))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "ladimo.model.moe",
            "import math\nimport torch\nfrom torch import nn\nfrom ladimo.model.routing import select_experts",
        ),
        ("ladimo.policy", "import json\nfrom ladimo.model.config import ModelConfig"),
        ("ladimo.convert.pipeline", "from ladimo import checkpoint\nfrom ladimo.demo.corpus import library_sources"),
        ("server.engine.async_engine", "import asyncio\nfrom server.engine.core import EngineCore"),
        ("server.engine.core", "import os\nimport torch\nfrom ladimo.checkpoint import load_model\nx = os.path.sep"),
        ("server.settings", "import os\nx = os.environ"),
        ("server.app", "import ladimo\nfrom ladimo import __version__\nfrom fastapi import FastAPI"),
        (
            "server.api.routes.ops",
            "import asyncio\nfrom server.engine.messages import EngineDead\nfrom ladimo.policy import Frontier",
        ),
        ("server.text.tokenizer", "AutoTokenizer.from_pretrained(p, trust_remote_code=False)\nmodel.eval()"),
    ],
)
def test_rules_accept_what_is_in_order(name: str, source: str) -> None:
    assert [rule(Module(name, source)) for rule in RULES] == [set()] * len(RULES)
