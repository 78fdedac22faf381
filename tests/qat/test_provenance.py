from mimo_qat.provenance import with_earlier, write_json


def test_rows_of_an_earlier_commit_stay_and_figures_are_replaced(tmp_path):
    def record(name: str, commit: str) -> dict:
        return {"name": name, "commit": commit}

    old = [record("speed", "a"), record("memory", "a"), record("kl even", "a"), record("kl even", "b")]
    write_json(tmp_path / "old.json", old)
    new = [record("speed", "b"), record("kl even", "b")]
    assert with_earlier(new, str(tmp_path / "old.json"), "kl ") == [*new, old[1], old[2]]
    assert with_earlier(new, None, "kl ") == new
