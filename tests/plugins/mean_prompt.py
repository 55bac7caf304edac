"""A recovery method of one's own: a prompt of averages. A grid says `method: mean_prompt` and the fields below."""

from typing import TYPE_CHECKING, ClassVar, Literal

from ctp.plugin import PositiveInt, Recovery, Windows

if TYPE_CHECKING:
    from ctp.plugin import LearnJob


class MeanPrompt(Recovery):
    """k rows: row i is the mean embedding of the i-th of k equal parts of every window of `text`."""

    learned: ClassVar[bool] = False  # no compressed weights are asked: made once for a model
    method: Literal["mean_prompt"] = "mean_prompt"
    k: PositiveInt = 4
    text: Windows

    def recover(self, job: "LearnJob") -> dict[str, float]:
        import torch  # here: planning a grid does not wait for it

        from ctp.plugin import save_prompt

        embedding, ids = job.model.get_input_embeddings(), job.windows(self.text).to(job.device)
        with torch.no_grad():
            rows = [embedding(part).mean((0, 1), dtype=torch.float32) for part in ids.tensor_split(self.k, dim=1)]
        save_prompt(job.folder, torch.stack(rows), job.model_name)
        return {"trainable_parameters": 0, "prompt_tokens": self.k}
