"""mimo-runtime bench runs/demo/release --limit 6 --max_new_tokens 64

Decoding speed of one sequence with and without the drafter, on the same prompts in turn, and what the drafter's
acceptance is made of; with `--tree_budget N` also with trees of N drafts. The acceptance length counts the model's own
token after the drafts, so it lies in [1, block]; it is printed beside what would make it look good for free: an n-gram
copier on the same text, and how repetitive the text is. Rounds that a stop token or the budget cut short are left out.
What a round's time and bytes are made of comes beside its roofline, and as a chart with `--plot`. `--synthetic flash`
measures a published geometry without its weights. The last line is one JSON document, which `--output` keeps in a file;
its "records" are the figures for model cards and docs/results/.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mimo_qat.drafting import bootstrap_interval, distinct_3, lookup_rounds, mean_rounds, survival
from mimo_qat.provenance import command_line, commit, hardware, versions, write_json
from mimo_runtime.breakdown import broken_down, plot_breakdown, print_breakdown
from mimo_runtime.config import KERNELS, BenchConfig
from mimo_runtime.engine import Engine, Generation
from mimo_runtime.parallel import Alone
from mimo_runtime.prompts import Prompt, encode, load_prompts, load_tokenizer
from mimo_runtime.synthetic import SyntheticEngine, described, drafter_config, dry_run, model_config, random_prompts
from mimo_runtime.trace import traced

NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25}  # logit gap that rounding can turn; 0.25 is two bfloat16 steps at 16..32

SYNTHETIC_PROMPTS = 3


def acceptance(rounds: Sequence[Sequence[int]], block: int) -> dict[str, Any]:
    """Statistics of rounds (`mimo_qat.drafting`), one list a prompt. `survival[k]` is the share of rounds that accept
    at least k + 1 drafts, `hit_rate[k]` the share that does so among those that accepted k."""
    prompts = [r for r in rounds if r]
    if not prompts:
        return {"length": None, "rounds": 0, "cap": block}
    shares, hits = survival(prompts, block)
    return {
        "length": mean_rounds(prompts),
        "ci95": bootstrap_interval(prompts),
        "length_mean_of_prompts": statistics.fmean(sum(p) / len(p) for p in prompts),
        "cap": block,
        "rounds": sum(map(len, prompts)),
        "survival": shares,
        "hit_rate": hits,
    }


def whole_rounds(generation: Generation) -> list[int]:
    """Tokens of each round that the budget did not cut; a stop token ends a round as it ends the text."""
    rounds = generation.rounds
    last = len(rounds) - 1 if generation.finish == "stop" else None
    return [len(r.tokens) for i, r in enumerate(rounds) if not r.cut or i == last]


def read_bandwidth(device: torch.device) -> float:
    """Measured GB/s of summing a large tensor: the roofline of batch-1 decoding."""
    size = 1 << 26
    if device.type == "cuda":  # 4 GiB, or half of what the model has left
        size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 8)
    big = torch.ones(size, device=device)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        float(big.sum())
        best = max(best, big.nbytes / (time.perf_counter() - began) / 1e9)
    return best


def compare(engine: Engine, prompt: list[int], plain: list[int], drafted: list[int]) -> dict[str, Any]:
    """Whether two outputs are the same; else where they part, and by how little the model preferred its choice."""
    at = next((i for i, (a, b) in enumerate(zip(plain, drafted, strict=False)) if a != b), None)
    if at is None:
        return {"identical": len(plain) == len(drafted), "near_tie": len(plain) == len(drafted)}
    top = engine.last_logits(prompt + plain[:at]).topk(2).values
    gap = float(top[0] - top[1])
    return {"identical": False, "at": at, "gap": gap, "near_tie": gap < NEAR_TIE[engine.cfg.dtype]}


def _summary(runs: list[dict[str, Any]], block: int) -> dict[str, Any]:
    """Statistics of the prompts in `runs`, each with its outputs `plain` and (with a drafter) `drafted`."""
    plain = [r["plain"] for r in runs]
    out: dict[str, Any] = {
        "prompts": len(runs),
        "tokens": sum(len(g.tokens) for g in plain),
        "plain_tokens_per_second": _speed(plain),
        "plain_step_ms": _step(plain),
        "prefill_tokens_per_second": sum(r["prefilled"] for r in runs) / sum(g.prefill_seconds for g in plain),
        "distinct_3": sum(distinct_3(g.tokens) for g in plain) / len(plain),
        "lookup_length": acceptance([lookup_rounds(r["ids"], r["plain"].tokens, block) for r in runs], block)["length"],
    }
    if "drafted" in runs[0]:
        out |= _drafting([r["drafted"] for r in runs], out["plain_tokens_per_second"], block)
    if "tree" in runs[0]:
        out["tree"] = _drafting([r["tree"] for r in runs], out["plain_tokens_per_second"], block)
    return out


def _drafting(drafted: list[Generation], plain: float, block: int) -> dict[str, Any]:
    speed = _speed(drafted)
    return {
        "tokens_per_second": speed,
        "step_ms": _step(drafted),
        "speedup": speed / plain,
        "acceptance": acceptance([whole_rounds(g) for g in drafted], block),
    }


def _speed(generations: list[Generation]) -> float:
    seconds = sum(g.decode_seconds for g in generations)
    return sum(len(g.tokens) - 1 for g in generations) / seconds if seconds else 0.0


def _step(generations: list[Generation]) -> float | None:
    """Median milliseconds of a round, which a machine that stalls now and then does not spoil."""
    seconds = [s for g in generations for s in g.round_seconds]
    return 1e3 * statistics.median(seconds) if seconds else None


def forced_drafts(length: float | None) -> list[int] | None:
    """Drafts to accept in each round, as `generate` takes them, for an acceptance length: a cycle of 100 rounds of its
    two neighbours, evenly mixed. The length counts the model's own token after the drafts."""
    if length is None:
        return None
    hundredths = round(100 * (length - 1))
    return [(hundredths * (i + 1) + 50) // 100 - (hundredths * i + 50) // 100 for i in range(100)]


def ways(engine: Engine, cfg: BenchConfig) -> dict[str, dict[str, Any]]:
    """The ways to decode that are compared, as arguments of `generate`: plainly, with chains, with trees."""
    out: dict[str, dict[str, Any]] = {"plain": {"speculate": False}}
    if cfg.forced_acceptance is not None and cfg.forced_acceptance > engine.block:
        raise ValueError(f"forced_acceptance is {cfg.forced_acceptance}; a block of {engine.block} cannot yield more")
    forced = forced_drafts(cfg.forced_acceptance)
    if engine.drafter is not None or forced is not None:
        out["drafted"] = {"tree": False, "forced_acceptance": forced}
    if cfg.tree_budget:
        out["tree"] = {"tree": True, "forced_acceptance": forced}
    return out


def measure(engine: Engine, prompts: list[tuple[Prompt, list[int]]], cfg: BenchConfig) -> list[dict[str, Any]]:
    """Runs every prompt plainly, with chains and with trees, in turn, so that a slow minute of the machine hits all."""
    how = ways(engine, cfg)
    # A warm-up of each way, not counted: the first round loads kernels, or captures the graph of its way alone; so does
    # the first prompt of a size.
    for way in how.values():
        for ids in {engine.padded(len(ids)): ids for _, ids in prompts}.values():
            engine.generate(ids, _short(cfg), **way)
    runs = []
    for i, (prompt, ids) in enumerate(prompts):
        prefilled = len(ids) if cfg.context is None else 0
        run: dict[str, Any] = {"domain": prompt.domain, "ids": ids, "prefilled": prefilled}
        run |= {name: engine.generate(ids, cfg, **way) for name, way in how.items()}
        run["equality"] = [
            {"prompt": i, "way": name} | compare(engine, ids, run["plain"].tokens, run[name].tokens)
            for name in how
            if name != "plain"
        ]
        runs.append(run)
        if sys.stderr.isatty():
            print(f"\rprompt {i + 1}/{len(prompts)}", end="\n" * (i + 1 == len(prompts)), file=sys.stderr, flush=True)
    return runs


def _breakdown(engine: Engine, runs: list[dict[str, Any]], cfg: BenchConfig, gb_per_s: float) -> dict[str, Any]:
    """Of each way, on the prompt with the most rounds; {} where no prompt has a round."""
    run = max(runs, key=lambda r: len(r["plain"].tokens))
    if len(run["plain"].tokens) == 1:
        print("no prompt had a round after its first token, so there is no breakdown; raise max_new_tokens")
        return {}
    return {
        name: broken_down(engine, run["ids"], cfg, [r[name] for r in runs], gb_per_s, **way)
        for name, way in ways(engine, cfg).items()
    }


def _traces(engine: Engine, runs: list[dict[str, Any]], cfg: BenchConfig) -> dict[str, Any] | None:
    """Of each way, on the prompt with the most tokens, beside the file that `cfg` names; None where it names none."""
    if cfg.trace is None:
        return None
    ids, path = max(runs, key=lambda r: len(r["plain"].tokens))["ids"], Path(cfg.trace)
    found = {}
    for name, way in ways(engine, cfg).items():
        found[name] = traced(engine, ids, cfg, path.with_name(f"{path.stem}-{name}.json"), **way)
        print("trace, {}: {kernels} kernels a round; between two rounds the device waited {host_us:.1f} us, at most "
              "{host_us_most:.1f}".format(name, **found[name]))  # fmt: skip
    return found


def _short(cfg: BenchConfig) -> BenchConfig:
    return replace(cfg, max_new_tokens=min(16, cfg.max_new_tokens))


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'':10} {'prompts':>7} {'plain t/s':>10} {'drafter t/s':>11} {'speedup':>8} {'acceptance [95 %]':>22} "
          f"{'mean':>5} {'n-gram':>6} {'distinct-3':>10}")  # fmt: skip
    for name, row in rows.items():
        line = f"{name:10} {row['prompts']:7d} {row['plain_tokens_per_second']:10.1f} "
        a = row.get("acceptance")
        if a and a["rounds"]:
            interval = f"{a['length']:.2f} [{a['ci95'][0]:.2f}, {a['ci95'][1]:.2f}] / {a['cap']}"
            line += f"{row['tokens_per_second']:11.1f} {row['speedup']:7.2f}x {interval:>22} "
            line += f"{a['length_mean_of_prompts']:5.2f} "
        else:
            line += f"{'-':>11} {'-':>8} {'-':>22} {'-':>5} "
        print(line + f"{row['lookup_length'] or 0:6.2f} {row['distinct_3']:10.2f}")
    for name, row in rows.items():
        if "tree" in row and row["tree"]["acceptance"]["rounds"]:
            tree, a = row["tree"], row["tree"]["acceptance"]
            print(
                f"{name:10} with trees: {tree['tokens_per_second']:.1f} tokens/s ({tree['speedup']:.2f}x), acceptance "
                f"{a['length']:.2f} [{a['ci95'][0]:.2f}, {a['ci95'][1]:.2f}], step {tree['step_ms']:.1f} ms"
            )
    a = rows["all"].get("acceptance")
    if a and a["rounds"]:
        print("slot                " + " ".join(f"{k + 1:5d}" for k in range(len(a["survival"]))))
        print("accepted up to it   " + " ".join(f"{s:5.3f}" for s in a["survival"]))
        print("hit when reached    " + " ".join("    -" if h is None else f"{h:5.3f}" for h in a["hit_rate"]))


