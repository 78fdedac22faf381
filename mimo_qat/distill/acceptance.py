"""mimo-qat acceptance --target TARGET --drafter DRAFTER --data answers.jsonl --tree_budgets [16,32,64]

How many drafts the target accepts, by domain and by temperature, over answers that it wrote (`mimo-qat generate-data`):
exact, and without decoding (see `mimo_qat.distill.replay`). Laptop size: --limit 20 --max_length 512
--chunk_anchors 16.

Beside each length stand what would flatter it (an n-gram copier on the same text, repetition, low entropy) and what it
could reach (recall of each slot, an oracle over the candidates, trees). `target_agreement` is the share of tokens that
are the target's most likely ones: at temperature 0 it must be near 1, else the text is not this target's. In bfloat16
one wide forward and decoding may round a near tie another way; in float32 the rounds are those of decoding.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mimo_qat.checkpoint.reader import load_model
from mimo_qat.data import load_tokenizer, pack_rows, read_held_out
from mimo_qat.distill.generate import end_token_ids
from mimo_qat.distill.plots import plot_survival
from mimo_qat.distill.replay import Text, replay, summary
from mimo_qat.models.dflash_files import load_drafter
from mimo_qat.models.draft_tree import TOP_K
from mimo_qat.provenance import command_line, commit, hardware, versions, write_json


@dataclass(kw_only=True)
class AcceptanceConfig:
    """Fields of `mimo-qat acceptance`."""

    target: str
    """checkpoint folder of the target"""
    drafter: str
    """drafter folder, or a release that holds one"""
    data: str
    """rows that the target answered: the held-out ones of a folder of `mimo-qat generate-data`, a .jsonl file or a
    dataset on the hub; the fields "domain" and "temperature" of a row, where it has them, decide where it is counted,
    and "prompt_ids" and "answer_ids" are taken as they are"""
    limit: int | None = None
    """use only the first rows"""
    max_length: int = 2048
    """longest text in tokens, prompt included; longer ones are cut, and the tokens of a packed row"""
    tree_budgets: list[int] = field(default_factory=lambda: [16, 32, 64])
    """nodes of the draft trees to judge; [] leaves trees out"""
    chunk_anchors: int = 128
    """blocks drafted at once; their logits are chunk_anchors x (block_size - 1) x vocabulary x 4 bytes"""
    bf16: bool = True
    """compute in bfloat16, else in float32"""
    output: str | None = None
    """JSON file that gets the document too"""
    plot: str | None = None
    """PNG file of the survival curves of every domain"""

    def __post_init__(self) -> None:
        if any(b < 1 for b in self.tree_budgets):
            raise ValueError(f"tree_budgets is {self.tree_budgets}; a tree has 1 node or more")


def replay_groups(
    config: AcceptanceConfig, target: Any, drafter: Any, tokenizer: Any
) -> dict[tuple[str, float | None], list[Text]]:
    """Replayed texts of each (domain, temperature). Rows of one group are packed together.

    Answers without their token ids are tokenized again, which may give other tokens, and the template ends a cut one.
    """
    groups = defaultdict(list)
    for row in read_held_out(config.data, config.limit):
        groups[row.get("domain", "all"), row.get("temperature")].append(row)
    ends, texts = end_token_ids(target, tokenizer), {}
    for key, rows in sorted(groups.items(), key=str):
        batch = pack_rows(rows, tokenizer, config.max_length)
        texts[key] = replay(target, drafter, batch, ends, config.tree_budgets, config.chunk_anchors)
    if not any(texts.values()):
        raise ValueError(f"{config.data} has no answer of two tokens or more; give rows that the target answered")
    return texts


def breakdown(texts: dict[tuple[str, float | None], list[Text]], cap: int, top_k: int) -> dict[str, Any]:
    """`summary` of all texts, of every domain, of every temperature and of their combinations."""

    def of(chosen: Iterable[list[Text]]) -> dict[str, Any]:
        return summary([t for group in chosen for t in group], cap, top_k)

    domains = sorted({domain for domain, _ in texts})
    temperatures = sorted({t for _, t in texts}, key=lambda t: (t is None, t))
    return {
        "all": of(texts.values()),
        "by_domain": {d: of(v for (domain, _), v in texts.items() if domain == d) for d in domains},
        "by_temperature": {str(t): of(v for (_, at), v in texts.items() if at == t) for t in temperatures},
        "by_domain_and_temperature": {f"{d} T={t}": of([v]) for (d, t), v in texts.items()},
    }


def print_table(rows: dict[str, dict[str, Any]], budgets: list[int]) -> None:
    """One line a group: texts, acceptance with its interval, cap, per prompt, oracle, trees, n-gram, distinct-3."""
    trees = " ".join(f"tree{b:<4d}" for b in budgets)
    print(f"{'':22} {'texts':>6} {'acceptance [95 %]':>20} {'cap':>4} {'mean':>5} {'oracle':>6} {trees} {'n-gram':>6} "
          f"{'dist-3':>6} {'agree':>6} {'loops':>6}")  # fmt: skip
    for name, row in rows.items():
        if "acceptance_length" not in row:
            print(f"{name:22} {row['texts']:6d}  no rounds to count; {row['looping']['texts']} looping texts")
            continue
        low, high = row["acceptance_length_ci95"]
        oracle = next(v for k, v in row.items() if k.startswith("oracle_"))
        trees = " ".join(f"{row['tree'][str(b)]:8.2f}" for b in budgets)
        print(f"{name:22} {row['texts']:6d} {row['acceptance_length']:6.2f} [{low:4.2f}, {high:5.2f}] {row['cap']:4d} "
              f"{row['acceptance_length_mean_over_prompts']:5.2f} {oracle:6.2f} {trees} "
              f"{row['ngram_acceptance_length']:6.2f} {row['distinct_3']:6.2f} {row['target_agreement']:6.3f} "
              f"{row['looping']['texts']:6d}")  # fmt: skip


def main(config: AcceptanceConfig) -> dict[str, Any]:
    """Acceptance of a drafter over answers of its target, by domain and temperature, by exact replay."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    target = load_model(config.target, dtype, device).eval()
    drafter = load_drafter(config.drafter, dtype, device)
    texts = replay_groups(config, target, drafter, load_tokenizer(config.target))
    cap, selector = int(drafter.config.block_size or 0), drafter.candidate_selector
    tables = breakdown(texts, cap, drafter.config.selector_top_k or TOP_K)
    for name in ("by_domain", "by_temperature", "by_domain_and_temperature"):
        print_table(tables[name], config.tree_budgets)
    print_table({"all": tables["all"]}, config.tree_budgets)
    if config.plot:
        survival = {name: row["survival"] for name, row in tables["by_domain"].items() if "survival" in row}
        if len(survival) > 1:
            survival["all"] = tables["all"]["survival"]
        plot_survival(survival, config.plot)
    document = {
        "ok": "acceptance_length" in tables["all"],
        **tables["all"],
        **{k: v for k, v in tables.items() if k != "all"},
        "conditions": {
            "method": "replay of the target's own text; greedy drafts, equality acceptance",
            "aggregate": "pooled: committed tokens / verifications; rounds that the text's end cuts are left out",
            "block": cap,
            "selector": selector is not None,
            "hardware": hardware(),
            "versions": versions(),
            "command": command_line(),
            "commit": commit(),
            "settings": {k: v for k, v in asdict(config).items() if k not in ("output", "plot")},
        },
    }
    if config.output:
        write_json(Path(config.output), document)
    return document
