"""The summed next-token loss behind a prompt, and the fastest way to compute its gradient.

If the architecture allows, a batch is one row of positions, the prompt's and then every window's. The head, the
log-softmax and their gradient run a chunk of positions at a time: no tensor of batch x window x vocabulary exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel

from ctp.architectures.head import head_of
from ctp.kernels.attention import NAME, Layout, Scratch
from ctp.kernels.modules import replaced, replacements
from ctp.machine.memory import ran_out
from ctp.prompts.agreement import TOLERANCE, alike, computed, other_tokens, unmoved
from ctp.prompts.attach import scored_logits, scored_states, summed_nll
from ctp.prompts.prefix import Prefix, prefix

# Logits that exist at a time. A GPU needs many to be busy; on a CPU more only take memory.
CHUNK = {"cpu": 2**22, "cuda": 2**26}
SHORT = 16  # tokens of a window whose gradient is compared
CACHED = 2**20  # logits that are exponentiated together on a CPU: in fp32 they stay in its cache


class _LinearNLL(Function):
    """Sum of -log softmax(h W^T)[target] over the rows of h (n, d), a float64 scalar, and its gradient for h.

    With E = exp(z - max z) and S its row sums, the loss of a row is log S + max z - z_target, its gradient
    E W / S - W_target. E is rounded to h's dtype for its product; S and the loss are sums in fp32 and float64.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        chunks = -(-len(hidden) * len(weight) // CHUNK.get(hidden.device.type, CHUNK["cuda"]))
        rows = -(-len(hidden) // chunks)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logits = hidden.new_empty(rows, len(weight))
        for i in range(0, len(hidden), rows):
            some, target = hidden[i : i + rows], targets[i : i + rows]
            z = torch.mm(some, weight.T, out=logits[: len(some)])
            chosen = z.gather(1, target[:, None]).float()
            top, sums = _exponentials(z)
            total += (sums.log() + top - chosen).sum(dtype=torch.float64)
            if grad is not None:
                grad[i : i + rows] = torch.mm(z, weight).float().div_(sums).sub_(weight[target])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None, None


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of z (n, V), the maxima and the sums of exp(z - maximum), both (n, 1) in fp32; z becomes exp(...)."""
    rows = len(z) if z.device.type != "cpu" else max(1, CACHED // z.shape[1])
    tops, sums = z.new_empty(2, len(z), 1, dtype=torch.float32)
    for part, top, total in zip(z.split(rows), tops.split(rows), sums.split(rows), strict=True):
        top.copy_(part.amax(1, keepdim=True))
        e = part.float().sub_(top).exp_()
        torch.sum(e, 1, keepdim=True, out=total)
        if e is not part:
            part.copy_(e)
    return tops, sums


def linear_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p (nats) of targets (n,) under softmax(hidden W^T): hidden (n, d), weight (V, d); a float64 scalar.

    Differentiable in hidden alone.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearNLL.apply(hidden, weight, targets)


@dataclass(frozen=True)
class Objective:
    """The summed loss of windows behind a prompt through one model, as `choose` finds it best computed.

    packed: prompt and windows are one row of positions, through ctp.kernels; else the prompt is a prefix of keys and
    values. headless: the head is a matrix and nothing else, applied in chunks. recompute: what can be computed again
    is not kept for the backward pass.
    """

    model: PreTrainedModel
    packed: bool
    headless: bool
    recompute: bool = False
    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model computes so: around `nll` and its backward pass."""
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        try:
            if self.packed:
                config._attn_implementation = NAME
            with replaced(replacements(self.model, self.packed, self.recompute)):
                yield
        finally:
            config._attn_implementation = before

    def nll(self, windows: Tensor, prompt: Tensor | None) -> Tensor:
        """Sum of -log p (nats) of x_1 .. x_{s-1} of each window (b, s) behind the prompt (k, d): a float64 scalar."""
        if not self.headless:
            return summed_nll(scored_logits(self.model, windows, self._front(prompt, windows.shape[1] - 1)), windows)
        states = self.states(windows, prompt).flatten(0, 1)
        weight = self.model.get_output_embeddings().weight
        return linear_nll(states.to(weight.device), weight, windows[:, 1:].flatten().to(weight.device))

    def states(self, windows: Tensor, prompt: Tensor | None, layout: Layout | None = None) -> Tensor:
        """The head's input (b, s - 1, d) at x_0 .. x_{s-2} of each window. layout: see `layout`."""
        if not self.packed:
            return scored_states(self.model, windows, self._front(prompt, windows.shape[1] - 1))
        ids = windows[:, :-1]
        layout = layout or self.layout(windows, prompt)
        rows = self.model.get_input_embeddings()(ids.flatten())
        if prompt is not None:
            rows = torch.cat([prompt.to(rows.device, rows.dtype), rows])
        out = self.model.base_model(
            inputs_embeds=rows[None], position_ids=layout.positions(rows.device), use_cache=False, layout=layout
        )
        return out.last_hidden_state[0, layout.k :].unflatten(0, ids.shape)

    def layout(self, windows: Tensor, prompt: Tensor | None) -> Layout:
        """The one row of positions of the prompt and the windows (b, s)."""
        b, s = windows.shape
        return Layout(0 if prompt is None else len(prompt), b, s - 1, not self.recompute, self.scratch)

    def _front(self, prompt: Tensor | None, tokens: int) -> Tensor | Prefix | None:
        """A block that is computed again would put its keys into the prefix's cache again."""
        return prompt if prompt is None or self.recompute else prefix(self.model, prompt, tokens)


def choose(model: PreTrainedModel, windows: Tensor, prompt: Tensor | None, recompute: bool = False) -> Objective:
    """The fastest objective that agrees with the model's own forward pass on windows like the first of these (n, s).

    Runs in the caller's precision and autocast.
    """
    head = head_of(model)
    headless = type(head) is nn.Linear and head.bias is None
    plain = Objective(model, packed=False, headless=headless, recompute=recompute)
    if not headless:
        return plain
    packed = replace(plain, packed=True)
    window = windows[:1].to(model.get_input_embeddings().weight.device)
    try:
        agrees = _reads_alike(packed, window, prompt) and _learns_alike(packed, window[:, :SHORT], prompt)
    except Exception as e:  # attention of another kind, arguments that the model does not take, shapes that do not fit
        if ran_out(e):
            raise
        return plain
    return packed if agrees else plain


def _reads_alike(packed: Objective, window: Tensor, prompt: Tensor | None) -> bool:
    """Are the hidden states of two windows (1, s) in one row those of each alone, and does neither see the other?

    A layer that mixes positions in another way (states, convolutions) calls no packed attention, or sees both.
    """
    model, (one, two, three) = packed.model, _apart(packed.model, window)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    with torch.no_grad():
        wanted = torch.cat([scored_states(model, w, prompt) for w in (one, two)])
        with packed.active():
            layout = packed.layout(torch.cat([one, two]), prompt)
            found = packed.states(torch.cat([one, two]), prompt, layout)
            moved = packed.states(torch.cat([three, two]), prompt)
    each = len(layout.calls) == len(set(layout.calls)) == layers
    return each and alike(model, found, wanted) and unmoved(model, moved[1], found[1])


def _learns_alike(packed: Objective, window: Tensor, prompt: Tensor | None) -> bool:
    """Is the gradient of two short windows' loss the model's own? In fp32 only: other dtypes round too much."""
    model = packed.model
    inside = [p for p in model.parameters() if p.requires_grad]
    if computed(model) != torch.float32 or (prompt is None and not inside):
        return True
    windows = torch.cat(_apart(model, window)[:2])
    front = None if prompt is None else prompt.detach().clone().requires_grad_()
    learned = inside if front is None else [front, *inside]
    with torch.enable_grad():
        alone = [summed_nll(scored_logits(model, w, front), w) for w in windows.split(1)]  # a batch may be too large
        wanted = _gradient(torch.stack(alone).sum(), learned)
        with packed.active():
            found = _gradient(packed.nll(windows, front), learned)
    return float((found - wanted).norm()) <= TOLERANCE[torch.float32] * float(wanted.norm())


def _apart(model: PreTrainedModel, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The window (1, s) and two made-up ones that differ from it, and from each other, at every place."""
    return window, other_tokens(model, window), other_tokens(model, window, 2)


def _gradient(loss: Tensor, learned: list[Tensor]) -> Tensor:
    """One vector; zero where the loss does not depend on what is learned."""
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    pairs = zip(found, learned, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().cpu() for g, p in pairs])
