"""mimo-qat evaluate --model runs/moe --candidates '[QAD=runs/qat, runs/release]' --output_dir runs/evaluation

What quantization cost and what training won back, token by token: KL(reference || row) of the next-token distributions
over the whole vocabulary, on packed held-out text. Every candidate stands beside
    reference     the BF16 model itself; its KL is exactly 0
    noise         the BF16 model once more, with another batch size and order of the rows: what no one can beat
    FP8 block     its experts in 128x128 FP8 blocks, the quantization that people accept
    RTN <rule>    its experts rounded to nearest MXFP4, under each of the four scale rules
and `gap closed` puts a row on the line from RTN (0) to the noise floor (1). Text also gives top-1 agreement,
perplexity, agreement of the routers and error of the weights; `--tasks '[humaneval, reasoning_gym]'` adds answers that
are right or wrong. All comparisons are paired: the same windows, the same items, the same resampling. evaluate.json has
everything, evaluate.md the tables, and figures are drawn where matplotlib is installed.

Logits are float32 products of BF16 states with the BF16 head. In BF16, logits of 16 to 32 are 1/8 apart; by estimate
that alone could put up to 1e-3 nats between two equal models, so figures from BF16 logits are not comparable.

Other benchmarks run on the same values as plain weights, in a folder where transformers finds the model's code:
    mimo-qat convert --target runs/qat --out runs/plain --dialect bf16
    lm-eval run --model hf --model_args pretrained=runs/plain,trust_remote_code=True --tasks gsm8k --log_samples
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from mimo_kernels import fp8, mxfp4
from mimo_qat import data, statistics
from mimo_qat.evaluate_report import markdown, plot_all, survival
from mimo_qat.models.experts import TokenCounts, expert_parameters, transposed_experts
from mimo_qat.models.load import body_and_head, final_hidden, load_for_training
from mimo_qat.provenance import atomic_write, commit, hardware, versions, write_json, write_provenance
from mimo_qat.qat.objective import next_tokens

REFERENCE, NOISE, FP8_ROW = "reference", "noise", "FP8 block"
STEP = 2**26  # weights that are compared or quantized at once
Experts = dict[str, nn.Parameter]


@dataclass(kw_only=True)
class EvaluateConfig:
    """KL, agreement and tasks of candidates against their BF16 reference, beside noise and plain quantization."""

    model: str
    """BF16 reference folder: what every row is compared with"""
    output_dir: str
    """folder to write: evaluate.json, evaluate.md, figures"""
    candidates: list[str] = field(default_factory=list)
    """folders to judge, each FOLDER or NAME=FOLDER: QAD outputs in BF16, releases in MXFP4 or FP8"""
    dataset_name: str = "stdlib"
    """held-out text: a packed .safetensors file of `mimo-qat pack`, a .jsonl file, a hub dataset, or "stdlib" """
    held_out: float = 0.1
    """fraction of rows, chosen by a hash of the prompt, that is held out; 1 if nothing was trained on the dataset"""
    rows: int = 64
    """packed rows to evaluate; each is one window of the bootstrap"""
    max_length: int = 1024
    """tokens a packed row; a packed file has its own"""
    batch_size: int = 8
    """packed rows a forward pass"""
    baselines: bool = True
    """compute the rows of plain quantization; without them there is no gap to close"""
    scale_rule: mxfp4.Rule = "even"
    """MXFP4 rule of the RTN row that gap closed, changed codes, paired tests and tasks refer to"""
    tasks: list[Literal["humaneval", "reasoning_gym"]] = field(default_factory=list)
    """generated answers to score, greedy, for the reference, the RTN row and every candidate"""
    task_limit: int | None = None
    """items of each task; all of HumanEval, 50 of each reasoning-gym task without it"""
    max_new_tokens: int = 512
    """longest answer in tokens"""
    task_batch_size: int = 64
    """prompts a batch of the tasks"""
    allow_code_execution: bool = False
    """run the programs that the models write; humaneval needs it. Limits of time and memory are no security sandbox"""
    device: str = "auto"
    """cuda where there is one, else cpu"""
    seed: int = 0
    """of the split, the choice of rows and the bootstrap"""


# ---- data


def evaluation_rows(config: EvaluateConfig, tokenizer: Any) -> data.Packed:
    """`config.rows` packed held-out rows, drawn by the seed; ValueError where there are fewer than two."""
    if config.dataset_name.endswith(".safetensors"):
        held_out = data.load_packed(config.dataset_name)[1]
    else:
        rows = data.read_split(config.dataset_name, config.held_out, config.seed)[1]
        # A row of text fills a packed row at best; tokenizing all of a large dataset would outlast the evaluation.
        rows = rows[: 4 * config.rows * max(1, config.max_length // 256)]
        held_out = data.pack_rows(rows, tokenizer, config.max_length)
    count = len(held_out["input_ids"])
    if count < 2:
        raise ValueError(
            f"{config.dataset_name}: {count} packed held-out rows; give more text, a larger held_out or a smaller "
            "max_length, because intervals need several windows"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))[: config.rows]
    return {name: values[order] for name, values in held_out.items()}


# ---- one row of the table, on the device


class RouterChoices(TokenCounts):
    """The experts that every router chose in the last forward pass, instead of how often each was chosen."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.chosen: dict[int, torch.Tensor] = {}

    def _record(self, layer: int, chosen: torch.Tensor) -> None:
        self.chosen[layer] = chosen.flatten(0, -2)

    def of_tokens(self, real: torch.Tensor) -> torch.Tensor:
        """int16 [MoE layers, tokens, k] of the flat positions `real`."""
        return torch.stack([self.chosen[i][real] for i in range(len(self.modules))]).to(torch.int16)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Share of common experts, a float32 scalar, of two choices [tokens, k]; the experts of one choice differ."""
    return (a[:, :, None] == b[:, None, :]).any(-1).float().mean()


def float_logits(hidden_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocabulary] of BF16 states and head, without a rounding to BF16 in between."""
    if hidden_TD.is_cuda and hidden_TD.dtype == head_VD.dtype == torch.bfloat16:
        return torch.mm(hidden_TD, head_VD.t(), out_dtype=torch.float32)
    return hidden_TD.float() @ head_VD.float().t()


