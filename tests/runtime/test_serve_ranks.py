"""The server on two gloo processes: answers of one process, whatever clients do, and an end that names who is at
fault."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mimo_runtime.config import EngineConfig, SamplingConfig
from mimo_runtime.detokenize import Decoder, Detokenizer
from mimo_runtime.engine import Engine
from mimo_runtime.prompts import load_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIELDS = {"device": "cpu", "dtype": "float32", "max_len": 512, "rank_timeout": 6.0}
LONG = {"prompt": "def lock(", "max_tokens": 400, "temperature": 0}


def worker_module():
    spec = importlib.util.spec_from_file_location("ranked_serve", HERE / "ranked_serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join(str(ROOT / p) for p in ("", "kernels", "runtime"))
    return kept | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


class Processes:
    """Two ranks of `arguments` of Python, as a launcher without an agent starts them, or torchrun with its agent;
    `said` grows with the standard error of all."""

    def __init__(self, *arguments: str, torchrun: bool = False):
        if torchrun:
            agent = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
            started = [([sys.executable, *agent, *arguments], environment())]
        else:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
            each = [environment(RANK=r, LOCAL_RANK=r, **shared) for r in "01"]
            started = [([sys.executable, *arguments], env) for env in each]
        self.said, self.threads = "", []
        self.running = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True) for c, env in started]
        for process in self.running:
            self.threads.append(threading.Thread(target=self._listen, args=(process,)))
            self.threads[-1].start()

    def _listen(self, process: subprocess.Popen) -> None:
        for line in process.stderr:
            self.said += line

    def find(self, pattern: str) -> str:
        """The first group of a pattern, once it was said."""
        until = time.monotonic() + 60
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < until and any(p.poll() is None for p in self.running), self.said
            time.sleep(0.02)
        return found[1]

    def codes(self, seconds: float) -> list[int]:
        """Exit codes of processes that end within so many seconds."""
        until = time.monotonic() + seconds
        codes = [p.wait(max(until - time.monotonic(), 0.1)) for p in self.running]
        for thread in self.threads:
            thread.join()
        return codes

    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]

    def kill(self) -> None:
        for process in self.running:
            process.kill()


@pytest.fixture
def processes():
    """processes(...) -> Processes that are gone when the test is over."""
    started = []

    def start(*arguments: str, **kw) -> Processes:
        started.append(Processes(*arguments, **kw))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def serving(folder: Path) -> list[str]:
    return ["-m", "mimo_runtime", "serve", str(folder), "--port=0", *[f"--{k}={v}" for k, v in FIELDS.items()]]


def pid_of_rank(rank: int, agent: int) -> int:
    """Of torchrun's children, the one with this rank."""
    for pid in map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()):
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return pid
    raise AssertionError(f"no rank {rank}")


# --- one engine of two ranks ------------------------------------------------------------------------------------------


def test_every_job_ends_alike_on_all_ranks(release, tmp_path, processes):
    """With rounds enqueued ahead, chains and trees, jobs that are cut, refused, or go on to their end."""
    ranked = worker_module()
    engine = Engine(release, ranked.settings())
    whole = [engine.generate(ranked.PROMPT, SamplingConfig(max_new_tokens=20, **s)).tokens for s in ranked.SAMPLINGS]
    assert whole[0] != whole[1]
    job = {"folder": str(release), "report": str(tmp_path / "out"), "decode": True}
    pair = processes(str(HERE / "ranked_serve.py"), json.dumps(job))
    assert pair.codes(100) == [0, 0] and not pair.errors() and "Traceback" not in pair.said, pair.said
    first, second = (json.loads(Path(f"{tmp_path / 'out'}-{r}.json").read_text()) for r in range(2))
    assert first == second  # the same tokens, ends and numbers of collectives
    assert [kind for _, kind, _ in first] == ["finished"] * 4 + ["ended"] * 4 + ["refused", "finished"]
    assert [tokens for tokens, _, _ in first[:4]] == [whole[0], whole[0], whole[1], whole[1]]
    for tokens, _, _ in first[4:8]:
        assert 0 < len(tokens) < 20 and tokens == whole[0][: len(tokens)]
    assert [len(tokens) for tokens, _, _ in first[4:6]] == [1, 1] and len(first[6][0]) > 3
    assert first[8] == [[], "refused", 0] and first[9][0] == whole[0]


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("fails", "error: rank 1 of 2 stopped the run: RuntimeError: no memory left"),
        ("hangs", "error: rank 0 of 2 stopped the run: it is alive but late, the others have waited"),
    ],
)
def test_a_rank_that_leaves_the_others_in_the_middle_is_named(release, tmp_path, processes, then, message):
    job = {"folder": str(release), "report": str(tmp_path / "out"), "decode": False, "then": then}
    pair = processes(str(HERE / "ranked_serve.py"), json.dumps(job))
    assert pair.codes(40) == [1, 1], pair.said  # its sleep is 60 s
    assert len(pair.errors()) == 1 and pair.errors()[0].startswith(message), pair.said


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """What the first test makes for those that share one server."""
    state: dict = {}
    yield state
    if state:
        state["pair"].kill()


