"""What the server is made of, without a server: requests, sessions, settings."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_runtime.cli import main
from mimo_runtime.config import SamplingConfig
from mimo_runtime.protocol import NEUTRAL, ApiError, Request, parse
from mimo_runtime.scheduler import Sessions
from mimo_runtime.serve_config import ServeConfig
from mimo_runtime.server import listen

ROOT = Path(__file__).parents[2]
ASK = [{"role": "user", "content": "Name a lock."}]

FIELDS = [
    "messages",
    "prompt",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    *NEUTRAL,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "include_usage"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_a_request_in_full():
    body = {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    }
    body["messages"] += [{"role": "assistant", "content": "c"}, {"role": "user", "content": "é"}]
    body |= {"max_tokens": 5, "max_completion_tokens": 7, "temperature": 1e-6, "top_p": 1, "seed": -3, "stop": "x"}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "top_k": 4, "model": "m", "user": "u"}
    roles = [{"role": r, "content": c} for r, c in (("system", "ab"), ("assistant", "c"), ("user", "é"))]
    assert parse(json.dumps(body).encode(), "chat.completion", "m") == Request(
        "chat.completion", roles, 7, 0.0, 1.0, 4, -3, ("x",), True, True
    )
    plain = parse(b'{"prompt": [[1, 2]]}', "text_completion", "m")
    assert plain == Request("text_completion", [1, 2], None, 1.0, 1.0, 0, plain.seed, (), False, False)
    assert plain.seed != parse(b'{"prompt": "x"}', "text_completion", "m").seed  # random where none is asked for


@settings(max_examples=200, deadline=None, derandomize=True)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), chat=st.booleans(), valid=st.booleans())
def test_any_body_is_a_request_or_refused(fields, chat, valid):
    body = ({"messages": ASK, "prompt": "x"} if valid else {}) | fields
    try:
        request = parse(json.dumps(body).encode(), "chat.completion" if chat else "text_completion", "m")
    except ApiError as error:
        assert error.status == 400 and error.message
        return
    assert isinstance(request, Request)
    SamplingConfig(
        max_new_tokens=request.max_tokens or 1,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
    )


def test_sessions_on_a_clock_of_our_own():
    cfg = ServeConfig(folder="x", max_sessions=2, session_seconds=100, idle_seconds=10)
    sessions = Sessions(cfg)
    a = sessions.enter("a", 0.0)
    b = sessions.enter("b", 1.0)
    with pytest.raises(ApiError, match="2 sessions") as full:
        sessions.enter("c", 2.0)
    assert full.value.retry_after == 10  # nobody can be sure to leave before that
    sessions.leave(b, 5.0)
    with pytest.raises(ApiError) as full:
        sessions.enter("c", 14.0)
    assert full.value.retry_after == 1
    assert sessions.enter("a", 14.5) is a and sessions.deadline(a) == 100.0
    c = sessions.enter("c", 15.0)  # b was idle for ten seconds
    assert sessions.count(99.0) == 2 and sessions.count(100.5) == 1  # a's time is over though it still works
    assert sessions.enter("a", 101.0) is not a
    sessions.leave(a, 102.0)  # the old session's request ends late, and the new one does not notice
    assert sessions.open["a"].active == 1 and sessions.open["c"] is c


def test_settings_are_checked_and_the_recipe_is_the_trials(tmp_path, capsys, monkeypatch):
    flags = [f"--config={ROOT / 'recipes/serve/ultraspeed-trial.yaml'}", "--max_queue=5", "--print_config"]
    with pytest.raises(SystemExit):
        main(["serve", "release", *flags])
    printed = capsys.readouterr().out
    for line in ("session_seconds: 1800", "idle_seconds: 300", "max_queue_per_client: 10", "max_queue: 5"):
        assert line in printed
    (tmp_path / "empty").write_text("# none yet\n")
    monkeypatch.delenv("NO_KEYS", raising=False)
    cfg = ServeConfig(folder="x")
    for change in (
        {"api_key_file": str(tmp_path / "no")},
        {"api_key_file": str(tmp_path / "empty")},
        {"api_key_env": "NO_KEYS"},
    ):
        with pytest.raises(ValueError, match=r"write|set it"):
            replace(cfg, **change).api_keys()
    (tmp_path / "umlaut").write_text("schlüssel\n")
    with pytest.raises(ValueError, match="ASCII"):
        replace(cfg, api_key_file=str(tmp_path / "umlaut")).api_keys()
    for name, value in {"max_queue": 0, "port": 70000, "session_seconds": -1, "max_prompt_tokens": 9999}.items():
        with pytest.raises(ValueError, match=name):
            replace(cfg, **{name: value})
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="another --port"):
        listen(replace(cfg, port=taken.getsockname()[1]))


def test_nothing_of_the_server_is_imported_unless_it_runs():
    code = (
        "import sys; sys.path[:0] = ['.', 'kernels', 'runtime']\nfrom mimo_runtime.cli import main\n"
        "try: main(['serve', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'starlette', 'uvicorn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "max_queue_per_client" in done.stdout, done.stderr
