"""Losslessness: with any drafter, at any temperature, the tokens are those of plain decoding."""

import math

import pytest
import torch

from mimo_runtime.engine import Engine, EngineConfig
from mimo_runtime.speculate import Sampler, SamplingConfig, choose, gumbel_noise

PROMPT = [5, 17, 300, 2, 44, 91, 7]
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 1.0, "seed": 3},
    "top-k": {"temperature": 1.3, "top_k": 20, "seed": 4},
    "top-p": {"temperature": 0.8, "top_p": 0.7, "seed": 5},
    "top-k and top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.8, "seed": 6},
}


@pytest.fixture
def engine(reference):
    return Engine(reference, EngineConfig(dtype="float32", device="cpu", max_len=128, prefill_chunk=16))


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_random_drafter_changes_no_token(engine, kind):
    sampling = SamplingConfig(max_new_tokens=60, **SAMPLINGS[kind])
    plain = engine.generate(PROMPT, sampling, speculate=False)
    drafted = engine.generate(PROMPT, sampling)
    assert drafted.tokens == plain.tokens and len(plain.tokens) == 60
    assert all(r.drafted == 7 for r in drafted.rounds) and all(r.drafted == 0 for r in plain.rounds)
    other = engine.generate(PROMPT, SamplingConfig(max_new_tokens=60, temperature=1.0, seed=99))
    assert other.tokens != plain.tokens


@pytest.mark.parametrize("accept", [0, 1, 2, 3, 4, 5, 6, 7, [7, 0, 3, 1]], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "temperature"])
def test_forced_acceptance_is_exact_and_lossless(engine, accept, kind):
    sampling = SamplingConfig(max_new_tokens=50, **SAMPLINGS[kind])
    plain = engine.generate(PROMPT, sampling, speculate=False).tokens
    forced = engine.generate(PROMPT, sampling, forced_acceptance=accept)
    lengths = accept if isinstance(accept, list) else [accept]
    assert forced.tokens == plain
    assert [r.accepted for r in forced.rounds if not r.cut] == [
        lengths[i % len(lengths)] for i, r in enumerate(forced.rounds) if not r.cut
    ]


def test_prompts_one_after_the_other_share_the_caches(engine, reference):
    long, short = [(7 * i) % 512 for i in range(70)], [9]
    sampling = SamplingConfig(max_new_tokens=20)
    first = [engine.generate(p, sampling).tokens for p in (long, short, long, PROMPT)]
    fresh = [Engine(reference, engine.cfg).generate(p, sampling).tokens for p in (long, short, long, PROMPT)]
    assert first == fresh


def test_a_prompt_of_one_token(engine):
    sampling = SamplingConfig(max_new_tokens=30)
    tokens = engine.generate([3], sampling).tokens
    assert tokens == engine.generate([3], sampling, speculate=False).tokens and len(tokens) == 30


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 9, 10])
def test_the_budget_ends_inside_a_block(engine, budget):
    full = engine.generate(PROMPT, SamplingConfig(max_new_tokens=20), speculate=False).tokens
    out = engine.generate(PROMPT, SamplingConfig(max_new_tokens=budget), forced_acceptance=7)
    assert out.tokens == full[:budget] and out.finish == "length"
    assert sum(len(r.tokens) for r in out.rounds) == budget - 1


@pytest.mark.parametrize("at", [0, 1, 2, 6, 8, 9])
def test_a_stop_token_ends_inside_a_block(engine, at):
    full = engine.generate(PROMPT, SamplingConfig(max_new_tokens=20), speculate=False).tokens
    stop = next(i for i in range(at, 20) if full[i] not in full[:i])
    sampling = SamplingConfig(max_new_tokens=20, stop_token_ids=(full[stop],))
    for how in ({"speculate": False}, {}, {"forced_acceptance": 7}, {"forced_acceptance": 2}):
        out = engine.generate(PROMPT, sampling, **how)
        assert out.tokens == full[: stop + 1] and out.finish == "stop"


def test_tokens_stream_as_they_are_committed(engine):
    parts: list[list[int]] = []
    out = engine.generate(PROMPT, SamplingConfig(max_new_tokens=17), forced_acceptance=3, on_tokens=parts.append)
    assert [t for part in parts for t in part] == out.tokens and [len(p) for p in parts] == [1, 4, 4, 4, 4]


def test_bfloat16_speculates_and_stays_close(reference):
    """Rounding may break a tie in bfloat16, where kernels differ between row counts: the common prefix is checked."""
    engine = Engine(reference, EngineConfig(device="cpu", max_len=128))
    sampling = SamplingConfig(max_new_tokens=40)
    plain, forced = (
        engine.generate(PROMPT, sampling, **how).tokens for how in ({"speculate": False}, {"forced_acceptance": 5})
    )
    common = next((i for i, (a, b) in enumerate(zip(plain, forced, strict=True)) if a != b), len(plain))
    if common < len(plain):
        top = engine.logits(PROMPT + plain[:common])[-1].topk(2).values
        assert float(top[0] - top[1]) < 0.05
    assert common > 0


# --- the sampler itself, without a model ----------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_noise_is_the_published_hash():
    """Against arithmetic on Python integers: splitmix64 of the stream that starts at a hash of (seed, position)."""
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    seed, position, token = 12345, 678, 49151
    key = splitmix64((position * step + seed) & mask)
    u = ((splitmix64((key + (token + 1) * step) & mask) >> 11) + 0.5) * 2.0**-53
    noise = gumbel_noise(seed, torch.tensor([position]), torch.tensor([[token]]))
    assert float(noise[0, 0]) == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5)
    assert splitmix64(step) == 0xE220A8397B1DCDAF  # first output of the generator seeded with 0


def test_noise_has_the_gumbel_distribution():
    noise = gumbel_noise(0, torch.arange(200), torch.arange(1000)[None]).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    for x in (-1.0, 0.0, 1.0, 3.0):
        assert float((noise < x).double().mean()) == pytest.approx(math.exp(-math.exp(-x)), abs=0.005)
    rows = torch.corrcoef(noise[:20])
    assert float((rows - torch.eye(20)).abs().max()) < 0.15


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_a_choice_depends_on_its_position_and_nothing_else(kind):
    sampler = Sampler.of(SamplingConfig(**SAMPLINGS[kind]))
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0))
    block = choose(logits, torch.arange(40, 48), sampler)
    for split in (1, 3, 8):
        parts = [
            choose(logits[i : i + split], torch.arange(40 + i, 40 + min(i + split, 8)), sampler)
            for i in range(0, 8, split)
        ]
        assert torch.equal(torch.cat(parts), block)
    if kind != "greedy":
        assert not torch.equal(choose(logits, torch.arange(50, 58), sampler), block)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-40},  # logits / 1e-40 are infinite: the first token of them, not the best one
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)
