"""What a QAT run is told: the fields of `mimo-qat qat` and of the YAML files in recipes/qat."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class QatConfig:
    """FP4 quantization-aware distillation of the routed experts; everything else is frozen."""

    model: str
    """BF16 (or FP8) folder, MiMo-V2 or a transformers MoE; its experts are the teacher's"""
    output_dir: str
    """folder to write: snapped BF16 model, metrics.jsonl, held_out.jsonl, checkpoints/"""
    dataset_name: str = "stdlib"
    """training rows: a .jsonl file, a hub dataset, "stdlib", "functions", "site-packages", or, with held-out rows of
    their own, a folder of mimo-qat generate-data or a file of mimo-qat pack"""
    held_out: float = 0.1
    """fraction of rows, chosen by a hash of the prompt, that is evaluated and never trained on"""
    eval_rows: int = 8
    """packed rows of held-out text in one evaluation"""
    max_length: int = 512
    """tokens a packed row"""
    scale_rule: Literal["even", "floor", "rceil", "mse", "none"] = "even"
    """MXFP4 block-scale rule; "none" trains in BF16 without quantization"""
    train: Literal["experts", "experts+router", "body"] = "experts"
    """what is trained; "body" is everything but the embeddings and the head. Only experts are quantized"""
    kl_weight: float = 1.0
    """weight of KL(teacher || student); 0 for training without a teacher"""
    ce_weight: float = 0.0
    """weight of the next-token cross-entropy"""
    hidden_weight: float = 0.0
    """weight of the relative squared difference of the final hidden states"""
    max_steps: int = 100
    """optimizer steps"""
    per_device_train_batch_size: int = 4
    """packed rows a micro-batch and process"""
    gradient_accumulation_steps: int = 1
    """micro-batches a step"""
    learning_rate: float = 1e-5
    """peak learning rate; scale it with sigma_w / 0.02, and prefer twice as much below 200 steps"""
    min_learning_rate: float = 0.1
    """floor of the cosine schedule, as a fraction of learning_rate"""
    warmup_ratio: float = 0.05
    """fraction of the steps with a rising learning rate"""
    max_grad_norm: float = 1.0
    """gradient clipping; 0 turns it off"""
    balance_rate: float = 0.0
    """step of the router's correction bias towards equal load, as in auxiliary-loss-free balancing (2408.15664)"""
    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the master weights; bfloat16 is for comparison, it loses most small updates"""
    engine: Literal["snapped", "hook"] = "snapped"
    """"snapped": BF16 parameters rewritten from FP32 masters once a step; "hook": FP32 parameters that the optimizer
    owns, quantized in every forward pass (experts only). Both compute the same"""
    sharding: Literal["auto", "none", "fsdp2"] = "auto"
    """how the model is spread over processes; "auto" does what accelerate was launched with, DeepSpeed included"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass"""
    compile: bool = True
    """on a GPU, sort tokens by expert and compile norms, attention and routers; half a minute at the start"""
    deterministic: bool = True
    """use only kernels that give the same bits every time, so that a resumed run ends with the same bytes"""
    logging_steps: int = 5
    """steps between lines of metrics.jsonl"""
    eval_steps: int = 50
    """steps between held-out evaluations; the last step is always evaluated"""
    save_steps: int = 50
    """steps between checkpoints; 0 for none"""
    resume_from_checkpoint: bool = True
    """continue from the newest checkpoint in output_dir"""
    report_to: Literal["none", "wandb", "trackio"] = "none"
    """experiment tracker besides metrics.jsonl"""
    run_name: str | None = None
    """name of the run in the tracker"""
    seed: int = 0
    """order of the data"""

    def __post_init__(self) -> None:
        for name in (
            *("max_steps", "logging_steps", "eval_steps", "eval_rows"),
            *("per_device_train_batch_size", "gradient_accumulation_steps"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not (self.kl_weight or self.ce_weight or self.hidden_weight):
            raise ValueError("kl_weight, ce_weight and hidden_weight are all 0; nothing would be learned")
        if self.scale_rule == "none" and self.kl_weight and not self.ce_weight:
            raise ValueError("scale_rule none with KL alone: student and teacher are the same; set ce_weight")
        if self.engine == "hook" and (self.train != "experts" or self.master_dtype != "float32"):
            raise ValueError("the hook engine trains FP32 experts alone; use engine snapped for other train or masters")


# What may differ between a run and the checkpoint that it continues. Batch sizes are compared as rows a step.
FREE = {
    *("logging_steps", "save_steps", "eval_steps", "report_to", "run_name", "output_dir", "resume_from_checkpoint"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "engine", "sharding", "gradient_checkpointing"),
}


def learning_rate(config: QatConfig, step: int) -> float:
    """Linear warm-up, then cosine down to the floor; `step` counts from 0."""
    warmup = math.ceil(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    floor = config.min_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
