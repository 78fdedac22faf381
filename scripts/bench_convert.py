"""PYTHONPATH=.:kernels python scripts/bench_convert.py --scratch /scratch --out docs/results/convert.json

What docs/results/convert.md states, measured: `mimo-qat convert --bench`, the peak memory of converting a source of
more than 20 GB made of real-geometry layers, the round trip of its release, and a dry run on the headers of a
trillion-parameter checkpoint. Needs about 50 GB of scratch space at once; everything made there is deleted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mimo_qat.checkpoint.layout import files_of, header_bytes, target_tensors, totals
from mimo_qat.checkpoint.reader import Checkpoint
from mimo_qat.checkpoint.writer import write_index
from mimo_qat.convert_bench import synthetic
from mimo_qat.provenance import resident_bytes

ROOT = Path(__file__).parents[1]
GIB = 2**30


def command(*arguments: str) -> tuple[dict[str, Any], float, int]:
    """(JSON document, seconds, peak bytes of the largest process) of `mimo-qat ARGUMENTS`, run as a user runs it."""
    code = "import resource, sys; from mimo_qat.cli import main; from mimo_qat.provenance import resident_bytes; "
    code += "status = main(); children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
    code += "print(max(resident_bytes(peak=True), children)); sys.exit(status)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"mimo-qat {' '.join(arguments)} failed")
    *_, document, peak = done.stdout.strip().splitlines()
    return json.loads(document), time.perf_counter() - began, int(peak)


def pro_config() -> dict[str, Any]:
    return json.loads((ROOT / "recipes/model/mimo-v2.5-pro.json").read_text())


def real_layers(folder: Path, experts: str, count: int) -> int:
    """Embedding, head, the first two layers and the MTP blocks of V2.5-Pro with `count` experts; returns the bytes."""
    config = pro_config() | {"num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}
    config = {k: v for k, v in config.items() if k != "quantization_config"} | {"n_routed_experts": count}
    return totals(synthetic(folder, config, experts, mtp_layers=3))[1]


def memory(scratch: Path, experts: str, count: int) -> dict[str, Any]:
    """Peak memory of one conversion, and whether everything but the experts kept its bytes."""
    source, out = scratch / "source", scratch / "out"
    size = real_layers(source, experts, count)
    document, seconds, largest = command("convert", "--target", str(source), "--out", str(out))
    before, after = Checkpoint(source), Checkpoint(out)
    kept = [n for n in after.names if n in before and before.spec(n).dtype == after.spec(n).dtype]
    same = all(
        a == b for n in kept for a, b in zip(before.pieces(n), after.pieces(n), strict=True) if ".experts." not in n
    )
    shutil.rmtree(source)
    result = {
        "source": f"{experts}, V2.5-Pro: 2 layers, {count} experts, embedding, head, 3 MTP blocks",
        "source_gb": round(size / 1e9, 2),
        "seconds": round(seconds, 1),
        "largest_process_gb": round(max(largest, document["largest_process_bytes"]) / 1e9, 3),
        "all_processes_gb": round(document["peak_rss_bytes"] / 1e9, 3),
        "limit_gb": round((2 * GIB + 2 * 3 * 2048 * 6144) / 1e9, 3),
        "tensors_copied": len([n for n in kept if ".experts." not in n]),
        "copied_byte_for_byte": same,
    }
    if experts == "fp8":
        result["round_trip_same_bytes"] = round_trip(scratch, out)
    shutil.rmtree(out)
    return result


def round_trip(scratch: Path, release: Path) -> bool:
    """The release as BF16 values, encoded again: are the expert bytes those of the release?"""
    command("convert", "--target", str(release), "--out", str(scratch / "bf16"), "--dialect", "bf16")
    command("convert", "--target", str(scratch / "bf16"), "--out", str(scratch / "again"))
    shutil.rmtree(scratch / "bf16")
    first, again = Checkpoint(release), Checkpoint(scratch / "again")
    same = all(
        a == b for n in first.names if ".experts." in n for a, b in zip(first.pieces(n), again.pieces(n), strict=True)
    )
    shutil.rmtree(scratch / "again")
    return same


def dry_run(scratch: Path) -> dict[str, Any]:
    """`--dry_run` on the headers of V2.5-Pro over sparse files."""
    config, folder = pro_config(), scratch / "pro"
    specs = target_tensors(config, experts="fp8", spine="fp8", mtp_layers=3)
    folder.mkdir()
    for file, members in files_of(specs).items():
        header = header_bytes(members)
        with (folder / file).open("wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(s.nbytes for s in members))
    write_index(folder, specs, {"save_format": "fp8", "tp_size": 8})
    (folder / "config.json").write_text(json.dumps(config))
    document, seconds, peak = command("convert", "--target", str(folder), "--dry_run", "true")
    shutil.rmtree(folder)
    keys = ("tensors", "bytes", "weight_files", "source_bytes")
    return {k: document[k] for k in keys} | {"seconds": round(seconds, 2), "peak_gb": round(peak / 1e9, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", default=".")
    parser.add_argument("--out")
    parser.add_argument("--experts", type=int, default=384, help="of the layer that the bench converts")
    parser.add_argument("--parts", nargs="*", default=["dry_run", "bench", "fp8", "bf16"])
    options = parser.parse_args()
    scratch = Path(options.scratch) / f"bench_convert.{os.getpid()}"
    scratch.mkdir(parents=True)
    path = Path(options.out) if options.out else None
    results = json.loads(path.read_text()) if path and path.is_file() else {}
    try:
        if "dry_run" in options.parts:
            results["dry_run"] = dry_run(scratch)
            results["dry_run_pro_seconds"] = results["dry_run"]["seconds"]
        if "bench" in options.parts:
            arguments = ("--bench", "true", "--bench_experts", str(options.experts), "--out", str(scratch))
            results["bench"], _, _ = command("convert", *arguments)
            for key in ("convert_ratio_vs_compressed_tensors", "convert_gbps_per_core", "convert_fraction_of_copy"):
                results[key] = results["bench"][key]
        if "fp8" in options.parts:
            results["memory_fp8"] = memory(scratch, "fp8", 384)
            results["convert_peak_rss_gb"] = results["memory_fp8"]["all_processes_gb"]
        if "bf16" in options.parts:
            results["memory_bf16"] = memory(scratch, "bf16", 32)
    finally:
        shutil.rmtree(scratch)
        if path and results:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results | {"peak_of_this_script_kb": resident_bytes(peak=True) // 1024}))


if __name__ == "__main__":
    main()