def _opened(cfg: BenchConfig) -> tuple[Engine, list[tuple[Prompt, list[int]]]]:
    """The engine and its prompts, of a folder or of a geometry alone."""
    if cfg.synthetic is None:
        assert cfg.folder is not None
        tokenizer = load_tokenizer(cfg.folder)
        prompts = [(p, encode(tokenizer, p.text, cfg.chat)) for p in load_prompts(cfg.prompts, cfg.limit)]
        return Engine(cfg.folder, cfg), prompts
    config = model_config(cfg.synthetic, cfg.layers)
    draft_config, routing = drafter_config(cfg, config), cfg.uniform_routing
    engine = SyntheticEngine(config, draft_config, cfg, uniform_routing=routing, ranks=cfg.ranks, context=cfg.context)
    # A rank alone embeds its own tokens only: the others' rows would be zeros, which a GPU multiplies faster.
    alone = isinstance(engine.ranks, Alone)
    vocab_size = len(engine.target.embed) if alone else engine.target.geometry.vocab_size
    ids = random_prompts(vocab_size, cfg.context or cfg.prompt_tokens, cfg.limit or SYNTHETIC_PROMPTS, cfg.seed)
    return engine, [(Prompt("", "random"), prompt) for prompt in ids]


def _print_labels(engine: Engine, cfg: BenchConfig) -> None:
    """What a reader must not overlook: the figures below are not of a trained model, or not of its drafter."""
    if cfg.synthetic is not None:
        routing = "uniform routing" if cfg.uniform_routing else "a random router"
        drafter = f"a drafter on {len(engine.drafter.taps)} taps" if engine.drafter else "no drafter"
        print(f"SYNTHETIC {described(cfg, cfg.synthetic)}; random weights, {routing}, {drafter}")
    if isinstance(engine.ranks, Alone):
        print(f"ONE RANK of {engine.ranks.size}: its share of the work, no collectives; the tokens mean nothing")
    if cfg.context is not None:
        print(f"SYNTHETIC CACHE of {cfg.context:,} tokens: random keys and values instead of a prefill")
    if cfg.forced_acceptance is not None:
        print(f"FORCED acceptance length {cfg.forced_acceptance}: drafts are the model's own tokens, not the drafter's")


