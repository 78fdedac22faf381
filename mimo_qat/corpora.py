"""Real text that needs no download, as rows of data: what is installed on this machine, and tasks made from a seed.

What is installed decides what there is: corpora for experiments, not for a published data set. Files are read in the
order of a hash of their path, so that the first rows already are a mixture of all packages.
"""

import ast
import hashlib
import random
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__"}
FEWEST_BYTES, MOST_BYTES = 500, 200_000  # of a module
FEWEST_LINES, MOST_LINES = 4, 60  # of a function


def digest(text: str) -> str:
    """16 hex digits that depend on `text` alone."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _modules(*kinds: str) -> Iterator[tuple[str, str]]:
    """(path below its root, text) of the modules in "stdlib" and "purelib", each text once."""
    relative = {}
    for kind in kinds:
        root, skipped = Path(sysconfig.get_paths()[kind]), SKIPPED if kind == "stdlib" else set()
        for path in root.rglob("*.py"):
            if not skipped & set(path.relative_to(root).parts):
                relative[path] = str(path.relative_to(root))
    seen = set()
    for path in sorted(relative, key=lambda path: (digest(relative[path]), path)):
        try:
            if not FEWEST_BYTES <= path.stat().st_size <= MOST_BYTES:
                continue
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # test files that exist to be broken, dangling links
        if (key := digest(text)) not in seen:
            seen.add(key)
            yield relative[path], text


def _documented(*kinds: str) -> Iterator[tuple[str, str, ast.AST, str]]:
    """(path, module text, node, docstring) of every function and class that has a docstring."""
    for path, text in _modules(*kinds):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # a few files exist to be broken
        for node in _definitions(tree):
            doc = (ast.get_docstring(node) or "").strip()
            if doc:
                yield path, text, node, doc


def _definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Every function and class in the order of `ast.walk`, which spends most of its time inside expressions."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            waiting.extend(getattr(node, part, ()))


def _chat(question: str, answer: str | None = None, **more: Any) -> Row:
    turns = [("user", question)] + ([("assistant", answer)] if answer is not None else [])
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def function_rows(*kinds: str) -> Iterator[Row]:
    """One chat for every documented function of 4 to 60 lines: its summary is the question, its source the answer."""
    for _, text, node, doc in _documented(*kinds):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if FEWEST_LINES <= (node.end_lineno or node.lineno) - node.lineno + 1 <= MOST_LINES:
            source = "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
            question = f"Write the Python function `{node.name}`: {doc.partition(chr(10))[0]}"
            yield _chat(question, f"```python\n{source}\n```", domain="code")


def module_rows() -> Iterator[Row]:
    """One text for every module installed in site-packages."""
    for path, text in _modules("purelib"):
        yield {"id": path, "text": text}


def prefix_rows(pieces: int = 4) -> Iterator[Row]:
    """Beginnings of code to go on with, as plain text: of each module up to `pieces`, which begin at a definition of
    the module's top level and are 6 to 24 lines long."""
    for path, text in _modules("stdlib", "purelib"):
        lines = text.splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines) if re.match(r"(async )?(def|class) |@", line)]
        draw = random.Random(path)
        for start in sorted(draw.sample(starts, min(pieces, len(starts)))):
            prefix = "".join(lines[start : start + draw.randint(6, 24)]).rstrip()
            if len(prefix) >= 80:
                yield {"id": f"{path}:{start + 1}", "text": prefix, "domain": "code"}


QUESTIONS = (
    "What does the {kind} `{name}` do? Its documentation begins: {summary}",
    "Explain to a beginner what `{name}` of the Python module {module} is good for. It says of itself: {summary}",
    "Give a short example of how to use the Python {kind} `{name}` ({summary}) and explain it.",
    'Somebody documented a {kind} with "{summary}". What questions would you ask before using it?',
    "Rewrite this documentation so that it is clearer: {doc}",
)


