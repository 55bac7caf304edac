"""What a cell is going to cost, from a stated model: operations, bytes in the store, peak memory of its device.

N parameters, T tokens fed (prompt rows included), h wide, L blocks, V vocabulary entries, b bytes a number:

    a forward pass                2 N T operations
    a learning step               4 N T: forward, and backward to the inputs; frozen weights have no gradient. The
                                  prompt's rows count once a micro-batch: its windows share them
    calibration                   2 x 2 N T for inputs and outputs, 2 T (3 h^2 + f^2) L for Hessians (f: widest input),
                                  and about 2 N h for the solver
    a decoded token               2 N, but bound by memory: counted 20 times
    memory of learning            N b + (6 h + 2 f) L T b: inputs of both norms, queries, keys, values, what attention
                                  gives, and an MLP's gate and up; a chunk of logits in b bytes and in 4; the linears
                                  once more where autocast computes in another dtype than theirs
    memory of the rest            N b + what is fed: V T b of logits, 2 h L T b of keys and values, the Hessians

Tokens of whole texts are their bytes / 4; a task has 1,000 documents unless known here, of four choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ctp.cells import Compression, Generation, Latency, Learned, Perplexity, Solver, SparseGPT, Task
from ctp.cells.cell import Cell, Compress, Evaluate, Learn, requested
from ctp.machine.arithmetic import AUTOCAST, computed_in, cpu_rates
from ctp.models.sources import Facts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DECODE = 20
# Bytes of text: of a split as a whole, and of a document where a study takes so many.
TEXTS = {("wikitext2", "train"): 10_900_000, ("wikitext2", "validation"): 1_150_000, ("wikitext2", "test"): 1_290_000,
         ("ptb", "train"): 5_100_000, ("ptb", "validation"): 400_000, ("ptb", "test"): 450_000}  # fmt: skip
DOCUMENT = 2_200  # mean of C4
WHOLE = 2_000_000  # a text that nothing is known of
# (documents, tokens of one request) of tasks, counted on their real files with Llama's tokenizer, roughly.
TASKS = {"openbookqa": (500, 20), "hellaswag": (10_042, 100), "piqa": (1_838, 40),
         "mmlu_high_school_european_history": (165, 420)}  # fmt: skip
CHOICES = 4
CHUNK = 2**24  # logits that exist at a time
SHARE = 0.6  # of the rate of matrix products on a CPU: what learning and compressing a model of 135M parameters reach
LOADING = 1.0  # seconds of a cell besides, on a CPU


@dataclass(frozen=True)
class Cost:
    """flops: operations. stored: bytes that its artifact takes. memory: peak bytes on its device."""

    flops: float
    stored: float
    memory: float

    def hours(self, tflops: float) -> float:
        """Hours of a device that does so many 10^12 operations a second."""
        return self.flops / (tflops * 1e12) / 3600


@dataclass(frozen=True)
class Pace:
    """How fast cells are assumed to be computed where nothing was measured.

    flops: operations a second by number type. loading: seconds that every cell takes besides. about: says so.
    """

    flops: Mapping[str, float]
    loading: float
    about: str

    def seconds(self, cell: Cell, cost: Cost) -> float:
        """What the cell takes; nothing where it computes nothing."""
        return self.loading + cost.flops / self.flops[requested(cell)] if cost.flops else 0.0


def gpu_pace(tflops: float) -> Pace:
    """A GPU that sustains so many 10^12 operations a second in whatever it computes."""
    return Pace(dict.fromkeys(BYTES, tflops * 1e12), 0.0, f"{tflops:g} TFLOP/s a GPU, assumed (--tflops)")


def cpu_pace(cores: int) -> Pace:
    """So many cores of this machine's CPU for a cell, from its rate of matrix products."""
    rates = cpu_rates()
    flops = {dtype: SHARE * cores * rates[computed_in(dtype, "cpu")] for dtype in BYTES}
    return Pace(flops, LOADING, f"{SHARE:.0%} of the {cores * rates['float32'] / 1e9:.0f} GFLOP/s that float32 matrix "
                f"products reach here on {cores} core{'s' * (cores > 1)}, and {LOADING:g} s a cell")  # fmt: skip


def of(cell: Cell, facts: Facts, batch: int = 4) -> Cost:
    """The cost of a cell on its model; `batch` windows a forward pass in evaluations."""
    if isinstance(cell, Compress):
        return _compress(cell, facts)
    if isinstance(cell, Learn):
        return _learn(cell, facts)
    assert isinstance(cell, Evaluate)
    return _evaluate(cell, facts, batch)