def main(cfg: BenchConfig) -> dict[str, Any]:
    """Measures decoding speed with and without the drafter, and how much of its drafts is accepted."""
    if cfg.dry_run:
        return dry_run(cfg)
    if cfg.trace is not None and not cfg.cuda_graphs:
        raise ValueError("trace shows rounds as CUDA graphs; add --cuda_graphs true, or leave it out")
    if cfg.trace is not None:  # a folder that cannot be made is known before minutes of measuring
        Path(cfg.trace).parent.mkdir(parents=True, exist_ok=True)
    engine, prompts = _opened(cfg)
    runs = measure(engine, prompts, cfg)
    by_domain = defaultdict(list)
    for run in runs:
        by_domain[run["domain"]].append(run)
    rows = {"all": _summary(runs, engine.block)}
    if len(by_domain) > 1:
        rows |= {name: _summary(members, engine.block) for name, members in by_domain.items()}
    _print_labels(engine, cfg)
    _print_table(rows)
    if cfg.context is None:
        print(f"prefill {rows['all']['prefill_tokens_per_second']:,.0f} tokens/s")
    bandwidth = read_bandwidth(engine.device)
    breakdown = _breakdown(engine, runs, cfg, bandwidth)
    print_breakdown(breakdown, engine.ranks.size)
    traces = _traces(engine, runs, cfg)
    need = breakdown["plain"]["bytes_per_round"] if breakdown else 0
    used = need * rows["all"]["plain_tokens_per_second"] / 1e9
    print(f"plain decoding reads {used:,.1f} GB/s of {bandwidth:,.1f} measured")
    equal = [e for r in runs for e in r["equality"]]
    different = [e for e in equal if not e["identical"]]
    if equal:
        for way in dict.fromkeys(e["way"] for e in equal):
            same = [e["identical"] for e in equal if e["way"] == way]
            print(f"output without drafts and {way}: {sum(same)} of {len(same)} identical")
        for e in different[:3]:
            print(f"  {e['way']} parts at token {e.get('at')}, where the logit gap is {e.get('gap', 0):.2g}")
    made = conditions(engine, asdict(cfg))
    document = {
        "ok": all(e["near_tie"] for e in different),
        **rows["all"],
        "domains": {k: v for k, v in rows.items() if k != "all"},
        "identical": not different if equal else None,
        "divergences": different,
        "forced_acceptance": cfg.forced_acceptance,
        "synthetic": None if cfg.synthetic is None else described(cfg, cfg.synthetic),
        "synthetic_context": cfg.context,
        "roofline": {"bytes_per_token": need, "gb_per_s": used, "measured_gb_per_s": bandwidth},
        "breakdown": breakdown,
        "traces": traces,
        "conditions": made,
        "records": _records(rows["all"], made),
    }
    if engine.ranks.rank == 0:
        if cfg.plot and breakdown:
            plot_breakdown(breakdown, _title(engine, cfg), cfg.plot)
        if cfg.output:
            write_json(cfg.output, document)
    return document