def question_rows() -> Iterator[Row]:
    """Questions about documented functions and classes, in the words of a few templates."""
    for path, _, node, doc in _documented("stdlib", "purelib"):
        name = getattr(node, "name", "")
        summary = doc.partition("\n")[0].strip()
        if len(summary) >= 25 and not name.startswith("_"):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            form = QUESTIONS[int(digest(name + summary), 16) % len(QUESTIONS)]
            question = form.format(kind=kind, name=name, module=module, summary=summary, doc=doc[:600])
            yield _chat(question, domain="chat")


def reasoning_rows(count: int = 100_000, seed: int = 0) -> Iterator[Row]:
    """Small tasks of arithmetic, logic and counting that ask for the steps, made from `seed`."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _chat(f"{draw.choice(TASKS)(draw)} Think step by step, then give the answer.", domain="reasoning")


NAMES = "Ada Bela Carla Dina Emil Fritz Gesa Hana Ivo Jana Kofi Lena Mila Noor Omar Pia".split()
THINGS = "apples books candles coins eggs marbles pencils shells stamps tickets".split()


def _sum(draw: random.Random) -> str:
    terms = [str(draw.randint(2, 999)) for _ in range(draw.randint(3, 6))]
    return f"What is {' '.join(t + draw.choice([' +', ' -']) for t in terms[:-1])} {terms[-1]}?"


def _shopping(draw: random.Random) -> str:
    name, (first, second) = draw.choice(NAMES), draw.sample(THINGS, 2)
    a, b, p, q = (draw.randint(2, 30) for _ in range(4))
    paid = (a * p + b * q) // 50 * 50 + 50
    return (
        f"{name} buys {a} {first} at {p} cents each and {b} {second} at {q} cents each and pays with {paid} cents. "
        f"How many cents does {name} get back?"
    )


def _order(draw: random.Random) -> str:
    people = draw.sample(NAMES, draw.randint(4, 6))
    facts = [f"{a} is taller than {b}." for a, b in pairwise(people)]
    draw.shuffle(facts)
    return f"{' '.join(facts)} Who is the {draw.choice(['tallest', 'shortest'])}?"


def _sequence(draw: random.Random) -> str:
    value, step, growth = (draw.randint(1, n) for n in (20, 12, 4))
    terms = [value + step * i + growth * i * (i - 1) // 2 for i in range(5)]
    return f"What is the next number of {', '.join(map(str, terms))}?"


def _letters(draw: random.Random) -> str:
    word = "".join(draw.choices("abcdefgmnopst", k=draw.randint(6, 14)))
    return f'How often does the letter "{draw.choice(word)}" occur in "{word}"?'


def _travel(draw: random.Random) -> str:
    speed, hours, stop = draw.randint(30, 120), draw.randint(2, 9), draw.randint(5, 55)
    return (
        f"A train leaves at {draw.randint(1, 12)}:{draw.randint(0, 59):02d}, goes {speed * hours} km at {speed} km/h "
        f"and stops for {stop} minutes on the way. When does it arrive?"
    )


def _coins(draw: random.Random) -> str:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    start, days, given, found = draw.randint(20, 200), draw.randint(2, 7), draw.randint(1, 9), draw.randint(1, 9)
    return (
        f"{name} has {start} {thing}, gives away {given} of them each day and finds {found} more every second day. "
        f"How many {thing} does {name} have after {days} days?"
    )


TASKS: tuple[Callable[[random.Random], str], ...] = (_sum, _shopping, _order, _sequence, _letters, _travel, _coins)

CORPORA: dict[str, Callable[[], Iterator[Row]]] = {
    "stdlib": lambda: function_rows("stdlib"),
    "functions": lambda: function_rows("stdlib", "purelib"),
    "site-packages": module_rows,
    "prefixes": prefix_rows,
    "questions": question_rows,
    "reasoning": reasoning_rows,
}
