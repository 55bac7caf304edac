"""What a cell is going to cost, from a stated model: operations, bytes in the store, peak memory of its device.

A forward pass takes 2 operations for each parameter and token (prompt rows included), and a learning step 4: forward,
and backward to the inputs; frozen weights have no gradient. The prompt's rows count once a micro-batch: its windows
share them. Learning keeps of every block the inputs of both norms, queries, keys, values, what attention gives, and
the MLP's gate and up.

Tokens of whole texts are their bytes / 4; a task has 1,000 documents unless known here, of four choices.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ctp.cells import Compression, Generation, Latency, Learned, Measure, Perplexity, SparseGPT, Task
from ctp.cells.cell import Cell, Compress, Evaluate, Learn
from ctp.cells.inputs import Windows
from ctp.machine.arithmetic import computed_in, cpu_rates
from ctp.models.sources import Facts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a number
DECODE = 20  # a decoded token takes as long as so many that are read
# Bytes of text: of a split as a whole, and of a document where a study takes so many.
TEXTS = {("wikitext2", "train"): 10_900_000, ("wikitext2", "validation"): 1_150_000, ("wikitext2", "test"): 1_290_000,
         ("ptb", "train"): 5_100_000, ("ptb", "validation"): 400_000, ("ptb", "test"): 450_000}  # fmt: skip
DOCUMENT = 2_200  # mean of C4
UNKNOWN_TEXT = 2_000_000
# (documents, tokens of one request) of tasks, counted on their real files with Llama's tokenizer, roughly.
TASKS = {"openbookqa": (500, 20), "hellaswag": (10_042, 100), "piqa": (1_838, 40),
         "mmlu_high_school_european_history": (165, 420)}  # fmt: skip
UNKNOWN_TASK = (1_000, 100)
CHOICES = 4  # requests for each document of a task
QUESTION = 32  # tokens
UNKNOWN_ROWS = 100  # of a recovery that is not learned and has no k
LOGITS = 2**24  # that exist at a time while a prompt is learned
RESULT = 10_000  # bytes of an evaluation's numbers
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

    flops: operations a second by number type. loading: seconds that every cell takes besides. about: the assumption.
    """

    flops: Mapping[str, float]
    loading: float
    about: str

    def seconds(self, cell: Cell, cost: Cost) -> float:
        """What the cell takes; nothing where it computes nothing."""
        return self.loading + cost.flops / self.flops[cell.dtype] if cost.flops else 0.0


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
    return _learn(cell, facts) if isinstance(cell, Learn) else _evaluate(cell, facts, batch)


def _widths(facts: Facts) -> tuple[int, int]:
    """The hidden size and the widest input of a linear."""
    sizes = facts.in_features or (facts.width,)
    return min(sizes), max(sizes)


def _compress(cell: Compress, facts: Facts) -> Cost:
    linear, number_bytes = facts.linear_parameters, BYTES[cell.dtype]
    weight_bytes = facts.parameters * number_bytes
    if cell.calibration is None:
        return Cost(flops=0, stored=0, memory=weight_bytes)
    tokens = (cell.calibration.count or 128) * cell.calibration.seq_len
    hidden, widest = _widths(facts)
    forward_flops = 2 * 2 * linear * tokens  # a block's inputs, then its outputs with compressed weights
    hessian_flops = 2 * tokens * (3 * hidden**2 + widest**2) * facts.layers
    solver_flops = 2 * linear * hidden
    packed_bytes = linear * bits(cell.compression, 8 * number_bytes) / 8
    other_bytes = (facts.parameters - linear) * number_bytes
    activation_bytes = 2 * tokens * hidden * number_bytes  # inputs and outputs of a block
    hessian_bytes = 3 * 4 * (hidden**2 + widest**2)
    return Cost(
        flops=forward_flops + hessian_flops + solver_flops,
        stored=packed_bytes + other_bytes,
        memory=weight_bytes + activation_bytes + hessian_bytes,
    )


