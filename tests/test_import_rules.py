"""Who may import whom: the table of docs/architecture.md, read from the source by the ast module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("coordinator", "agent", "protos", "trainer", "bench", "tests")
CORE_MAY_IMPORT = frozenset(
    [
        "__future__",
        "base64",
        "bisect",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "hmac",
        "itertools",
        "json",
        "math",
        "operator",
        "re",
        "types",
        "typing",
    ]
)
TORCH_FILES_OF_AGENT = frozenset({"rendezvous.py", "elastic.py", "probe.py"})
ADMIN_MAY_IMPORT_OF_OURS = (
    "coordinator.admin",
    "coordinator.jobfile",
    "coordinator.core",
    "coordinator.presign",  # the key of an object store, which `checkpoint restore` reads
    "protos",
    "trainer.config",
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def sources(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name
    )


@pytest.mark.parametrize("path", sources("coordinator/core"), ids=str)
def test_core_imports_only_itself_and_pure_standard_library(path: Path) -> None:
    for module in imports(path):
        assert within(module, "coordinator.core") or module.split(".")[0] in CORE_MAY_IMPORT, (path, module)


@pytest.mark.parametrize("path", sources("coordinator"), ids=str)
def test_coordinator_never_imports_torch_agent_or_trainer(path: Path) -> None:
    for module in imports(path):
        assert not within(module, "torch", "agent", "numpy", "safetensors"), (path, module)
        if within(module, "trainer"):
            assert path.is_relative_to(ROOT / "coordinator/admin"), (path, module)
            assert within(module, "trainer.config"), (path, module)


@pytest.mark.parametrize("path", sources("coordinator/admin"), ids=str)
def test_admin_imports_of_ours_only_protos_and_the_schemas(path: Path) -> None:
    for module in imports(path):
        if within(module, *OURS) and module != "coordinator":
            assert within(module, *ADMIN_MAY_IMPORT_OF_OURS), (path, module)


@pytest.mark.parametrize("path", sources("protos"), ids=str)
def test_protos_imports_nothing_else_of_ours(path: Path) -> None:
    for module in imports(path):
        assert not within(module, "coordinator", "agent", "trainer", "torch"), (path, module)


@pytest.mark.parametrize("path", sources("agent"), ids=str)
def test_agent_imports_only_protos_and_torch_in_three_files(path: Path) -> None:
    for module in imports(path):
        assert not within(module, "coordinator", "trainer"), (path, module)
        if within(module, "torch"):
            assert path.name in TORCH_FILES_OF_AGENT, (path, module)


@pytest.mark.parametrize("path", sources("trainer"), ids=str)
def test_trainer_never_imports_grpc_agent_coordinator_or_pickle(path: Path) -> None:
    for module in imports(path):
        assert not within(module, "grpc", "agent", "coordinator"), (path, module)
        # The one part of the wire contract that is about files, and knows no gRPC.
        assert not within(module, "protos") or within(module, "protos.seal"), (path, module)
        if path.name in {"config.py", "control.py"}:
            assert not within(module, "torch", "numpy"), (path, module)


@pytest.mark.parametrize("path", sources("coordinator", "agent", "trainer", "protos"), ids=str)
def test_nothing_can_unpickle(path: Path) -> None:
    for module in imports(path):
        assert not within(module, "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"), (
            path,
            module,
        )
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert safe.get("weights_only") == "True", (path, ast.unparse(node))


@pytest.mark.parametrize("command", ["coordinator.admin.cli", "coordinator.daemon", "agent.cli"])
def test_commands_start_without_torch(command: str) -> None:
    code = (
        f"import sys, {command} as module\n"
        "sys.argv = ['command', '--help']\n"
        "try:\n    module.main()\n"
        "except SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, timeout=60)