def _title(engine: Engine, cfg: BenchConfig) -> str:
    title = str(cfg.folder) if cfg.synthetic is None else f"synthetic {described(cfg, cfg.synthetic)}"
    title += f", ONE RANK of {engine.ranks.size}" * isinstance(engine.ranks, Alone)
    title += f", SYNTHETIC CACHE of {cfg.context} tokens" * (cfg.context is not None)
    return title + f", FORCED acceptance {cfg.forced_acceptance}" * (cfg.forced_acceptance is not None)


def _records(row: dict[str, Any], made: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of all prompts; those of drafting are absent where there was none."""
    settings = made["settings"]
    kept = ["max_new_tokens", "temperature", "dtype", "device", "seed", "forced_acceptance", "prompts"]
    kept += ["tree_budget", "tree_adaptive", "cuda_graphs", "rounds_ahead", *KERNELS]
    if settings["synthetic"] is not None:
        kept += ["synthetic", "layers", "uniform_routing", "context" if settings["context"] else "prompt_tokens"]
    where = {k: settings[k] for k in kept if settings[k] is not None} | {"prompts_run": row["prompts"]}
    where |= {
        "block": made["block"],
        "ranks": made["ranks"],
        **({"one_rank": True} if made["one_rank"] else {}),
        "ngram_lookup": row["lookup_length"],
        **made["hardware"],
        **made["versions"],
    }
    figures = {
        "tokens_per_s_no_draft": (row["plain_tokens_per_second"], "tokens/s"),
        "tokens_per_s": (row.get("tokens_per_second"), "tokens/s"),
        "prefill_tokens_per_s": (row["prefill_tokens_per_second"] or None, "tokens/s"),
        "acceptance_length": (row.get("acceptance", {}).get("length"), "tokens/verify"),
        "tree_tokens_per_s": (row.get("tree", {}).get("tokens_per_second"), "tokens/s"),
        "tree_acceptance_length": (row.get("tree", {}).get("acceptance", {}).get("length"), "tokens/verify"),
    }
    return [record(n, value, unit, where, made) for n, (value, unit) in figures.items() if value is not None]


def record(name: str, value: float, unit: str, where: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """A figure as docs/results/ and model cards hold it: measured under `where`, by the command of `conditions`."""
    figure = {"name": name, "value": value, "unit": unit, "conditions": where}
    return figure | {"command": made["command"], "commit": made["commit"]}


def conditions(engine: Engine, settings: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on: machine, versions, command, commit and settings."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "block": engine.block,
        "ranks": engine.ranks.size,
        "collectives": engine.ranks.collectives,
        "one_rank": isinstance(engine.ranks, Alone),
        "command": command_line().replace("__main__.py", "mimo-runtime", 1),
        "commit": commit(),
        "settings": {k: v for k, v in settings.items() if k not in ("output", "plot", "trace")}
        | {"device": str(engine.device)},
    }
