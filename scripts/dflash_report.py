"""python scripts/dflash_report.py drafter-*.json --peers drafters.json --benches bench-*.json --out docs/results/dflash

Joins what dflash_study.py, compare_drafters.py and `mimo-runtime bench` measured: writes OUT.json (a list of records)
and OUT.png (how many drafts are accepted), and prints the tables of docs/results/dflash.md. With --keep, records
of an earlier file that these do not measure (other answers, peers) stay, with their own commit and conditions.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from study import MADE, made_by, markdown

from mimo_qat.distill.plots import plot_survival
from mimo_qat.provenance import with_earlier, write_json

LONG = ("plain b8", "best b16")
CODE = "code T=0.0"
TABLES = {  # title: arms, the first is what the others differ from
    "Head, blocks of 16": (
        *("short b8", "short b16", "short b16 conv", "short b16 selector", "short b16 conv + selector"),
        *("short b16 all", "short b16 all, tv at the end"),
    ),
    "Loss": ("short b8", "short b8 dpace", "short b8 ce, tv at the end", "short b8 dpace, tv at the end"),
    "Taps": (
        *("short b8 taps with the last layer", "short b8 taps without the last layer", "short b8 last layer alone"),
    ),
    "Layers": ("short b8", "short b8 1 layer", "short b8 2 layers"),
    "Optimizer": ("short b8", "short b8 adamw", "short b8 adamw 6e-4"),
    "Text": ("short b8", "short b8 raw text"),
}  # fmt: skip


def join(paths: Sequence[str]) -> dict[str, Any]:
    """One document of several; ValueError where they are of different answers."""
    docs = [json.loads(Path(p).read_text()) for p in paths]
    whole = {"runs": {}, "left_out": {}, "made": {}} | {k: docs[0][k] for k in (*MADE, "data")}
    for path, doc in zip(paths, docs, strict=True):
        if doc["data"] != whole["data"]:
            raise ValueError(f"{path} and {paths[0]} were trained on different answers; compare drafters of one target")
        whole["runs"] |= doc["runs"]
        whole["left_out"] |= doc["left_out"]
        whole["made"] |= {name: made_by(doc, name) for name in doc["runs"]}
    return whole


def length(row: dict[str, Any]) -> str:
    low, high = row["acceptance_length_ci95"]
    return f"{row['acceptance_length']:.2f} ({low:.2f} to {high:.2f})"


def arms_table(doc: dict[str, Any], names: Iterable[str]) -> str:
    """Markdown of arms on held-out greedy code; those that were not measured are named below it."""
    rows, absent = [], []
    for name in names:
        run = doc["runs"].get(name)
        if run is None:
            absent.append(f"{name} ({doc['left_out'].get(name, 'not run')})")
            continue
        code = run["code"]
        sizes = [f"{run['tokens'] / 1e6:.1f} M", f"{run['parameters'] / 1e6:.1f} M"]
        rows.append([name, *sizes, length(code), str(code["cap"]), f"{code['recall_at_1'][0]:.1%}",
                     f"{run['tokens_per_s'] or 0:,}", f"{run['peak_gb'] or 0:.1f}"])  # fmt: skip
    header = ("arm", "tokens", "parameters", "acceptance length", "cap", "slot 1 right", "tokens/s", "peak GB")
    return markdown(header, rows) + "".join(f"\n\nNot measured: {a}" for a in absent)


def domains_table(doc: dict[str, Any]) -> str:
    """Markdown of the long runs by domain and temperature, with what each length has to be read beside."""
    rows = []
    for name in LONG:
        groups = doc["runs"].get(name, {}).get("tables", {}).get("by_domain_and_temperature", {})
        for group, row in groups.items():
            if "acceptance_length" in row:
                trees = [f"{row['tree'][b]:.2f}" for b in sorted(row["tree"], key=int)]
                rows.append([f"{name}, {group}", str(row["texts"]), length(row), *trees, f"{row['oracle_16']:.2f}",
                             f"{row['ngram_acceptance_length']:.2f}", f"{row['distinct_3']:.2f}",
                             str(row["looping"]["texts"])])  # fmt: skip
    budgets = next((sorted(r["code"]["tree"], key=int) for n, r in doc["runs"].items() if n in LONG), [])
    header = ("drafter, domain", "texts", "chain", *(f"tree of {b}" for b in budgets))
    return markdown((*header, "oracle of 16", "n-gram", "distinct-3", "looping texts"), rows)


def records(doc: dict[str, Any], peers: dict[str, Any] | None, benches: dict[str, dict]) -> list[dict[str, Any]]:
    """The named figures first, then every arm, peer and bench."""

    def record(name: str, value: float, unit: str, made: dict[str, Any], **more: Any) -> dict[str, Any]:
        conditions = {"hardware": made["hardware"], "versions": made["versions"], "data": doc["data"], "seed": 0}
        figure = {"name": name, "value": value, "unit": unit, "conditions": conditions | more}
        return figure | {key: made[key] for key in ("command", "commit")}

    out, code = [], {n: doc["runs"][n]["tables"]["by_domain_and_temperature"][CODE] for n in LONG if n in doc["runs"]}
    unit = "tokens/verification"
    for figure, name in (("al_dflash_b8_code", "plain b8"), ("al_best_chain_code", "best b16")):
        if name in code:
            beside = _beside(code[name], doc["runs"][name])
            out.append(record(figure, code[name]["acceptance_length"], unit, doc["made"][name], **beside))
    if "best b16" in code:
        budget, best = max(code["best b16"]["tree"].items(), key=lambda item: item[1])
        beside = _beside(code["best b16"], {}) | {"tree_budget": int(budget)}
        out.append(record("al_tree_code", best, unit, doc["made"]["best b16"], **beside))
    if peers:
        theirs = {k: peers.get(k, "compare_drafters.py") for k in MADE}  # older files do not say how they were called
        rates = {k: r["tokens_per_s"] for k, r in peers["runs"].items() if "tokens_per_s" in r}
        ours = [k for k in rates if "/ours" in k]
        ratios = {k: max(rates[o] for o in ours if o.rpartition("/")[0] == k.rpartition("/")[0]) / rates[k]
                  for k in rates if k not in ours}  # fmt: skip
        if ratios:
            worst = min(ratios, key=lambda k: ratios[k])
            out.append(record("train_speed_vs_peer", ratios[worst], "ratio", theirs, against=worst, ratios=ratios))
        for name, run in peers["runs"].items():
            if "tokens_per_s" in run:  # one that failed has no speed; the printed table says why
                kept = {k: v for k, v in run.items() if k != "loss"}
                out.append(record(f"training {name}", run["tokens_per_s"], "tokens/s", theirs, **kept))
    for name, run in doc["runs"].items():
        more = {k: run[k] for k in ("changes", "tokens", "parameters", "tokens_per_s", "peak_gb", "curve")}
        more["code"] = run["code"]
        out.append(record(f"acceptance {name}", run["code"]["acceptance_length"], unit, doc["made"][name], **more))
    for name, bench in benches.items():
        out += [r | {"name": f"{name} {r['name']}"} for r in bench["records"]]
    return out


def _beside(row: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    kept = ("cap", "acceptance_length_ci95", "texts", "survival", "ngram_acceptance_length", "oracle_16", "distinct_3")
    return {k: row[k] for k in kept} | {k: run[k] for k in ("tokens", "parameters") if k in run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="JSON files of dflash_study.py")
    parser.add_argument("--peers", help="JSON file of compare_drafters.py")
    parser.add_argument("--benches", nargs="*", default=[], help="JSON files of mimo-runtime bench --output")
    parser.add_argument("--keep", help="earlier records, for what these files did not measure")
    parser.add_argument("--out", required=True, help="path without suffix")
    options = parser.parse_args()
    doc = join(options.studies)
    peers = json.loads(Path(options.peers).read_text()) if options.peers else None
    benches = {Path(p).stem: json.loads(Path(p).read_text()) for p in options.benches}
    write_json(f"{options.out}.json", with_earlier(records(doc, peers, benches), options.keep, "acceptance "))
    print(domains_table(doc))
    for title, names in {"Long runs": LONG, **TABLES}.items():
        print(f"\n## {title}\n\n{arms_table(doc, names)}")
    if peers:
        header = ("arm", "tokens/s", "step", "peak GB", "held-out prefix length")
        rows = [[name, f"{r['tokens_per_s']:,.0f}", f"{1e3 * r['step_seconds']:.0f} ms", f"{r['peak_gb'] or 0:.1f}",
                 f"{r['held_out']['eval_prefix_length']:.2f}"] if "held_out" in r
                else [name, "failed", "", "", r.get("error", "").strip().splitlines()[-1][:120]]
                for name, r in peers["runs"].items()]  # fmt: skip
        print(f"\n## Peers\n\n{markdown(header, rows)}")
    for name, bench in benches.items():
        rates = [bench["plain_tokens_per_second"], bench.get("tokens_per_second")]
        rates.append(bench.get("tree", {}).get("tokens_per_second"))
        said = ("without a drafter", "with chains", "with trees")
        print(f"\n{name}: " + ", ".join(f"{r:.0f} tokens/s {s}" for r, s in zip(rates, said, strict=True) if r))
    curves = {n: doc["runs"][n]["code"]["survival"] for n in LONG if n in doc["runs"]}
    if curves:
        plot_survival(curves, f"{options.out}.png")


if __name__ == "__main__":
    main()
