"""The ingress starts with neither torch nor Ray."""

import subprocess
import sys


def test_the_ingress_imports_neither_torch_nor_ray() -> None:
    script = (
        "import sys, serving.ingress; "
        "print(sorted({'torch', 'ray', 'diffusers', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