@pytest.fixture
def server(made, request):
    """The base URL of a server on two ranks that several tests ask."""
    if not made:
        folder, _ = request.getfixturevalue("with_tokenizer")
        seeded = SamplingConfig(max_new_tokens=60, temperature=1.0, seed=5)
        prompt = load_tokenizer(folder).encode("stop")
        end = Engine(folder, EngineConfig(**FIELDS)).generate(prompt, seeded).tokens[20]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        pair = Processes(*serving(folder))
        made |= {"folder": folder, "pair": pair, "engine": Engine(folder, EngineConfig(**FIELDS))}
        made["url"] = pair.find(r"serving release at (\S+)/v1")
    return made["url"]


@pytest.fixture
def expect(server, made):
    """expect(prompt, ...) -> what one process answers, as (text, finish, number of tokens)."""
    tokenizer, engine = load_tokenizer(made["folder"]), made["engine"]

    def answer(prompt="def lock(", max_tokens=24, **sampling):
        out = engine.generate(tokenizer.encode(prompt), SamplingConfig(max_new_tokens=max_tokens, **sampling))
        text = Detokenizer(Decoder(tokenizer))
        shown = [t for t in out.tokens if t not in engine.target.stop_token_ids]
        return text.push(shown) + text.flush(), out.finish, len(out.tokens)

    return answer


def post(url: str, **body):
    return httpx.post(url + "/v1/completions", json=body, timeout=60)


def read(reply) -> tuple[str, str, int]:
    document = reply.json()
    choice = document["choices"][0]
    return choice["text"], choice["finish_reason"], document["usage"]["completion_tokens"]


def metric(url: str, name: str) -> float:
    page = httpx.get(url + "/metrics").text
    return sum(float(v) for v in re.findall(rf"^mimo_{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


def wait(condition, seconds=15.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}], ids=str)
def test_answers_are_those_of_one_process(server, expect, sampling):
    expected = expect(**sampling)
    assert read(post(server, prompt="def lock(", max_tokens=24, **sampling)) == expected
    body = {"prompt": "def lock(", "max_tokens": 24, "stream": True, **sampling}
    with httpx.stream("POST", server + "/v1/completions", json=body, timeout=60) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(e["choices"][0]["text"] for e in events) == expected[0] and len(events) > 3
    assert httpx.get(server + "/health").json() == {"status": "ok", "ranks": 2}
    assert metric(server, "ranks") == 2


def test_stop_tokens_and_stop_strings_end_an_answer(server, expect):
    text, finish, count = expect("stop", 60, temperature=1.0, seed=5)
    assert finish == "stop" and count <= 21
    assert read(post(server, prompt="stop", max_tokens=60, temperature=1.0, seed=5)) == (text, finish, count)
    text = expect(max_tokens=60, temperature=0.9, seed=7)[0]
    word = text[12:14]
    reply = read(post(server, prompt="def lock(", max_tokens=60, temperature=0.9, seed=7, stop=word))
    assert reply[:2] == (text[: text.index(word)], "stop")
    assert read(post(server, prompt="def lock(", max_tokens=24, temperature=0)) == expect(temperature=0)


