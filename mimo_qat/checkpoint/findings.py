"""What `mimo-qat check` can find: each kind by name, with its severity, what it would cause, and what to do."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
ORDER: tuple[Severity, ...] = ("error", "warning", "note")
# What a malformed file can raise out of code that reads well-formed ones; all of it becomes a finding.
FAULTS = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, RuntimeError)

AGAIN = "convert again: it writes every spelling"
EXPORT = "export the checkpoint again from its source; `mimo-qat layout CONFIG --list true` prints the whole table"

# name: (severity, what it causes, remedy)
KINDS: dict[str, tuple[Severity, str, str]] = {
    # structure
    "unreadable": ("error", "the folder cannot be loaded", ""),
    "missing": ("error", "an engine leaves those weights uninitialised, or refuses", EXPORT),
    "unknown": ("error", "an engine ignores them in silence: not the model that was trained", EXPORT),
    "shape": ("error", "the load fails, or rows land in the wrong heads", EXPORT),
    "dtype": ("error", "an engine misreads the bytes, or routes with rounded scores", EXPORT),
    "stray-weights": ("warning", "loaders that go by file name mix them in", "delete them, or write the index again"),
    "pickles": ("warning", "loading them can execute code", "delete them; weights belong in safetensors"),
    "manifest": ("warning", "these are not the bytes that were converted and measured", "fetch or convert them again"),
    "scale-missing": ("error", "codes are taken for weights: off by powers of two", EXPORT),
    "scale-name": ("error", "the engine finds no scale, or one in another meaning", "call MXFP4 scales .weight_scale"),
    "scale-dtype": (
        "error",
        "engines take exponents for numbers, or encode them twice: wrong by powers of two",
        "store E8M0 bytes as U8",
    ),
    "extra-scales": ("error", "no reader of this format applies them", "fold them into weight_scale, or drop them"),
    "qkv-rows": ("error", "rows land in the wrong heads", "take the head counts from the source's config.json"),
    "qkv-scale-rows": (
        "error",
        "every chunk but the first is scaled by its neighbour's blocks",
        "count ceil(chunk rows / 128) for each of num_key_value_heads chunks",
    ),
    "router-dtype": (
        "error",
        "the load fails, or scores are rounded otherwise than in training",
        "set moe_router_dtype to the dtype of mlp.gate.weight as it is stored",
    ),
    "router-bias-dtype": ("error", "tokens are routed to other experts", "keep e_score_correction_bias in F32"),
    "o-proj-dtype": ("error", "engines load o_proj as BF16", "keep every o_proj in BF16"),
    "layer-pattern": (
        "error",
        "full and sliding-window layers are swapped: sinks lie where the pattern has none",
        "copy hybrid_layer_pattern from the source; no formula gives it",
    ),
    "mtp-tensors": ("error", "speculation with MTP blocks fails, or drafts junk", "copy model.mtp.* as published"),
    "library-names": (
        "error",
        "engines that load the published names find nothing",
        "export with the published names: attention_sink_bias, one tensor an expert projection",
    ),
    "drafter-in-index": (
        "error",
        "the drafter's norm and layers collide with the target's",
        "write the index again: dflash/ has one of its own",
    ),
    # index
    "index-absent": ("error", "engines find no weights: the file names fit no pattern", "convert again"),
    "index-total-size": ("error", "loaders plan memory and progress by it", "write the payload bytes into total_size"),
    "index-tp-size": (
        "error",
        "loaders cut the fused QKV into the wrong chunks, or refuse",
        "set metadata.tp_size to num_key_value_heads",
    ),
    "index-save-format": ("warning", "tools that go by it misread the experts", "set it to how the experts are stored"),
    # configuration
    "quantization-config": (
        "error",
        "engines build the wrong kind of layer, then fail or compute garbage",
        "write the stated value into quantization_config, or convert again",
    ),
    "ignored-layers-lack": (
        "error",
        "an FP8 loader is built for a BF16 weight",
        "add them to ignored_layers, model.decoder.self_attn.o_proj too",
    ),
    "ignored-layers-extra": ("warning", "a BF16 loader is built for FP8 codes", "remove them from ignored_layers"),
    "layer-list": ("warning", "engines fall back to a formula that is wrong for some sizes", "write the list out"),
    "activation": ("error", "another activation than the trained one", "set hidden_act to silu, drop swiglu_limit"),
    "mtp-count": ("error", "engines look for blocks that are not there", "state the number of MTP blocks held"),
    "towers": ("warning", "engines take the multimodal path, which may lack drafter support", "remove those keys"),
    "remote-code": (
        "warning",
        "transformers with trust_remote_code cannot load the model",
        "copy the file, or drop auto_map",
    ),
    "tokenizer-absent": ("warning", "engines cannot turn text into tokens", "copy the source's tokenizer files"),
    "tokenizer-size": (
        "error",
        "an id beyond the embedding crashes, or reads other memory",
        "take the tokenizer of this model",
    ),
    "norm-epsilon": ("error", "every norm is computed with another epsilon", "copy layernorm_epsilon of the source"),
    "rope-theta": ("error", "full-attention layers rotate with a library's default", "copy rope_theta of the source"),
    "window-keys": (
        "note",
        "engines read one or the other: 128 or 129 keys",
        "keep both as in the source, and say which one was trained",
    ),
    "attention-chunk": (
        "note",
        "engines that act on it use chunked local attention: corrupt long contexts",
        "remove attention_chunk_size, which no layer uses",
    ),
    "architecture": (
        "error",
        "engines build the model with split projections",
        'set model_type to "mimo_v2", architectures to ["MiMoV2ForCausalLM"]',
    ),
    "qkv-order": (
        "error",
        "engines read the rows in chunk order: heads are mixed up",
        "convert again from the published layout",
    ),
    "qkv-bf16": (
        "note",
        "vLLM reads a fused BF16 QKV as one [Q | K | V], without its chunks: heads are mixed up",
        "for vLLM, convert with --dialect mimo --spine fp8, whose chunks it reads",
    ),
    "mtp-unstated": ("note", "some engines leave MTP off, others stop", "write num_nextn_predict_layers"),
    # values
    "scale-nan": ("error", "the whole block becomes NaN", "convert again from sound weights"),
    "minus-zero": (
        "warning",
        "harmless to a reader; the writer rounded ties toward zero, which shrinks weights",
        "convert again from the source weights",
    ),
    "small-max-code": (
        "note",
        "legal; official files have 4 or 6 everywhere, so another scale rule wrote these",
        "convert with --rule even or floor to match them",
    ),
    "scale-rule": ("warning", "the provenance is wrong: another rule wrote the scales", "convert again"),
    "dead-experts": ("error", "an expert that is routed to returns nothing", "export it again from a sound checkpoint"),
    "dead-blocks": ("warning", "those weights were lost, or never trained", "compare with the source of the weights"),
    "duplicate-experts": (
        "error",
        "one expert does the work of two: a shard was written or indexed under a second name",
        EXPORT,
    ),
    "scale-span": ("note", "a transcode to NVFP4 or FP8 loses bits", "keep the E8M0 scales"),
    "fp8-nan": ("error", "NaN in every layer after it", "convert again from sound weights"),
    "fp8-scale": ("error", "weights lose their sign or become NaN", "convert again"),
    "qkv-block-amax": (
        "error",
        "rows are not in chunk order, or scales are not amax/448: heads are mixed up",
        "convert again from BF16, or take the published FP8 file",
    ),
    "fp8-block-amax": ("warning", "scales are not amax/448: less precise than they could be", "convert again"),
    "not-finite": ("error", "NaN from that layer on", "export again from a sound checkpoint"),
    # drafter
    "drafter-json": ("warning", "engines stop with a JSON error", "write the file again with a JSON serialiser"),
    "drafter-tensors": ("error", "lower acceptance without an error, or a failed load", "export the drafter again"),
    "drafter-causal": ("warning", "some engines then run the block causally", AGAIN),
    "drafter-rotary": ("warning", "some engines rotate the whole head", AGAIN),
    "drafter-window": ("warning", "some engines run full attention: less acceptance in long contexts", AGAIN),
    "drafter-value-scale": ("warning", "values are not scaled as in training", "write it (published: 0.612)"),
    "drafter-class": ("warning", "engines then run another head than the trained one, or none", AGAIN),
    "drafter-sinks": ("note", "fine if it was trained without them", ""),
    "drafter-rope-base": ("note", "training metadata that two readers take for the rotary base", AGAIN),
    "drafter-code": ("note", "transformers cannot load it by itself; engines do not need it", "convert again"),
    "drafter-is-causal": ("warning", "block tokens do not see each other: less acceptance", "write is_causal: false"),
    "drafter-neox": ("error", "another rotation than the trained one", "MiMo rotates in halves: is_neox_style true"),
    "drafter-draft-length": ("error", "tokens beyond block_size - 1 are junk", "draft block_size - 1 tokens at most"),
    "drafter-rope-theta": (
        "error",
        "the drafter rotates with the target's base, not with its own",
        "write 10000, which every published drafter has",
    ),
    "drafter-layer-ids": (
        "warning",
        "the drafter reads other layers than it was trained on",
        "write the full-attention layers out: [0, 15, 31, 47, 69] for Pro, [0, 11, 23, 35, 47] for Flash",
    ),
    "drafter-target-weights": (
        "warning",
        "a drafter is tied to the weights it was trained on: acceptance drops",
        "retrain it, or take both from one release",
    ),
    "drafter-mask-absent": (
        "error",
        "engines take the target's untrained row: acceptance near 1",
        "write mask_embedding.pt: {mask_token_id, embedding}",
    ),
    "drafter-mask-norm": (
        "warning",
        "an untrained vector: poor drafts",
        "export it from the trained drafter (published norm: about 1.5)",
    ),
    "drafter-mask-id": (
        "error",
        "the drafter reads another embedding row",
        "use the tokenizer's id in the config and in mask_embedding.pt",
    ),
    "drafter-vocab": (
        "error",
        "engines do not share the head: acceptance length 1.0",
        "set the drafter's vocab_size to the target's",
    ),
    "drafter-target": ("error", "the features do not fit", "take the drafter of this target"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (error), suspicious (warning) or worth knowing (note)."""

    severity: Severity
    name: str
    what: str
    causes: str
    remedy: str


