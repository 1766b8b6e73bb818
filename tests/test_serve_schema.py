"""schemathesis, on the server's own description of itself, finds nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import COLORS, ROOT
from fake_capture import Fake

import runtime

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("websockets")
pytest.importorskip("schemathesis")
from serving import Model, cameras, serving, until  # noqa: E402

from runtime.serve import access  # noqa: E402
from runtime.serve.app import make_app  # noqa: E402
from runtime.serve.openapi import document  # noqa: E402
from runtime.serve.service import Service  # noqa: E402

# No schema says which labels are each other's synonyms, or which texts are given twice.
CONFIG = """
[[operations]]
include-name = "PUT /labels"
checks.positive_data_acceptance.enabled = false
"""
TOKEN = "correct-horse_battery"


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, TOKEN])
def test_schemathesis_finds_nothing(
    bundle: Path, tmp_path: Path, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "GUESSES", 1000)  # it guesses often
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    classifier = runtime.load(
        bundle, labels=list(COLORS), backend="onnxruntime", precision="fp32", threads=1
    )
    with serving(classifier, cameras(classifier, Fake(fps=30)), rate=None, token=token) as site:
        until(lambda: site.get("/ready").status == 200)
        schema = site.get("/openapi.json", Authorization=f"Bearer {TOKEN}").content
        (tmp_path / "openapi.json").write_bytes(schema)
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", "openapi.json",
            "--url", f"http://127.0.0.1:{site.port}", "--max-examples", "10", "--seed", "1",
            "--no-color",
        ]  # fmt: skip
        if token:
            command += ["-H", f"Authorization: Bearer {TOKEN}"]
        run = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": f"{ROOT}/tests",
                 "SCHEMATHESIS_HOOKS": "schemathesis_hooks"},
        )  # fmt: skip
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"Tested: 13", run.stdout), run.stdout[-2000:]


def test_every_address_is_described() -> None:
    app = make_app(Service(cast(Any, Model())))
    described = set(document(1)["paths"])
    found = set()
    while (inner := getattr(app, "_app", None)) is not None:
        app = inner
    for route in app.routes:  # type: ignore[attr-defined]
        found.add(route.path)
    others = {
        path for path in found - described if Path(path).suffix not in (".css", ".js", ".svg")
    }
    assert others == {"/live"}
    assert described <= found
