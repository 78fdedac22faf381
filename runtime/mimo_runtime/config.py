"""The settings of every command, as plain dataclasses: field == flag == YAML key. Standard library only, so that help
and typing errors come at once."""

from dataclasses import dataclass
from typing import Literal

Rule = Literal["even", "floor", "rceil", "mse"]


KERNELS = "experts", "attention", "linears", "fusions"  # fields that choose between kernels and single operations


@dataclass(kw_only=True)
class EngineConfig:
    """Where a model runs, and how."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """type of weights and activations; norms, router, softmax and logits are float32 in both"""
    experts: Literal["auto", "packed", "plain"] = "auto"
    """packed keeps MXFP4 experts as codes and runs kernels for few tokens on them, in bfloat16; plain decodes them to
    `dtype`; auto takes packed where they are MXFP4, dtype is bfloat16 and the GPU has compute capability 9 or more"""
    attention: Literal["auto", "kernel", "plain"] = "auto"
    """kernel runs the attention of up to 16 rows of a round as one or two kernels over the cache, in bfloat16; plain as
    single operations; auto takes the kernel where dtype is bfloat16 and the GPU has compute capability 9 or more"""
    linears: Literal["auto", "kernel", "plain"] = "auto"
    """kernel keeps matrices that are stored as block FP8 as codes where their tiles allow it, and multiplies up to 16
    rows by kernels, in bfloat16; plain decodes them to `dtype` and leaves all products to torch; auto takes the kernel
    where dtype is bfloat16 and the GPU has compute capability 9 or more"""
    fusions: Literal["auto", "kernel", "plain"] = "auto"
    """kernel makes one or two kernels of each residual addition with its norm, of the norms, rotations and cache writes
    of a round's heads, and of the routing, for up to 16 rows in bfloat16; plain leaves them to torch; auto takes the
    kernels where dtype is bfloat16 and the GPU has compute capability 9 or more"""
    max_len: int = 4096
    """longest prompt and output together, in tokens; the caches are this long"""
    prefill_chunk: int | None = None
    """prompt tokens computed at once, fewer where their attention would take gigabytes; null takes 2048 on a GPU, whose
    host is busy as long with a few, and 256 on a CPU. A GPU pads short prompts to a power of two of rows, from 64 to at
    most 1024"""
    drafter: str | None = "auto"
    """folder of the drafter; auto takes the release's own dflash/ if it has one, null none"""
    tree_budget: int = 0
    """drafts that each round verifies as a tree of the most probable continuations; 0 verifies one chain. On a GPU up
    to 15 drafts run by the kernels of a chain, and more as single operations, which take several times as long"""
    tree_adaptive: bool = False
    """cut each tree where its last drafts cost more time than they are expected to save, by times measured at start"""
    cuda_graphs: bool = False
    """replay each round, or of an adaptive tree its two passes, as one CUDA graph, and so the pass of a prompt that is
    padded; a round's attention then reads max_len keys"""
    rounds_ahead: int = 4
    """on a GPU: rounds enqueued before the first one's tokens are looked at, of adaptive trees always one; after a stop
    token the others are played in vain"""
    collectives: Literal["auto", "nccl", "symmetric"] = "nccl"
    """of several processes on GPUs: symmetric adds up to 16 rows in BF16 by one kernel over memory that the GPUs map of
    each other, all else by NCCL, and gives the same sums; auto takes it where all ranks are on one host with peer
    access"""
    rank_timeout: float = 20.0
    """of several processes: seconds without a sign of a rank, or of its next step, after which the others name it and
    stop"""
    check_ranks: bool = False
    """of several processes: compare the bits of their activations and tokens after every round, and stop at the first
    difference; slower, for debugging"""


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are chosen and when generation ends."""

    max_new_tokens: int = 256
    """most tokens to generate"""
    temperature: float = 0.0
    """0 takes the most likely token; larger is more random"""
    top_k: int = 0
    """sample among this many most likely tokens; 0 is all"""
    top_p: float = 1.0
    """sample among the most likely tokens that together have this probability"""
    seed: int = 0
    """the same seed gives the same tokens, with and without a drafter"""
    stop_token_ids: tuple[int, ...] = ()
    """token ids that end the text (they are part of the output); empty takes those of the checkpoint"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; generate at least 1 token")
        if self.temperature != 0 and not 1e-5 < self.temperature < float("inf"):  # below, scaled logits overflow
            raise ValueError(f"temperature is {self.temperature}; use 0 for greedy decoding or a number above 1e-5")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 for all tokens or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass(kw_only=True)
