"""What tests share: see the names."""

import json
import subprocess
import sys


def command(module, *args):
    return [sys.executable, "-m", module, *map(str, args)]


def run(module, *args, cwd):
    return subprocess.run(command(module, *args), cwd=cwd, capture_output=True, text=True, timeout=180, check=False)


def manifests(folder):
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("results/store/*/*/manifest.json")
            if p.parent.parent.name not in ("partial", ".tmp")}  # fmt: skip