def _hidden(facts: Facts) -> int:
    return min(facts.in_features, default=facts.width)


def _compress(cell: Compress, facts: Facts) -> Cost:
    n, linear, b = facts.parameters, facts.linear_parameters, BYTES[cell.model.dtype]
    if cell.calibration is None:
        return Cost(0, 0, n * b)
    tokens, h, inner = (
        (cell.calibration.count or 128) * cell.calibration.seq_len,
        _hidden(facts),
        max(facts.in_features),
    )
    hessians = 2 * tokens * (3 * h**2 + inner**2) * facts.layers
    stored = linear * bits(cell.compression, 8 * b) / 8 + (n - linear) * b
    memory = n * b + 2 * tokens * h * b + 3 * 4 * (h**2 + inner**2)
    return Cost(2 * 2 * linear * tokens + hessians + 2 * linear * h, stored, memory)


def bits(compression: Compression, full: int) -> float:
    """Bits a weight of a solver's result takes, scales left out; `full` where it is not quantized."""
    width = getattr(compression, "bits", None) or full
    if not isinstance(compression, SparseGPT) or not isinstance(compression, Solver):
        return float(width)
    zeros = compression.sparsity
    if zeros is None:
        least, of_all = compression.n_of_m
        zeros = least / of_all
    return (1 - zeros) * width + 1  # a bit says which are kept


def _learn(cell: Learn, facts: Facts) -> Cost:
    spec, n, b = cell.recovery, facts.parameters, BYTES[cell.source.model.dtype]
    if not isinstance(spec, Learned):
        return Cost(0, 4 * getattr(spec, "k", 100) * facts.width, n * b)
    tokens = spec.batch * spec.text.seq_len + spec.accumulate * spec.prompt_rows
    looks = spec.steps // spec.validate_every + 1
    judged = (spec.validation.count or _tokens(spec.validation) // spec.validation.seq_len) * (
        spec.validation.seq_len + spec.prompt_rows
    )
    rank, blocks = getattr(spec, "r", 0), getattr(spec, "layers", None) or facts.layers
    trained = spec.prompt_rows * facts.width + 4 * rank * _hidden(facts) * blocks
    computed = AUTOCAST.get(spec.precision, cell.source.model.dtype)
    cast = BYTES[computed] * facts.linear_parameters if computed != cell.source.model.dtype else 0
    fed = tokens / spec.accumulate
    kept = (6 * _hidden(facts) + 2 * max(facts.in_features, default=facts.width)) * facts.layers * fed * BYTES[computed]
    activations = kept + max(CHUNK, facts.vocab) * (BYTES[computed] + 4)
    return Cost(
        4 * n * tokens * spec.steps + 2 * n * judged * looks, 4 * trained, n * b + cast + activations + 16 * trained
    )


def _evaluate(cell: Evaluate, facts: Facts, batch: int) -> Cost:
    measure, n, b = cell.measure, facts.parameters, BYTES[cell.target.model.dtype]
    rows = getattr(cell.recovery.recovery, "k", 0) if cell.recovery else 0
    decoded = 0.0
    if isinstance(measure, Perplexity):
        windows = measure.text.count or _tokens(measure.text) // measure.text.seq_len
        fed, at_once = windows * (measure.text.seq_len + rows), batch * (measure.text.seq_len + rows)
    elif isinstance(measure, Task):
        documents, length = TASKS.get(measure.name, (1000, 100))
        fed, at_once = min(documents, measure.limit or documents) * CHOICES * (length + rows), batch * (length + rows)
    elif isinstance(measure, Latency):
        rounds = (measure.warmup + measure.repeats) * measure.batch
        fed, at_once, decoded = rounds * (measure.seq_len + rows), measure.seq_len + rows, rounds * measure.new_tokens
    elif isinstance(measure, Generation):
        asked = len(measure.questions.splitlines())
        fed, at_once, decoded = asked * (32 + rows), batch * (32 + rows), asked * measure.new_tokens
    else:
        fed = at_once = rows
    held = facts.vocab * at_once * b + 2 * _hidden(facts) * facts.layers * at_once * b
    return Cost(2 * n * (fed + DECODE * decoded), 10_000, n * b + held)


def _tokens(text: object) -> int:
    name, split, documents = (getattr(text, n) for n in ("dataset", "split", "documents"))
    return (DOCUMENT * documents if documents else TEXTS.get((name, split), WHOLE)) // 4
