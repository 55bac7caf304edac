"""MLflow with something of everything that a report shows, and with what strangers would write into it; its parser."""

from html.parser import HTMLParser

from support.paperruns import Writer

from analysis import paper

EVIL = '<script>document.title="owned"</script><img src="http://evil.example/x.png" onerror="alert(1)">'
QUESTION = "Where is Tulsa?"


def entry(table, **where):
    """The first entry of a table that measures this."""
    return next(e for e in paper.entries(table) if where.items() <= e.where.items())


def tags(name, **more):
    return {"mlflow.runName": name, "ctp.key": "0" * 64, "ctp.git_commit": "c0ffee" * 6 + "abcd", **more}


def everything(uri):
    """MLflow with something of everything: perplexities, learning, answers, latencies, words, and a failure."""
    writer = Writer(uri, {"a": EVIL}, ["table2", "figure1", "figure6", "figure9"])
    writer.paper("table2", factor=1.2)
    moved = entry("figure5", source="gptq-3bit", target="gptq-4bit", dataset="ptb")
    for seed in (0, 1):
        writer.write(
            moved, ppl(9.0 + 2 * seed), {"seed": seed, "spec.recovery.recovery.seed": seed}, {"ctp.studies": "figure5"}
        )
    answer = [{"question": f"{QUESTION} {EVIL}", "answer": f"{EVIL}\x00\x1b[31m \ud83d in Oklahoma", "tokens": 9}]
    for target in ("dense", "sparsegpt-62.5"):
        writer.write(entry("figure1", target=target, recovery="none"), {"questions": 1}, None, tags("answers"),
                     {"answers.json": answer})  # fmt: skip
    for k in (0, 50, 100):
        timed = {"prefill_seconds": 0.1 + k / 1e4, "prefill_seconds_iqr": 0.01, "decode_seconds_per_token": 0.03,
                 "decode_seconds_per_token_iqr": 0.002}  # fmt: skip
        own = {
            "k": k,
            "recovery": "random_prompt" if k else "none",
            "source": "untrained" if k else "none",
            "target": EVIL,
        }
        writer.write(entry("figure6"), timed, own, tags(f"latency {k}"))
    edges = [i / 50 - 1 for i in range(101)]
    near = {"nearest": [{"row": 0, "word": EVIL, "token": "x", "id": 7, "cosine": 0.5}],
            "histogram": {"edges": edges, "counts": [0] * 55 + [3, 5, 2] + [0] * 42}}  # fmt: skip
    writer.write(entry("figure9"), {"fraction_below_0.16": 0.4, "max_cosine": 0.5}, None, tags("words"),
                 {"neighbours.json": near})  # fmt: skip
    learn(writer)
    failed = writer.write(entry("table8", k=25), ppl(3.0), None, tags("failed cell", **{"ctp.error": EVIL}),
                          {"traceback.txt": "Traceback: " + EVIL})  # fmt: skip
    writer.client.set_terminated(failed, "FAILED")
    return uri


def ppl(value):
    return {"ppl": value, "ppl_paper": value, "nll_sum": 1.0, "scored_tokens": 1, "positions": 1, "seconds": 2.0}


def learn(writer):
    learned = entry("table6", measure="learn", recovery="soft_prompt")
    said = {"trainable_parameters": 512000, "seconds": 3600, "initial_val_loss": 3.0, "best_val_loss": 2.5}
    run = writer.write(learned, said, {"recovery_label": "soft_prompt-k100-c4"}, tags("a prompt"))
    for step, loss in ((0, 3.0), (10, 2.75), (20, 2.5)):
        writer.client.log_metric(run, "train/val_loss", loss, step=step)


class Parsed(HTMLParser):
    """Every tag with its attributes, and the text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._in = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in.append(tag)

    def handle_endtag(self, tag):
        self._in.pop() if self._in[-1:] == [tag] else None

    def handle_data(self, data):
        if self._in[-1:] not in (["style"], ["script"]):
            self.words.append(data)
