"""`mimo-qat VERB`: make, train, convert and check an FP4-DFlash checkpoint."""

from mimo_qat.commands import Verb, run

VERBS = {
    "upcycle": Verb("mimo_qat.models.upcycle", "UpcycleConfig", "dense model -> MiMo-V2 mixture of experts"),
    "pack": Verb("mimo_qat.data", "PackConfig", "tokenize and pack a dataset once for many runs"),
    "plan": Verb("mimo_qat.plan", "PlanConfig", "memory and time a GPU needs, from a config alone", "model"),
    "qat": Verb("mimo_qat.qat.train", "QatConfig", "FP4 quantization-aware distillation of the experts"),
    "evaluate": Verb("mimo_qat.evaluate", "EvaluateConfig", "KL, agreement and tasks of quantized models, paired"),
    "distill": Verb("mimo_qat.distill.train", "DistillConfig", "train a DFlash drafter for a target"),
    "generate-data": Verb("mimo_qat.distill.generate", "GenerateDataConfig", "let the target answer prompts"),
    "acceptance": Verb("mimo_qat.distill.acceptance", "AcceptanceConfig", "acceptance length by domain, by replay"),
    "convert": Verb("mimo_qat.convert", "ConvertConfig", "target + drafter -> FP4-DFlash release folder"),
    "check": Verb("mimo_qat.checkpoint.check", "CheckConfig", "prove a checkpoint folder", positional="folder"),
    "layout": Verb(
        "mimo_qat.checkpoint.layout", "LayoutConfig", "every tensor of a release from a config alone", "config_json"
    ),
    "push": Verb("mimo_qat.release", "PushConfig", "publish a release on the hub, with a measured card", "folder repo"),
    "env": Verb("mimo_qat.environment", "EnvConfig", "versions and hardware, for bug reports"),
}


def main() -> int:
    """Entry point of the console script."""
    return run("mimo-qat", "The open path from a Mixture-of-Experts model to an FP4-DFlash checkpoint.", VERBS)


if __name__ == "__main__":
    raise SystemExit(main())
