"""What a drafter's training can be told: one dataclass, whose fields are the flags and the YAML keys."""

from dataclasses import dataclass

from mimo_qat.distill.objective import Loss, Objective
from mimo_qat.distill.optim import Optimizer, Schedule


@dataclass(kw_only=True)
class DistillConfig:
    """Fields of `mimo-qat distill`; names follow transformers' TrainingArguments where it has them."""

    target: str
    """checkpoint folder of the frozen target"""
    output_dir: str
    """receives metrics.jsonl, checkpoint.pt, provenance.json and the drafter as dflash/"""
    data: str
    """rows the target answered itself (`mimo-qat generate-data`): its folder, a .jsonl file, a dataset on the hub, or a
    .safetensors file of `mimo-qat pack`"""
    eval_data: str | None = None
    """held-out rows, of a folder its own; None takes those of `data` where it is a folder or a packed file, else
    `eval_fraction` of it by a hash"""
    eval_fraction: float = 0.05
    """share of `data` held out when `eval_data` is None"""
    init_drafter: str | None = None
    """drafter folder to start from instead of random weights; its geometry replaces the fields below, except that
    `block_size` is kept and a head that it lacks is added"""

    num_draft_layers: int = 5
    """decoder layers of the drafter; 1 or 2 are enough for a small target"""
    block_size: int = 8
    """anchor and drafts of one pass; the acceptance length cannot exceed it"""
    num_taps: int = 5
    """target layers to read, spread from the first to the last; `target_layer_ids` names them instead"""
    target_layer_ids: list[int] | None = None
    """0-based target layers whose output the drafter reads"""
    intermediate_size: int | None = None
    """of the drafter's MLPs; None takes the target's dense one"""
    num_attention_heads: int | None = None
    """None takes the target's"""
    num_key_value_heads: int | None = None
    """None takes the target's"""
    head_dim: int | None = None
    """None takes the target's v_head_dim"""
    sliding_window: int = 1024
    """keys a drafter query sees, itself included"""
    rope_theta: float = 10000.0
    """base of the drafter's rotary embedding"""
    partial_rotary_factor: float = 0.5
    """share of each head that rotates"""
    attention_value_scale: float = 0.612
    """factor of the drafter's values, the published one in every size"""
    attention_sink_bias: bool = True
    """one learned sink logit a head"""
    conv_kernel_size: int = 0
    """taps of the DFlash2 convolutions around each sublayer: 2, or 0 for none"""
    selector_rank: int = 0
    """width of the DFlash2 selector's codebooks; 0 for none"""
    selector_top_k: int = 16
    """candidates a slot among which the selector chooses"""
    mask_token_id: int | None = None
    """an id that no text holds; None looks for one in the tokenizer"""

    max_length: int = 2048
    """tokens of a packed row"""
    per_device_train_batch_size: int = 1
    """rows a process and micro-batch"""
    gradient_accumulation_steps: int = 1
    """micro-batches a step"""
    num_anchors: int = 512
    """blocks a row, drawn anew at every step"""
    max_steps: int = 1000
    """optimizer steps"""
    learning_rate: float = 6e-4
    """peak learning rate, of Muon and AdamW alike"""
    optimizer: Optimizer = "adamw"
    """muon takes the matrices and leaves norms, sinks, codebooks, taps and the mask vector to AdamW"""
    weight_decay: float = 0.0
    """decoupled, on every parameter"""
    adam_beta1: float = 0.9
    """first moment of AdamW"""
    adam_beta2: float = 0.95
    """second moment of AdamW"""
    max_grad_norm: float = 1.0
    """gradient clipping; 0 turns it off"""
    schedule: Schedule = "wsd"
    """wsd: warm-up, stable, then linear decay over the last `decay_ratio`"""
    warmup_ratio: float = 0.04
    """share of steps with a rising rate"""
    decay_ratio: float = 0.24
    """share of steps with a falling rate (wsd)"""
    min_lr_ratio: float = 0.0
    """last rate relative to the peak"""
    loss: Loss = "ce"
    """ce: cross-entropy with a decaying weight a slot; dpace: weights from the drafter's confidence; tv: 0.1 ce + 0.9
    total variation against the target; e2e-tv: expected accepted share of a block"""
    finish_loss: Loss | None = None
    """loss of the last `finish_ratio` of the steps; None keeps `loss`"""
    finish_ratio: float = 0.2
    """share of steps with `finish_loss`"""
    loss_decay_gamma: float | None = None
    """decay constant of ce and tv; None takes 4 for blocks of 8, 5 for 10, 7 for 16"""
    selector_weight: float = 0.3
    """weight of the selector's cross-entropy beside the loss"""
    ema_decay: float = 0.0
    """moving average of the weights that is evaluated and exported; 0 takes the weights themselves"""
    cache_taps: bool = False
    """keep the target's states of every row in memory after its first use: rows x max_length x (taps, and one more for
    tv and e2e-tv) x hidden x 2 bytes"""
    compile: bool = False
    """compile the drafter's layers and, on a GPU, the target's norms, attention and routers; a minute at the start"""
    cuda_graphs: bool = False
    """replay the target's forward pass as one CUDA graph: spares its launches, which decide where the target or the
    batch is small; not together with cache_taps"""
    bf16: bool = True
    """compute in bfloat16 with float32 masters; else all float32"""
    use_cpu: bool = False
    """train on the CPU even where there is a GPU"""

    logging_steps: int = 10
    """steps between lines of metrics.jsonl"""
    eval_steps: int = 0
    """steps between teacher-forced evaluations on held-out rows; 0 evaluates at the end only"""
    save_steps: int = 200
    """steps between checkpoints; 0 writes none"""
    resume_from_checkpoint: bool = True
    """continue from output_dir/checkpoint.pt if it is there"""
    eval_prompts: int = 32
    """held-out prompts to decode at the end; 0 skips decoding"""
    eval_max_new_tokens: int = 128
    """tokens a prompt of that decoding"""
    seed: int = 0
    """of initialisation, batches and anchors"""
    report_to: str = "none"
    """none, or a tracker that accelerate knows: tensorboard, wandb, trackio"""

    def __post_init__(self) -> None:
        for name in ("finish_ratio", "warmup_ratio", "decay_ratio", "eval_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        for name in ("max_steps", "logging_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.cuda_graphs and self.cache_taps:
            raise ValueError("cuda_graphs: what a graph returns is overwritten, and cache_taps keeps it; choose one")
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; a block is an anchor and at least one draft")

    def objective(self, step: int) -> Objective:
        """What step 0..max_steps-1 minimises; a function of the step alone."""
        loss = self.loss
        if self.finish_loss is not None and step >= self.max_steps - round(self.finish_ratio * self.max_steps):
            loss = self.finish_loss
        return Objective(loss, self.loss_decay_gamma, self.selector_weight)

    def needs_target(self) -> bool:
        """Whether some step compares with the target's own distribution."""
        return any(self.objective(step).needs_target for step in (0, self.max_steps - 1))


# What may change between a killed run and its continuation: what leaves the weights alone, and paths, which may move.
FREE_ON_RESUME = frozenset(
    "target output_dir data logging_steps eval_steps save_steps resume_from_checkpoint eval_prompts "
    "eval_max_new_tokens report_to cache_taps cuda_graphs".split()
)
