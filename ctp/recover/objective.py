"""The loss that is learned by: summed next-token loss behind a prompt, and how its gradient is computed.

A batch is one row of positions, the prompt's and then every window's, where the architecture allows it; the head and
the log-softmax run a chunk of scored positions at a time, and their gradient is taken at once: no tensor of
batch x window x vocabulary is ever there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel

from ctp.recover.attach import scored_logits, scored_states, summed_nll
from ctp.recover.attention import NAME, Layout
from ctp.recover.fused import replaced, replacements
from ctp.recover.head import head_of
from ctp.recover.prefix import Prefix, prefix
from ctp.recover.scratch import Scratch

# Largest difference of a hidden state, relative to the largest one, at which two computations of it are the same.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Logits that exist at a time. A GPU needs many to be busy; on a CPU more only take memory.
CHUNK = {"cpu": 2**22, "cuda": 2**26}
CACHED = 2**20  # logits that are exponentiated together on a CPU: in fp32 they stay in its cache


class _LinearNLL(Function):
    """Sum of -log softmax(h W^T)[target] over the rows of h (n, d), a float64 scalar; its gradient for h on the way.

    With E = exp(z - max z) and S its row sums, the loss of a row is log S + max z - z_target, its gradient
    E W / S - W_target. E is rounded to h's dtype for its product, S and the loss are sums in fp32 and float64.
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
    """The maxima of the rows of z (n, V) and the sums of exp(z - maximum), both (n, 1) in fp32; z becomes these
    exponentials, rounded to its dtype once they are summed.
    """
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

    Differentiable in hidden alone. Under autocast the product is in its dtype.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearNLL.apply(hidden, weight, targets)


@dataclass(frozen=True)
class Objective:
    """The summed loss of windows behind a prompt through one model; `choose` says how it is computed.

    packed: prompt and windows are one row of positions, norms and gated MLPs are ctp's own; else the prompt is a prefix
    of keys and values. headless: the head is its matrix and nothing else, and no more logits than a chunk exist.
    recompute: what can be computed again does not wait for the backward pass.
    """

    model: PreTrainedModel
    packed: bool
    headless: bool
    recompute: bool = False
    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The model computes in this way: around `nll` and its backward pass."""
        config = self.model.config
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
            return summed_nll(scored_logits(self.model, windows, self._front(prompt)), windows)
        states = self.states(windows, prompt).flatten(0, 1)
        weight = self.model.get_output_embeddings().weight
        return linear_nll(states.to(weight.device), weight, windows[:, 1:].flatten().to(weight.device))

    def states(self, windows: Tensor, prompt: Tensor | None) -> Tensor:
        """What the head is given (b, s - 1, d) at x_0 .. x_{s-2} of each window."""
        if not self.packed:
            return scored_states(self.model, windows, self._front(prompt))
        ids = windows[:, :-1]
        b, t = ids.shape
        layout = Layout(0 if prompt is None else len(prompt), b, t, not self.recompute, self.scratch)
        rows = self.model.get_input_embeddings()(ids.flatten())
        if prompt is not None:
            rows = torch.cat([prompt.to(rows.device, rows.dtype), rows])
        out = self.model.base_model(
            inputs_embeds=rows[None], position_ids=layout.positions(rows.device), use_cache=False, layout=layout
        )
        return out.last_hidden_state[0, layout.k :].unflatten(0, ids.shape)

    def _front(self, prompt: Tensor | None) -> Tensor | Prefix | None:
        """A block that is computed again would put its keys into the prefix's cache again."""
        return prompt if prompt is None or self.recompute else prefix(self.model, prompt)


def choose(model: PreTrainedModel, windows: Tensor, prompt: Tensor | None, recompute: bool = False) -> Objective:
    """The fastest objective that agrees with the model's own forward pass, tried on the first of the windows (n, s).

    Runs in the caller's precision and autocast.
    """
    head = head_of(model)
    if type(head) is not nn.Linear or head.bias is not None:
        return Objective(model, packed=False, headless=False, recompute=recompute)
    packed = Objective(model, packed=True, headless=True, recompute=recompute)
    window = windows[:1].to(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        wanted = scored_states(model, window, prompt)
        try:
            with packed.active():
                found = packed.states(window, prompt)
        except (NotImplementedError, TypeError):  # another kind of attention; arguments that the model does not take
            return replace(packed, packed=False)
    far = float((found - wanted).abs().max() / wanted.abs().max())
    return packed if far <= TOLERANCE[_computed(model)] else replace(packed, packed=False)


def _computed(model: PreTrainedModel) -> torch.dtype:
    device = model.get_input_embeddings().weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
