"""The report of a demo, from documents as its steps print them."""

import json

from tests.qat.test_qad_study import script


def test_a_demo_that_went_on_reports_the_time_of_all_its_steps(tmp_path):
    quality = {
        "rows": {n: {"kl_mean": 0.1, "top1_agreement": 0.9} for n in ("plain MXFP4 (even)", "release")},
        "conditions": {"settings": {"windows": 4, "length": 256, "dtype": "bfloat16"}},
    }
    settings = {"max_new_tokens": 24, "temperature": 0.0, "dtype": "bfloat16", "seed": 0}
    bench = {"conditions": {"settings": settings, "block": 8}, "prompts": 2, "lookup_length": 1.2}
    bench |= {"acceptance": {"length": 1.5}, "tokens_per_second": 20.0, "plain_tokens_per_second": 18.0}
    convert = {"expert_elements_changed": 0}
    documents = {"qad": {"scale_rule": "even", "steps": 6}, "quality": quality, "bench": bench, "convert": convert}
    (tmp_path / "steps").mkdir()
    for name, document in documents.items():
        (tmp_path / "steps" / f"{name}.json").write_text(json.dumps(document))
        (tmp_path / "steps" / f"{name}.command").write_text(f"mimo-qat {name}")
        (tmp_path / "steps" / f"{name}.seconds").write_text("30")
    report = script("report")
    steps = report.read_steps(tmp_path)
    for last_call, said in ((3, 120), (140, 140)):
        found = {r["name"]: r["value"] for r in report.records(steps, last_call)}
        assert found["demo_seconds"] == said