def bits(compression: Compression, full: int) -> float:
    """Bits a weight of a solver's result takes, scales left out; `full` where it is not quantized."""
    width = float(getattr(compression, "bits", None) or full)
    if not isinstance(compression, SparseGPT):
        return width
    zeros, of = (compression.sparsity, 1) if compression.sparsity is not None else compression.n_of_m
    return (1 - zeros / of) * width + 1  # a bit for each weight tells whether it is kept


def _learn(cell: Learn, facts: Facts) -> Cost:
    recovery, weight_bytes = cell.recovery, facts.parameters * BYTES[cell.model.dtype]
    if not isinstance(recovery, Learned):
        return Cost(flops=0, stored=4 * getattr(recovery, "k", UNKNOWN_ROWS) * facts.width, memory=weight_bytes)
    rows, number_bytes = recovery.prompt_rows, BYTES[cell.dtype]
    step_tokens = recovery.batch * recovery.text.seq_len + recovery.accumulate * rows
    step_flops = 4 * facts.parameters * step_tokens
    validation_tokens = _windows(recovery.validation) * (recovery.validation.seq_len + rows)
    validation_flops = 2 * facts.parameters * validation_tokens
    validations = recovery.steps // recovery.validate_every + 1
    hidden, widest = _widths(facts)
    rank, blocks = getattr(recovery, "r", 0), getattr(recovery, "layers", None) or facts.layers
    trained = rows * facts.width + 4 * rank * hidden * blocks  # two low-rank matrices for queries, two for values
    micro_batch_tokens = step_tokens / recovery.accumulate
    activation_bytes = (6 * hidden + 2 * widest) * facts.layers * micro_batch_tokens * number_bytes
    logit_bytes = max(LOGITS, facts.vocab) * (number_bytes + 4)  # as they are computed, and in float32
    cast_bytes = facts.linear_parameters * number_bytes if cell.dtype != cell.model.dtype else 0  # under autocast
    optimizer_bytes = 16 * trained  # the parameter, its gradient and both moments, 4 bytes each
    return Cost(
        flops=step_flops * recovery.steps + validation_flops * validations,
        stored=4 * trained,
        memory=weight_bytes + cast_bytes + activation_bytes + logit_bytes + optimizer_bytes,
    )


def _evaluate(cell: Evaluate, facts: Facts, batch: int) -> Cost:
    number_bytes, (hidden, _) = BYTES[cell.dtype], _widths(facts)
    read, at_once, decoded = _tokens(cell.measure, cell.prompt_rows, batch)
    weight_bytes = facts.parameters * number_bytes
    logit_bytes = facts.vocab * at_once * number_bytes
    cache_bytes = 2 * hidden * facts.layers * at_once * number_bytes  # keys and values
    return Cost(
        flops=2 * facts.parameters * (read + DECODE * decoded),
        stored=RESULT,
        memory=weight_bytes + logit_bytes + cache_bytes,
    )


def _tokens(measure: Measure, rows: int, batch: int) -> tuple[int, int, int]:
    """Tokens that an evaluation reads in all, those of them in one forward pass, and tokens that it decodes.

    rows: of the prompt in front of every input.
    """
    if isinstance(measure, Perplexity):
        length = measure.text.seq_len + rows
        return _windows(measure.text) * length, batch * length, 0
    if isinstance(measure, Task):
        documents, request = TASKS.get(measure.name, UNKNOWN_TASK)
        length = request + rows
        return min(documents, measure.limit or documents) * CHOICES * length, batch * length, 0
    if isinstance(measure, Latency):
        rounds, length = (measure.warmup + measure.repeats) * measure.batch, measure.seq_len + rows
        return rounds * length, length, rounds * measure.new_tokens
    if isinstance(measure, Generation):
        questions, length = len(measure.questions.splitlines()), QUESTION + rows
        return questions * length, batch * length, questions * measure.new_tokens
    return rows, rows, 0


def _windows(text: Windows) -> int:
    """How many windows of a text are read."""
    if text.count:
        return text.count
    size = DOCUMENT * text.documents if text.documents else TEXTS.get((text.dataset, text.split), UNKNOWN_TEXT)
    return size // 4 // text.seq_len
