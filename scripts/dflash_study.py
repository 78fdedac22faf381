"""python scripts/dflash_study.py --target runs/qad --data runs/answers --work runs/dflash --seconds 600

What docs/results/dflash.md states, in one process on one GPU: drafters of one target, trained on the answers of
`mimo-qat generate-data` and judged by replay on its held-out ones. Arms come in order of importance; one that would not
end in time is left out and listed, and the JSON file is rewritten after each. With --arms and --skip two GPUs share the
work; scripts/dflash_report.py joins their files. Drafters with "save" are written to WORK/NAME/dflash.
"""

import argparse
import gc
import json
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from study import Study, study_parser

from mimo_qat import data
from mimo_qat.checkpoint.reader import load_model
from mimo_qat.distill.acceptance import breakdown
from mimo_qat.distill.config import DistillConfig
from mimo_qat.distill.generate import end_token_ids
from mimo_qat.distill.objective import metrics
from mimo_qat.distill.replay import TOP_K, replay, replayed_acceptance
from mimo_qat.distill.start import new_drafter, pick_mask_token
from mimo_qat.distill.train import Distiller
from mimo_qat.models.dflash_files import save_drafter

TREES = [8, 16, 32, 64]  # nodes
HEAD = {"conv_kernel_size": 2, "selector_rank": 64}
BEST = {"block_size": 16, "loss": "dpace"} | HEAD


