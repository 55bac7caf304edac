"""cluster.yaml for machines of one's own, made as the file says: one part deleted, one uncommented, names filled in."""

from pathlib import Path

FILE = Path(__file__).parents[2] / "cluster.yaml"
AWS, OWN, END = "# ---- AWS.", "# ---- ... to here", "# ----\n"


def on_premises(head: str, workers: list[str], user: str, ssh_key: str) -> str:
    """The text of cluster.yaml with an on-premises provider."""
    text = FILE.read_text()
    before, _, rest = text.partition(AWS)
    _, _, rest = rest.partition(OWN)
    commented, _, after = rest.partition("\n")[2].partition(END)
    own = "".join(line.removeprefix("# ") for line in commented.splitlines(keepends=True))
    own = own.replace("HEAD", head).replace("[WORKER, WORKER]", f"[{', '.join(workers)}]").replace("USER", user)
    return before + own.replace("~/.ssh/id_ed25519", ssh_key) + after