@torch.no_grad()
def compare(
    reference_TD: torch.Tensor, row_TD: torch.Tensor, heads: tuple[torch.Tensor, torch.Tensor], labels_T: torch.Tensor
) -> torch.Tensor:
    """float32 [3, tokens]: KL(reference || row) in nats, same top token (0 or 1), negative log-likelihood of the label.

    `heads` are the reference's and the row's. The likelihood is 0 where the label is -100.
    """
    out = torch.empty(3, len(labels_T), device=labels_T.device)
    chunk = max(16, (2**26 if row_TD.is_cuda else 2**22) // len(heads[0]))
    for start in range(0, len(labels_T), chunk):
        part = slice(start, start + chunk)
        log_p = float_logits(reference_TD[part], heads[0]).log_softmax(-1)
        log_q = float_logits(row_TD[part], heads[1]).log_softmax(-1)
        out[1, part] = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        label = labels_T[part]
        nll = -log_q.gather(1, label.clamp(min=0)[:, None])[:, 0]
        out[2, part] = torch.where(label >= 0, nll, 0.0)
        # p log(p/q) + q - p: the same sum of terms that are all positive, so that tiny divergences survive float32.
        gap = log_p - log_q
        out[0, part] = (log_p.exp_() * (torch.expm1(-gap) + gap)).sum(-1).clamp_(min=0)
    return out


@dataclass
class Measured:
    """Per-token results of one row: `values` float32 [3, tokens] as `compare` gives them, `overlap` [MoE layers]."""

    values: torch.Tensor
    overlap: torch.Tensor


class Bench:
    """The evaluation rows and the reference's final states and routes on the device, and how a model is put to them.

    Tokens are numbered row by row whatever the batches are, so all rows of the table pair up.
    """

    def __init__(self, model: nn.Module, rows: data.Packed, batch_size: int):
        self.device = next(model.parameters()).device
        self.batch_size = batch_size
        self.rows = {name: values.to(self.device) for name, values in rows.items()}
        real = rows["doc_ids"] >= 0
        # All text counts, prompts too: divergence is divergence. Perplexity follows, so that both are of one text.
        labels = next_tokens(rows | {"loss_mask": torch.ones_like(rows["loss_mask"])})
        self.labels = labels[real].to(self.device)
        self.window = torch.arange(len(real))[:, None].expand_as(real)[real].numpy()
        self.number = (real.flatten().cumsum(0) - 1).view_as(real)
        self.real = real
        self.head = body_and_head(model)[1]
        self.hidden, self.chosen = self.states(model, range(len(real)), batch_size)

    @torch.no_grad()
    def states(self, model: nn.Module, order: Any, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(final hidden states [tokens, H], chosen experts int16 [MoE layers, tokens, k]), rows taken in `order`."""
        choices, hidden, chosen = RouterChoices(model), None, None
        for picked in torch.tensor(list(order)).split(batch_size):
            flat = self.real[picked].flatten().nonzero()[:, 0].to(self.device)
            place = self.number[picked][self.real[picked]].to(self.device)
            on_device = picked.to(self.device)
            with choices.recording():
                ids, positions = self.rows["input_ids"][on_device], self.rows["position_ids"][on_device]
                states = final_hidden(model, ids, positions).flatten(0, 1)[flat]
            routes = choices.of_tokens(flat)
            if hidden is None or chosen is None:
                hidden = states.new_empty(len(self.labels), states.shape[1])
                chosen = routes.new_empty(len(routes), len(self.labels), routes.shape[2])
            hidden[place] = states
            chosen[:, place] = routes
        assert hidden is not None and chosen is not None
        return hidden, chosen

    def measure(self, model: nn.Module, order: Any = None, batch_size: int | None = None) -> Measured:
        """Puts `model` to the rows; the order and the batch size are the reference's unless given."""
        hidden, chosen = self.states(model, order or range(len(self.real)), batch_size or self.batch_size)
        return self.judge(hidden, chosen, body_and_head(model)[1])

    def judge(self, hidden: torch.Tensor, chosen: torch.Tensor, head: torch.Tensor) -> Measured:
        """Compares final states and routes with the reference's."""
        values = compare(self.hidden, hidden, (self.head, head), self.labels)
        return Measured(values, torch.stack([overlap(a, b) for a, b in zip(self.chosen, chosen, strict=True)]))


# ---- the rows


@torch.no_grad()
def fp8_blocks(weight: torch.Tensor, matrices: int) -> torch.Tensor:
    """`weight` [E, N, K] after 128x128 block FP8 and back; each of its `matrices` row blocks has a grid of its own."""
    out, (_, n, k) = torch.empty_like(weight), weight.shape
    step = max(1, STEP // (n * k))
    for into, part in zip(out.split(step), weight.split(step), strict=True):
        codes, scales = fp8.quantize(part.reshape(-1, k), n // matrices)
        into.copy_(fp8.dequantize(codes, scales, n // matrices, weight.dtype).view_as(part))
    return out


def quantized(name: str, weight: torch.Tensor, how: str, transposed: bool) -> torch.Tensor:
    """Expert weight `name` after `how` ("fp8" or an MXFP4 rule) and back, in its own layout and dtype."""
    last = weight.transpose(1, 2).contiguous() if transposed else weight
    if how == "fp8":
        out = fp8_blocks(last, 2 if name.endswith("gate_up_proj") else 1)  # gate and up are two matrices in a file
    else:
        out = mxfp4.snap(last, how, name=name).to(weight.dtype)  # type: ignore[arg-type]
    return out.transpose(1, 2).contiguous() if transposed else out


@contextmanager
def exchanged(experts: Experts, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside the block the parameters hold `values`; nothing is copied."""
    originals = {name: param.data for name, param in experts.items()}
    for name, param in experts.items():
        param.data = values[name]
    try:
        yield
    finally:
        for name, param in experts.items():
            param.data = originals[name]


@torch.no_grad()
def weight_errors(experts: Experts, reference: dict[str, torch.Tensor]) -> list[float]:
    """|w - w_ref|^2 / |w_ref|^2 of each MoE layer: both its projections, in float32 sums that add up in float64."""
    layers: dict[str, torch.Tensor] = {}
    for name, param in experts.items():
        total = layers.setdefault(name.rpartition(".")[0], torch.zeros(2, dtype=torch.float64, device=param.device))
        for w, r in zip(param.data.flatten().split(STEP), reference[name].flatten().split(STEP), strict=True):
            r32 = r.float()
            total += torch.stack(((w.float() - r32).square().sum(), r32.square().sum())).double()
    return [float(x) for x in torch.stack([t[0] / t[1] for t in layers.values()]).tolist()]


@torch.no_grad()
def codes_changed(
    experts: Experts, reference: dict[str, torch.Tensor], transposed: frozenset[str], rule: mxfp4.Rule
) -> float | None:
    """Share of weights that differ from the reference's rounded to nearest; None where a weight is no MXFP4 value."""
    device = next(iter(experts.values())).device
    changed = torch.zeros(2, dtype=torch.int64, device=device)
    for name, param in experts.items():
        plain = quantized(name, reference[name], rule, name in transposed)
        snapped = quantized(name, param.data, rule, name in transposed)
        changed += torch.stack(((param.data != plain).sum(), (param.data != snapped).sum()))
    differ, off_grid = changed.tolist()
    return None if off_grid else differ / sum(p.numel() for p in experts.values())


def parse_candidates(candidates: list[str]) -> dict[str, str]:
    """{name: folder} of FOLDER and NAME=FOLDER; ValueError for a name that stands twice or is a baseline's."""
    named: dict[str, str] = {}
    for text in candidates:
        name, sign, folder = text.partition("=")
        if not sign or "/" in name:  # a path may hold "=" itself
            name, folder = Path(text).resolve().name, text
        if name in named or name in (REFERENCE, NOISE, FP8_ROW, *(f"RTN {rule}" for rule in mxfp4.RULES)):
            raise ValueError(f"two rows are named {name!r}; give candidates names of their own, as NAME=FOLDER")
        named[name] = folder
    return named


def load_candidate(folder: str, reference: nn.Module, device: torch.device) -> nn.Module:
    """The model in `folder`; ValueError unless it has the reference's parameters by name and shape."""
    model, _ = load_for_training(folder, torch.bfloat16, device)
    ours = {name: tuple(t.shape) for name, t in reference.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{folder}: {name} is {theirs.get(name, 'absent')}, in the reference {ours.get(name, 'absent')}; "
                "a candidate must be a quantization of the reference"
            )
    return model


@dataclass
class Entry:
    """A row that is being computed: the model that holds its weights now."""

    name: str
    kind: Literal["reference", "noise", "baseline", "candidate"]
    model: nn.Module
    folder: str | None = None


def entries(config: EvaluateConfig, model: nn.Module) -> Iterator[Entry]:
    """Every row of the table in order; the weights are in place until the next one is asked for."""
    experts, transposed = expert_parameters(model), transposed_experts(model)
    device = next(model.parameters()).device
    yield Entry(REFERENCE, "reference", model, config.model)
    yield Entry(NOISE, "noise", model, config.model)
    if config.baselines:
        for label, how in ((FP8_ROW, "fp8"), *((f"RTN {rule}", rule) for rule in ("floor", "even", "rceil", "mse"))):
            values = {n: quantized(n, p.data, how, n in transposed) for n, p in experts.items()}
            with exchanged(experts, values):
                yield Entry(label, "baseline", model)
            del values
    for name, folder in parse_candidates(config.candidates).items():
        candidate = load_candidate(folder, model, device)
        yield Entry(name, "candidate", candidate, folder)
        del candidate


# ---- figures of a row


class Table:
    """Turns per-token results into figures with paired intervals; keeps the sums of every window."""

    def __init__(self, bench: Bench, seed: int):
        windows = len(bench.real)
        self.window = bench.window
        self.counts = np.bincount(self.window, minlength=windows).astype(np.float64)
        self.label_counts = np.bincount(self.window, (bench.labels >= 0).cpu().numpy(), windows)
        self.weights = statistics.resamples(windows, seed=seed)
        self.sums: dict[str, np.ndarray] = {}  # name -> float64 [3, windows]

    def add(self, name: str, measured: Measured) -> dict[str, Any]:
        """The figures of a row that need no other row than the reference, which comes first."""
        values = measured.values.double().cpu().numpy()
        self.sums[name] = np.stack([np.bincount(self.window, v, len(self.counts)) for v in values])
        kl, agree, _ = self.sums[name]
        marks = np.quantile(values[0], (0.5, 0.99, 0.999))
        layers = measured.overlap.tolist()
        return {
            "kl_mean": float(kl.sum() / self.counts.sum()),
            "kl_ci95": statistics.interval(statistics.drawn_means(self.weights, kl, self.counts)),
            "kl_median": float(marks[0]),
            "kl_p99": float(marks[1]),
            "kl_p99.9": float(marks[2]),
            "kl_max_window": float((kl / self.counts).max()),
            "top1_agreement": float(agree.sum() / self.counts.sum()),
            "top1_ci95": statistics.interval(statistics.drawn_means(self.weights, agree, self.counts)),
            **self._perplexity(name),
            "router_overlap": math.fsum(layers) / len(layers),
            "router_overlap_layers": layers,
            "kl_survival": survival(values[0]),
        }

    def _perplexity(self, name: str) -> dict[str, Any]:
        mine, reference = self.sums[name][2], self.sums[REFERENCE][2]
        total = self.label_counts.sum()
        ratio = statistics.drawn_means(self.weights, mine - reference, self.label_counts)
        return {
            "perplexity": math.exp(mine.sum() / total),
            "perplexity_ci95": statistics.interval(
                np.exp(statistics.drawn_means(self.weights, mine, self.label_counts))
            ),
            "perplexity_ratio": math.exp((mine - reference).sum() / total),
            "perplexity_ratio_ci95": statistics.interval(np.exp(ratio)),
        }

    def gap_closed(self, name: str, plain: str) -> dict[str, Any]:
        """{"gap_closed", "gap_closed_ci95"} of a row on the line from `plain` to the noise; None without a gap."""
        three = [self.sums[n][0] for n in (name, NOISE, plain)]
        value = float(statistics.gap_closed(*(s.sum() for s in three)))
        drawn = statistics.gap_closed(*(statistics.drawn_means(self.weights, s, self.counts) for s in three))
        known = math.isfinite(value)
        return {
            "gap_closed": value if known else None,
            "gap_closed_ci95": statistics.interval(drawn) if known else None,
        }

    def tests(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Paired bootstrap of the difference in mean KL, first minus second."""
        return [
            {"first": a, "second": b}
            | statistics.paired_means(self.sums[a][0], self.sums[b][0], self.counts, self.weights)
            for a, b in pairs
        ]


def _measure(entry: Entry, bench: Bench, config: EvaluateConfig) -> Measured:
    if entry.kind == "reference":
        return bench.judge(bench.hidden, bench.chosen, bench.head)
    if entry.kind == "noise":
        other = config.batch_size // 2 or 2
        return bench.measure(entry.model, list(reversed(range(len(bench.real)))), other)
    return bench.measure(entry.model)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The whole document: rows, paired tests, tasks and conditions. Nothing is written."""
    parse_candidates(config.candidates)
    began = time.perf_counter()
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_for_training(config.model, torch.bfloat16, device)
    model.requires_grad_(False)
    suite = None
    if config.tasks:
        from mimo_qat.tasks import Suite

        suite = Suite(config, tokenizer)
    experts, transposed = expert_parameters(model), transposed_experts(model)
    originals = {name: p.data for name, p in experts.items()}
    plain_row = f"RTN {config.scale_rule}"
    bench = Bench(model, evaluation_rows(config, tokenizer), config.batch_size)
    table, rows = Table(bench, config.seed), {}
    for entry in entries(config, model):
        row_began = time.perf_counter()
        held = expert_parameters(entry.model)
        figures = table.add(entry.name, _measure(entry, bench, config))
        errors = weight_errors(held, originals)
        rows[entry.name] = {
            "kind": entry.kind,
            "folder": entry.folder,
            **figures,
            "codes_changed": codes_changed(held, originals, transposed, config.scale_rule),
            "weight_error": math.fsum(errors) / len(errors),
            "weight_error_layers": errors,
            "seconds": time.perf_counter() - row_began,
        }
        print(f"{entry.name:24} KL {figures['kl_mean']:.3e}  top-1 {figures['top1_agreement']:.2%}", file=sys.stderr)
        if suite and (entry.kind in ("reference", "candidate") or entry.name == plain_row):
            suite.run(entry.name, entry.model)
        del entry, held  # or a candidate would stay while the next one is loaded
    for name in rows:
        gap = table.gap_closed(name, plain_row) if plain_row in rows else {}
        rows[name] |= {"gap_closed": None, "gap_closed_ci95": None} | gap
    named = list(parse_candidates(config.candidates))
    pairs = [(name, plain_row) for name in named if plain_row in rows]
    pairs += [(a, b) for i, a in enumerate(named) for b in named[i + 1 :]]
    return {
        "rows": rows,
        "tests": table.tests(pairs),
        "tasks": suite.results() if suite else {},
        "conditions": {
            "config": asdict(config),
            "windows": len(bench.real),
            "window_tokens": bench.real.shape[1],
            "tokens": len(bench.labels),
            "labels": int(table.label_counts.sum()),
            "plain_row": plain_row,
            "bootstrap_draws": len(table.weights),
            "seconds": time.perf_counter() - began,
            "commit": commit(),
            "versions": versions(),
            "hardware": hardware(),
        },
    }


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Compares candidates with their BF16 reference; writes evaluate.json, evaluate.md and figures."""
    least = {"rows": 2, "max_length": 2, "batch_size": 1, "max_new_tokens": 1, "task_batch_size": 1}
    least |= {"task_limit": 1} if config.task_limit is not None else {}
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ValueError(f"{name} is {getattr(config, name)}; give at least {bound}")
    if "humaneval" in config.tasks and not config.allow_code_execution:
        raise ValueError("humaneval runs programs that a model wrote; allow it with --allow_code_execution true")
    document = evaluate(config)
    out = Path(config.output_dir)
    write_json(out / "evaluate.json", document)
    with atomic_write(out / "evaluate.md") as temporary:
        temporary.write_text(markdown(document))
    write_provenance(out, config)
    figures = plot_all(document, out)
    short = ("kl_mean", "kl_ci95", "top1_agreement", "perplexity_ratio", "gap_closed", "gap_closed_ci95")
    return {
        "folder": str(out),
        "rows": {name: {key: row[key] for key in short} for name, row in document["rows"].items()},
        "tests": document["tests"],
        "tasks": {task: part["accuracy"] for task, part in document["tasks"].items()},
        "figures": [path.name for path in figures],
        "seconds": document["conditions"]["seconds"],
    }