def arms(layers: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, "long" or "short", changes of plain DFlash with blocks of 8) for a target of so many layers."""
    spread = [round(i * (layers - 1) / 4) for i in range(5)]
    inner = [round(1 + i * (layers - 4) / 4) for i in range(5)]  # the published rule, which stops three layers early
    return [
        ("plain b8", "long", {"target_layer_ids": inner}),
        ("best b16", "long", BEST | {"target_layer_ids": inner}),
        ("short b8", "short", {}),
        ("short b16", "short", {"block_size": 16}),
        ("short b16 conv", "short", {"block_size": 16, "conv_kernel_size": 2}),
        ("short b16 selector", "short", {"block_size": 16, "selector_rank": 64}),
        ("short b16 conv + selector", "short", {"block_size": 16} | HEAD),
        ("short b16 all", "short", BEST),
        ("short b16 all, tv at the end", "short", BEST | {"finish_loss": "tv"}),
        ("short b8 dpace", "short", {"loss": "dpace"}),
        ("short b8 ce, tv at the end", "short", {"finish_loss": "tv"}),
        ("short b8 dpace, tv at the end", "short", {"loss": "dpace", "finish_loss": "tv"}),
        ("short b8 adamw", "short", {"optimizer": "adamw"}),
        ("short b8 adamw 6e-4", "short", {"optimizer": "adamw", "learning_rate": 6e-4}),
        ("short b8 1 layer", "short", {"num_draft_layers": 1}),
        ("short b8 2 layers", "short", {"num_draft_layers": 2}),
        ("short b8 taps without the last layer", "short", {"target_layer_ids": inner}),
        ("short b8 taps with the last layer", "short", {"target_layer_ids": spread}),
        ("short b8 last layer alone", "short", {"target_layer_ids": [layers - 1]}),
        ("short b8 raw text", "short", {"raw": True}),
    ]


class DrafterStudy(Study):
    """The target and the packed answers."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.tokenizer = data.load_tokenizer(options.target)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        self.target = load_model(options.target, dtype, "cuda" if torch.cuda.is_available() else "cpu").eval()
        self.at_once = 512 if torch.cuda.is_available() else 32  # blocks judged together: a GPU's launch costs more
        self.ends = end_token_ids(self.target, self.tokenizer)
        train, held_out = data.load_generated(options.data)
        self.rows = self.packed(train)
        groups: dict[tuple[str, float], list[data.Row]] = defaultdict(list)
        for row in held_out:
            group = groups[row["domain"], row["temperature"]]
            if len(group) < options.eval_texts:
                group.append(row)
        self.held_out = {key: self.packed(rows) for key, rows in groups.items()}
        code = groups["code", 0.0]
        self.code, self.few = self.packed(code), self.packed(code[: max(2, len(code) // 4)])
        used = {int(i) for part in (self.rows, *self.held_out.values()) for i in part["input_ids"].unique()}
        self.mask = pick_mask_token(self.tokenizer, self.target.config.vocab_size, used)
        self.doc["data"] = {
            "train_tokens": int((self.rows["doc_ids"] >= 0).sum()),
            "train_answer_tokens": int(self.rows["loss_mask"].sum()),
            "held_out_texts": {f"{d} T={t}": len(rows) for (d, t), rows in groups.items()},
            "generation": json.loads((Path(options.data) / "generation.json").read_text()),
        }

    def packed(self, rows: list[data.Row]) -> data.Packed:
        return data.pack_rows(rows, self.tokenizer, self.options.max_length)

    def config(self, name: str, steps: int, changes: dict[str, Any]) -> DistillConfig:
        settings = {
            "target": self.options.target,
            "data": self.options.data,
            "output_dir": str(self.work / re.sub("[^a-z0-9]+", "-", name)),
            "num_draft_layers": 5,
            "block_size": 8,
            "num_taps": min(5, self.target.config.num_hidden_layers),
            "sliding_window": 2048,
            "max_length": self.options.max_length,
            "per_device_train_batch_size": self.options.batch,
            "num_anchors": self.options.anchors,
            "max_steps": steps,
            "learning_rate": self.options.learning_rate,
            "optimizer": "muon",
            "compile": torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
        }
        return DistillConfig(**settings | changes)

    def train(self, name: str, length: str, changes: dict[str, Any]) -> None:
        """One arm; an exception of it is recorded, and the study goes on."""
        options, started = self.options, time.monotonic()
        tokens = options.long_tokens if length == "long" else options.short_tokens
        steps = max(2, round(tokens / (options.batch * options.max_length)))
        rate = self.doc.get("tokens_per_s", 0)
        if name in self.doc["runs"]:
            return
        if rate and tokens / rate + 45 > self.left():
            return self.leave_out(name, f"{tokens / rate + 45:.0f} s needed, {self.left():.0f} s left")
        rows = self.rows
        if changes.pop("raw", False):
            if not options.raw:
                return self.leave_out(name, "no --raw file given")
            rows = data.load_packed(options.raw)[0]
        try:
            run = self._train(self.config(name, steps, changes), rows, length == "long")
            self.add(name, run | {"changes": changes, "seconds": round(time.monotonic() - started, 1)})
            print(name, json.dumps(run)[:600], flush=True)
            self.save()
        except (ValueError, RuntimeError, AssertionError) as error:
            self.leave_out(name, f"failed: {error}"[:800])
        gc.collect()
        torch.cuda.empty_cache()

    def _train(self, config: DistillConfig, rows: data.Packed, whole: bool) -> dict[str, Any]:
        drafter = new_drafter(config, self.target, self.mask)
        run = Distiller(config, self.target, drafter, rows, self.few)
        marks = {config.max_steps // 16, config.max_steps // 8, config.max_steps // 4, config.max_steps // 2}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        curve, clock, spent, losses, counted = [], time.monotonic(), 0.0, [], 0
        while run.step < config.max_steps:
            run.train_step()
            if run.step in (8, config.max_steps):  # the first steps compile
                float(run.window[0])
                spent, clock = (time.monotonic() - clock if run.step > 8 else 0.0), time.monotonic()
                counted, run.tokens = (run.tokens, run.tokens) if run.step > 8 else (0, 0)
            if whole and run.step in marks:
                paused = time.monotonic()
                curve.append({"step": run.step, "acceptance": self.acceptance(run, self.few)["acceptance_length"]})
                clock += time.monotonic() - paused
            if run.step % 25 == 0:
                losses.append(round(float(metrics(run.window)["loss"]), 4))
                run.window = run.no_sums()
        run.check_finite()
        figures = {
            "steps": config.max_steps,
            "tokens": config.max_steps * config.per_device_train_batch_size * config.max_length,
            "parameters": sum(p.numel() for p in drafter.parameters()),
            "tokens_per_s": round(counted / spent) if spent else None,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
            "losses": losses,
            "curve": curve,
        }
        self.doc["tokens_per_s"] = figures["tokens_per_s"] or self.doc.get("tokens_per_s", 0)
        with run.optimizer.averaged():
            drafter.eval()
            trees = TREES if whole else ()
            figures["code"] = replayed_acceptance(self.target, drafter, self.code, self.ends, trees, self.at_once)
            if whole:
                save_drafter(drafter, Path(config.output_dir) / "dflash")
                texts = {
                    k: replay(self.target, drafter, b, self.ends, TREES, self.at_once) for k, b in self.held_out.items()
                }
                cap = int(drafter.config.block_size or 0)
                figures["tables"] = breakdown(texts, cap, drafter.config.selector_top_k or TOP_K)
        run.close()
        return figures

    def acceptance(self, run: Distiller, batch: data.Packed) -> dict[str, Any]:
        with run.optimizer.averaged():
            return replayed_acceptance(self.target, run.drafter, batch, self.ends, (), self.at_once)


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--target", required=True, help="folder of the target")
    parser.add_argument("--data", required=True, help="folder of mimo-qat generate-data")
    parser.add_argument("--raw", help="file of mimo-qat pack, for the arm that trains on text of others")
    parser.add_argument("--long_tokens", type=float, default=24e6)
    parser.add_argument("--short_tokens", type=float, default=1.5e6)
    parser.add_argument("--batch", type=int, default=16, help="packed rows a step")
    parser.add_argument("--anchors", type=int, default=256, help="blocks a row")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--eval_texts", type=int, default=96, help="held-out texts a domain and temperature")
    options = parser.parse_args()
    torch.set_num_threads(
        min(4, torch.get_num_threads())
    )  # small operations between GPU work: more threads wait longer
    study = DrafterStudy(options)
    for name, length, changes in arms(study.target.config.num_hidden_layers):
        if study.chosen(name):
            study.train(name, length, changes)
    study.end()


if __name__ == "__main__":
    main()