@dataclass
class Report:
    """Findings and facts of one folder."""

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, what: str, remedy: str = "") -> None:
        """A finding of a kind in KINDS; `what` states the case."""
        severity, causes, usual = KINDS[name]
        self.findings.append(Finding(severity, name, what, causes, remedy or usual))

    def expect(self, holds: Any, name: str, what: str) -> None:
        """Adds the finding unless `holds`."""
        if not holds:
            self.add(name, what)

    def attempt(self, step: Callable[..., Any], *args: Any) -> Any:
        """step(*args); a fault of the folder becomes a finding, and the result None."""
        try:
            return step(*args)
        except FAULTS as error:
            text = " ".join(str(error).split()) or "no message"
            if not isinstance(error, ValueError):
                text = f"{type(error).__name__} in {step.__name__.strip('_')}: {text}"
            what, _, remedy = text.rpartition("; ")
            self.add("unreadable", what or remedy, remedy if what else "write that file again")
            return None

    def count(self, severity: Severity) -> int:
        """Number of findings of one severity."""
        return sum(f.severity == severity for f in self.findings)

    def print(self, title: str) -> None:
        """Facts, then findings, the worst first; text from files is reduced to printable ASCII."""
        for key, value in self.facts.items():
            print(f"  {key:<26}{value}")
        for finding in sorted(self.findings, key=lambda f: ORDER.index(f.severity)):
            print(f"{finding.severity.upper():<9}{finding.name:<22}{_printable(finding.what)}")
            for label, text in (("causes", finding.causes), ("remedy", finding.remedy)):
                if text:
                    print(f"{'':<9}{label + ':':<22}{_printable(text)}")
        counts = ", ".join(f"{self.count(s)} {s}s" for s in ORDER)
        print(f"{title}: {counts}")


def _printable(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text)


def few(names: list[str], shown: int = 3) -> str:
    """The number of names, and the first few of them."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{len(names):,}: {', '.join(names[:shown])}{more}"
