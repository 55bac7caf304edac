"""A compressed model as its weights, configuration and tokenizer: in memory, on disk, and as an ordinary model."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ctp.architectures.experts import fused, matrices
from ctp.architectures.linears import as_stored, matrix
from ctp.formats.layer import Layer
from ctp.formats.pack import pack, stats, unpack, unpack_each
from ctp.formats.packed import put_packed
from ctp.models.hf import LOCAL, place, quiet, skeleton

PACKED, REST, GENERATION = "compressed.safetensors", "rest.safetensors", "generation_config.json"
_MISLOADED = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass
class Routing:
    """How many calibration tokens were routed to each expert of a compressed model, by the expert's name.

    short: those of `tokens` with fewer than one of their matrices has inputs.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    short: dict[str, int] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Counts for a report; empty where the model has no experts."""
        if not self.tokens:
            return {}
        return {
            "experts": len(self.tokens),
            "experts_short_of_tokens": len(self.short),
            "experts_without_tokens": sum(n == 0 for n in self.tokens.values()),
            "expert_tokens_least": min(self.tokens.values()),
        }

    def notice(self) -> str:
        """One sentence where experts are short of tokens, else ""."""
        if not self.short:
            return ""
        name = min(self.short, key=lambda n: self.short[n])
        return (
            f"{len(self.short)} of {len(self.tokens)} experts were routed fewer calibration tokens than a weight of "
            f"theirs has inputs ({name}: {self.short[name]}); their Hessians are filled up with those of all tokens"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Compressed:
    """What a compressed model consists of.

    packed: tensors of its compressed linears (see `pack`). rest: every other weight by name, tied ones once. config:
    of the plain architecture; `config.dtype` is what the model computes in. generation: defaults for `generate`, None
    without. routing: calibration tokens of each expert, known where the model has just been compressed.
    """

    packed: dict[str, Tensor]
    rest: dict[str, Tensor]
    config: Any
    tokenizer: Any
    generation: Any = None
    routing: Routing = field(default_factory=Routing)

    @classmethod
    def of(cls, model: Any, layers: Mapping[str, Layer], tokenizer: Any) -> "Compressed":
        """A model whose linears have been compressed to `layers` (as `compress_model` gives them).

        Raises ArithmeticError naming the linear where unpacking does not give exactly the weight in the model.
        """
        packed: dict[str, Tensor] = {}
        experts = {m.name: m for m in matrices(model).values()}
        held: set[str] = set()
        for name, layer in layers.items():  # one after the other, where the model is: a GPU does it many times as fast
            m = experts.get(name)
            parameter = m.parameter if m else f"{name}.weight"
            weight = m.of(model.get_parameter(parameter)) if m else matrix(model.get_submodule(name))
            made = pack({name: layer.to(weight.device)})
            if not torch.equal(unpack(made)[name].dense(weight.dtype), weight.detach()):
                raise ArithmeticError(f"{name}: unpacking does not give the model's weight")
            packed |= {field: t.cpu() for field, t in made.items()}
            held.add(parameter)
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})  # to another weight, as the configuration says
        rest = {n: t for n, t in model.state_dict().items() if n not in held | tied}
        rest = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in rest.items()}
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype  # a model that was made and not loaded has none in its config
        return cls(packed, rest, config, tokenizer, model.generation_config)

    @classmethod
    def open(cls, folder: str | Path) -> "Compressed":
        """What `save` wrote into `folder`. Raises ValueError naming the file that is missing or damaged."""
        folder = Path(folder)
        return cls(
            read_tensors(folder / PACKED),
            read_tensors(folder / REST),
            AutoConfig.from_pretrained(folder, **LOCAL),
            AutoTokenizer.from_pretrained(folder, **LOCAL),
            read_generation(folder),
        )

    def __repr__(self) -> str:
        sizes = self.stats()
        return (
            f"<{self.config.model_type}, {sizes['linears']} linears of {sizes['bits_per_weight']:.2f} bits a weight: "
            f"{sizes['linear_ratio']:.2f}x smaller than float16, the model {sizes['model_ratio']:.2f}x>"
        )

    def save(self, folder: str | Path) -> None:
        """Write packed linears, other weights, configuration and tokenizer into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.packed, folder / PACKED)
        save_file(self.rest, folder / REST)
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_generation(self.generation, folder)

    def layers(self, device: str = "cpu") -> Iterator[tuple[str, Layer]]:
        """The compressed linears by module name, unpacked on `device` one after the other."""
        return unpack_each({n: t.to(device) for n, t in self.packed.items()})

    def stats(self) -> dict[str, float]:
        """What it takes on disk, and what that saves, see `ctp.formats.pack.stats`; and the counts of `routing`."""
        return stats(self.packed, self.rest, self.config.dtype) | self.routing.metrics()

    def model(self, device: str = "cpu", packed: bool = False) -> Any:
        """An ordinary Hugging Face model in eval mode, its weights unpacked bit for bit.

        packed: they stay packed on the device and are unpacked at every use, for a model to learn a prompt through in
        less memory. Raises ValueError where the weights are not those of the architecture.
        """
        dtype = self.config.dtype
        # Loaded where it stays: a copy of the model would not fit beside it. Several GPUs: one may not hold it all.
        where = device if torch.cuda.device_count() < 2 else "cpu"
        state = {n: t.to(where, dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in self.rest.items()}
        bare = skeleton(self.config)
        inside = dict(bare.named_modules())
        if packed:
            nothing, experts = torch.zeros((), dtype=dtype), {m.name: m.parameter for m in matrices(bare).values()}
            shapes = {n.removesuffix(".shape"): t.tolist()[:2] for n, t in self.packed.items() if n.endswith(".shape")}
            weights = ((name, nothing.expand(shape)) for name, shape in shapes.items() if name not in experts)
            state |= {
                n: nothing.expand(bare.get_parameter(n).shape) for n in {experts[n] for n in shapes.keys() & experts}
            }
        else:
            weights = ((name, layer.dense(dtype)) for name, layer in self.layers(where))
        linears = ((f"{name}.weight", as_stored(inside.get(name), weight)) for name, weight in weights)
        model = build(self.config, fused(bare, chain(state.items(), linears)), where)
        if packed:
            put_packed(model, self.packed, dtype)
        if self.generation is not None:
            model.generation_config = self.generation
        return place(model, device).eval()


def build(config: Any, state: dict[str, Tensor], device: str = "cpu") -> Any:
    """A model of these weights on `device`, where they are. Raises ValueError naming a weight that is missing, unknown
    or of another shape.
    """
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    with quiet():
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=config.dtype,
            ignore_mismatched_sizes=True, output_loading_info=True,
            device_map=None if device == "cpu" else {"": device},
        )  # fmt: skip
    wrong = [f"{what.removesuffix('_keys')} {sorted(info[what])[:3]}" for what in _MISLOADED if info[what]]
    if wrong:
        raise ValueError(f"these are not the weights of this {kind.__name__}: {', '.join(wrong)}")
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError naming it where it is missing or damaged."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path} is missing or damaged: {e}") from e
    return tensors


def save_model(model: Any, folder: Path) -> None:
    """`model.save_pretrained`, whatever its defaults for generating are."""
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    save_generation(generation, folder)


def read_generation(folder: Path) -> Any:
    """The defaults for `generate` in a folder, None where it has none."""
    return GenerationConfig.from_pretrained(folder) if (folder / GENERATION).is_file() else None


def save_generation(generation: Any, folder: Path) -> None:
    """Defaults for `generate` as they are: transformers' own way refuses what many published models say."""
    if generation is not None:
        (folder / GENERATION).write_text(generation.to_json_string())