def test_clients_that_queue_and_clients_that_leave(server, expect):
    """Eight ask at once and get their own answers, while others hang up in the middle or before their turn."""
    seeds = range(8)
    expected = [expect(temperature=0.8, seed=s) for s in seeds]
    before = metric(server, "generated_tokens_total")

    def polite(seed):
        return read(post(server, prompt="def lock(", max_tokens=24, temperature=0.8, seed=seed))

    def rude(i):
        with httpx.stream("POST", server + "/v1/completions", json=LONG | {"stream": True}, timeout=60) as reply:
            lines = reply.iter_lines()
            for _ in range(1 + 3 * i):
                next(lines)

    def impatient(_):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server + "/v1/completions", json=LONG, timeout=0.05)

    with ThreadPoolExecutor(13) as pool:
        left = [*pool.map(rude, range(3)), *pool.map(impatient, range(2))]
        assert list(pool.map(polite, seeds)) == expected and len(left) == 5
    wait(lambda: metric(server, "running") == 0)
    assert metric(server, "generated_tokens_total") - before < 8 * 24 + 3 * 200
    assert 'status="499"' in httpx.get(server + "/metrics").text


def test_wrong_requests_harm_no_rank(server, expect):
    before = metric(server, "prompt_tokens_total")
    for body in ({"prompt": "x" * 600}, {"prompt": [512]}, {"prompt": ""}, LONG | {"max_tokens": 600}):
        assert post(server, **body).status_code == 400
    assert metric(server, "prompt_tokens_total") == before  # none of them travelled
    assert read(post(server, prompt="def lock(", max_tokens=24, temperature=0)) == expect(temperature=0)


def test_a_rank_that_is_killed_while_all_are_idle_is_named(server, made):
    pair = made["pair"]
    time.sleep(FIELDS["rank_timeout"] + 2)  # to wait for requests is not to be late
    assert httpx.get(server + "/health").status_code == 200 and not pair.errors(), pair.said
    pair.running[1].kill()
    assert pair.codes(FIELDS["rank_timeout"] + 8) == [1, -9], pair.said
    assert len(pair.errors()) == 1 and "rank 1 of 2 stopped the run: no sign of life" in pair.errors()[0], pair.said


def test_sigterm_lets_the_running_request_end_and_all_ranks(with_tokenizer, processes):
    """A launcher sends it to every rank."""
    pair = processes(*serving(with_tokenizer[0]), "--shutdown_seconds=60")
    url = pair.find(r"serving release at (\S+)/v1")
    body = LONG | {"stream": True, "max_tokens": 150}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        for process in pair.running:
            process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason": "length"' in rest[-2]
    assert pair.codes(20) == [0, 0] and not pair.errors() and "Traceback" not in pair.said, pair.said


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_torchrun_ends_when_a_rank_is_killed(with_tokenizer, processes, busy):
    """Its agent sends SIGTERM to the others at once, which must not hide who was at fault."""
    pair = processes(*serving(with_tokenizer[0]), torchrun=True)
    url = pair.find(r"serving release at (\S+)/v1")
    body = LONG | {"stream": True, "max_tokens": 400 if busy else 4}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        if not busy:
            assert [line for line in lines if line][-1] == "data: [DONE]"
        os.kill(pid_of_rank(1, pair.running[0].pid), signal.SIGKILL)
        assert pair.codes(20) == [1], pair.said
    assert len(pair.errors()) == 1 and "rank 1 of 2 stopped the run: no sign of life" in pair.errors()[0], pair.said


@pytest.mark.slow
def test_torchrun_ends_all_ranks_on_sigterm(with_tokenizer, processes):
    pair = processes(*serving(with_tokenizer[0]), torchrun=True)
    url = pair.find(r"serving release at (\S+)/v1")
    ranks = [pid_of_rank(r, pair.running[0].pid) for r in range(2)]
    assert post(url, prompt="def lock(", max_tokens=4).status_code == 200
    pair.running[0].send_signal(signal.SIGTERM)
    pair.codes(20)
    assert not pair.errors() and not any(Path(f"/proc/{pid}").exists() for pid in ranks), pair.said
