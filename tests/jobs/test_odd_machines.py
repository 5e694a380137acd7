"""A job on an odd machine labels everything, or says in one line what to change."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

from tests.support.labeljob import put_scene, rows
from tests.support.odd_machines import MACHINES, Machine, has_namespaces, label_on

KEYS = ["a.jpg", "b.png", "weiß-ñ.jpg"]


WHERE = "" if has_namespaces() else ", whose root can be written"


@pytest.mark.parametrize("machine", MACHINES.values(), ids=[f"{name}{WHERE}" for name in MACHINES])
def test_a_job_on_an_odd_machine(machine: Machine, scene_model: Path, tmp_path: Path) -> None:
    if machine.alone and not has_namespaces():
        pytest.skip("this user may not make a root that cannot be written")
    for seed, key in enumerate(KEYS):
        put_scene(tmp_path / "images" / key, seed)
    with tempfile.TemporaryDirectory(prefix="o-", dir="/tmp") as scratch:  # pytest's own is too long for sockets
        (Path(scratch) / ("x" * 40)).mkdir()
        flags = {"input": tmp_path / "images", "output": f"{scratch}/labels", "model": scene_model}
        job = label_on(machine, Path(scratch), Path(scratch), flags)
        assert job.returncode == machine.code, job.stderr
        assert "Traceback" not in job.stderr
        assert re.search(machine.says, job.stderr), job.stderr
        if machine.code == 0:
            found = rows(json.loads(job.stdout))
            assert [(row["key"], row["status"]) for row in found] == [(key, "ok") for key in KEYS]
