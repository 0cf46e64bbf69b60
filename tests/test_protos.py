"""The checked-in gRPC code is what `make protos` makes, and the contract is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.access import ENROLL_RULES, MAIN_RULES, NOT_SERVED
from coordinator.core.model import Refusal
from protos import agent_pb2
from tests.coordinator.test_rpc_table import methods

ROOT = Path(__file__).parent.parent
PROTOS = ("protos/agent.proto", "protos/admin.proto")


def test_generated_code_is_not_stale(tmp_path: Path) -> None:
    (tmp_path / "protos").mkdir()
    subprocess.run(
        [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            "-I",
            str(ROOT),
            f"--python_out={tmp_path}",
            f"--pyi_out={tmp_path}",
            f"--grpc_python_out={tmp_path}",
            *(str(ROOT / name) for name in PROTOS),
        ],
        check=True,
        cwd=ROOT,
    )
    made = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "protos").iterdir() if "_pb2" in path.name}
    assert made.keys() == kept.keys()
    stale = [name for name in made if made[name] != kept[name]]
    assert not stale, f"run `make protos`: {stale}"


@pytest.mark.parametrize("name", PROTOS)
def test_every_field_and_refusal_has_a_sentence(name: str) -> None:
    previous = ""
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if re.match(r"\s+(repeated |map<|[\w.]+ )?[\w<>, .]*\w+ = \d+;", line):
            assert "//" in line or "/*" in line or previous.strip().startswith("//"), (
                f"{name}:{number}: {line}"
            )
        previous = line


def test_core_refusals_have_the_numbers_of_the_wire() -> None:
    wire = {key.removeprefix("REFUSAL_"): value for key, value in agent_pb2.Refusal.items() if value}
    assert {member.name: int(member) for member in Refusal} == wire


def test_every_rpc_has_a_rule_that_says_who_may_call_it() -> None:
    ruled = set(MAIN_RULES) | ENROLL_RULES
    assert ruled - set(methods()) == set(), "rules for RPCs that no service has"
    assert set(methods()) - ruled == NOT_SERVED, "say in coordinator/access.py who may call it"