class GenerateConfig(EngineConfig, SamplingConfig):
    """Generate after one prompt, and print the text as it is committed."""

    folder: str
    """release or BF16 folder, with its tokenizer"""
    prompt: str | None = None
    """the prompt; standard input without it"""
    chat: bool = True
    """put the prompt into the tokenizer's chat template, if there is one"""


@dataclass(kw_only=True)
class BenchConfig(EngineConfig, SamplingConfig):
    """Decoding speed with and without the drafter, and how much of its drafts is accepted."""

    folder: str | None = None
    """release or BF16 folder, with its tokenizer"""
    synthetic: str | None = None
    """instead of a folder: random weights of the geometry flash, pro or FILE/config.json, made on the device"""
    layers: int | None = None
    """keep only the first so many layers of a synthetic model: a slice, whose speed is not the model's"""
    uniform_routing: bool = False
    """synthetic: every token's experts are drawn uniformly, instead of by a random router, which draws alike"""
    prompt_tokens: int = 256
    """synthetic: random token ids in each prompt"""
    context: int | None = None
    """synthetic: instead of prompt_tokens, decode after so many tokens as if they had been prefilled: the caches hold
    random keys and values (always labelled), and of a random prompt only the last token is computed"""
    dry_run: bool = False
    """print what each of `ranks` ranks would hold in memory, and allocate nothing"""
    ranks: int = 1
    """ranks of a dry run; a synthetic model in one process computes the share of one of so many, without the others
    (always labelled); any other run has as many as processes were started"""
    prompts: str | None = None
    """.jsonl file of {"prompt": ..., "domain": ...}; the 24 bundled prompts without it"""
    limit: int | None = None
    """use only this many prompts, evenly over the file; of a synthetic model 3 without it"""
    max_new_tokens: int = 128
    """tokens to generate for each prompt"""
    forced_acceptance: float | None = None
    """not a measurement of the drafter: an acceptance length, such as 6.3 tokens a round on average, by drafts that are
    the model's own tokens; to see what it would give"""
    output: str | None = None
    """JSON file that gets the document too; `mimo-qat push --results` and docs/results/ take its records"""
    plot: str | None = None
    """image file that gets a bar chart of what a round's time is made of"""
    trace: str | None = None
    """FILE.json: FILE-plain.json, FILE-drafted.json, ... get Chrome traces of 16 rounds, and the document the time for
    which the device waited for the host between them"""
    chat: bool = True
    """put each prompt into the tokenizer's chat template, if there is one"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.forced_acceptance is not None and self.forced_acceptance < 1:
            raise ValueError(f"forced_acceptance is {self.forced_acceptance}; a round yields 1 token or more")
        if self.ranks > 1 and self.synthetic is None and not self.dry_run:
            raise ValueError(f"ranks is {self.ranks}; start a real model's ranks with torchrun --nproc_per_node")
        if (self.folder is None) == (self.synthetic is None):
            raise ValueError("give either a folder or --synthetic flash, pro or a config.json")
        if self.synthetic is None and (self.layers is not None or self.uniform_routing):
            raise ValueError(
                "layers and uniform_routing are for --synthetic models; leave them out of a real one's run"
            )
        for name in ("prompt_tokens", "ranks", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.context is None:
            return
        if self.synthetic is None:
            raise ValueError("context fills the caches with random values; use it with --synthetic, or leave it out")
        if self.context + self.max_new_tokens > self.max_len and not self.dry_run:
            raise ValueError(
                f"context {self.context} and {self.max_new_tokens} new tokens do not fit --max_len {self.max_len}; "
                f"give --max_len {self.context + self.max_new_tokens} or more"
            )


@dataclass(kw_only=True)
class QualityConfig(EngineConfig):
    """What quantisation cost: a release against its unquantised reference, beside plain quantisation and noise."""

    folder: str
    """release to judge"""
    reference: str
    """unquantised BF16 folder that the release was made from"""
    text: str | None = None
    """.jsonl of {"text": ...} or {"messages": [...]}, or a .txt; the source of Python's standard library without it"""
    rule: Rule = "even"
    """scale rule of the plain quantisation of the reference"""
    windows: int = 16
    """stretches of text to compare on"""
    length: int = 256
    """tokens in each"""
    seed: int = 0
    """seed of the bootstrap"""
    output: str | None = None
    """JSON file that gets the document too; `mimo-qat push --results` and docs/results/ take its records"""

    def __post_init__(self) -> None:
        if self.windows < 2 or self.length < 2:
            raise ValueError(f"windows {self.windows} and length {self.length} must both be 2 or more")
